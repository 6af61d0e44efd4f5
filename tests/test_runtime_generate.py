"""Greedy texts and logits equal to transformers' own, for every family of the decoder and for one that goes around it."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from sweep import tiny_types
from tiny import tiny_model, tiny_tokens

from topiarist import runtime
from topiarist.core.compiled import NoKernels
from topiarist.core.errors import TopiaristError
from topiarist.models.modeling_pruned import Absent, reshape
from topiarist.runtime import cpu
from topiarist.runtime.build import load_kernels
from topiarist.runtime.decoder import FAMILIES, Decoder
from topiarist.runtime.generate import Generator
from topiarist.structured import plan_layout, shrunk, units_of


def compiled() -> bool:
    try:
        load_kernels()
    except NoKernels:
        return False
    return True


needs_kernels = pytest.mark.skipif(not compiled(), reason="no C++ compiler")


def by_transformers(model, ids, new):
    return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False)[
        :, ids.shape[1] :
    ]


@needs_kernels
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_texts_are_those_of_transformers(family):
    """Mistral's window of 16 tokens is passed within the text."""
    model, ids = tiny_model(family), tiny_tokens(3, 9)
    generator = Generator(model)
    assert not generator.reason
    assert torch.equal(generator.generate(ids, 24), by_transformers(model, ids, 24))
    assert torch.equal(generator.generate(ids[:1], 24), by_transformers(model, ids[:1], 24)), (
        "another batch, a new cache"
    )


@needs_kernels
@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {"tie_word_embeddings": True, "attention_bias": True}),
        ("llama", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
                                       "high_freq_factor": 4.0, "original_max_position_embeddings": 32}}),
        ("llama", {"hidden_act": "gelu_pytorch_tanh"}),
        ("qwen3", {"tie_word_embeddings": True}),
    ],
    ids=["tied, biases", "llama3 angles", "gelu", "tied qwen3"],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_of_every_step(family, options, dtype):
    model = tiny_model(family, **options)
    model, exact = model.to(dtype), model.to(dtype).to(torch.float32)
    ids = tiny_tokens(2, 12)
    generator = Generator(model)
    decoder = generator._prepare(2, 12)
    with torch.inference_mode():
        expected = exact(ids).logits
        generator._read_prompt(decoder, ids[:, :1])
        for position in range(1, 12):
            logits = decoder.step(ids[:, position].contiguous(), position)
            tolerance = {"atol": 1e-4, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 0.05, "rtol": 0.05}
            torch.testing.assert_close(logits, expected[:, position], **tolerance)


@needs_kernels
def test_packed_linears():
    model, ids = tiny_model("llama", hidden_size=64), tiny_tokens(1, 8)
    for module in model.model.layers.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.data[torch.rand_like(module.weight) < 0.6] = 0
    expected = by_transformers(model, ids, 12)
    assert cpu.accelerate(model, measure=False).num_packed == 14
    assert torch.equal(Generator(model).generate(ids, 12), expected)


@pytest.mark.parametrize(
    ("family", "options", "reason"),
    [("gpt2", {}, "not gpt2"), ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
                                "kind 'dynamic'")],
)  # fmt: skip
def test_other_models_go_through_transformers(family, options, reason):
    model, ids = tiny_model(family, **options), tiny_tokens(2, 5)
    generator = Generator(model)
    if compiled():
        assert reason in generator.reason
    assert torch.equal(generator.generate(ids, 6), by_transformers(model, ids, 6))
    drawn = [generator.generate(ids, 6, temperature=2.0, seed=seed) for seed in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_of_the_generation_config_only_the_ends_are_heeded(family):
    """In our loop and in that of transformers alike."""
    model, ids = tiny_model(family), tiny_tokens(1, 6)
    generator = Generator(model)
    texts = [generator.generate(ids, 12, temperature=t) for t in (0.0, 2.0)]
    said = {"repetition_penalty": 1.5, "no_repeat_ngram_size": 1, "do_sample": True, "top_p": 0.01, "min_p": 0.9}
    model.generation_config.update(**said, num_return_sequences=3)
    assert all(
        text.equal(generator.generate(ids, 12, temperature=t)) for text, t in zip(texts, (0.0, 2.0), strict=True)
    )
    assert {name: getattr(model.generation_config, name) for name in said} == said
    model.generation_config.eos_token_id = int(texts[0][0, 3])
    assert torch.equal(generator.generate(ids, 12)[0], texts[0][0, : texts[0][0].tolist().index(texts[0][0, 3]) + 1])


def test_a_model_inside_another_goes_through_transformers():
    peft = pytest.importorskip("peft")
    model, ids = tiny_model(), tiny_tokens(2, 5)
    expected = by_transformers(model, ids, 4)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    generator = Generator(wrapped)
    assert "and not PeftModelForCausalLM" in generator.reason
    assert torch.equal(generator.generate(ids, 4), expected), "an adapter begins with zeros"


def test_without_a_compiler(monkeypatch):
    def none():
        raise NoKernels("no C++ compiler found")

    monkeypatch.setattr("topiarist.runtime.decoder.load_kernels", none)
    generator = Generator(tiny_model())
    assert generator.reason == "no C++ compiler found"
    assert generator.generate(tiny_tokens(1, 4), 3).shape == (1, 3)


@needs_kernels
def test_texts_end_each_by_itself():
    model, ids = tiny_model(), tiny_tokens(4, 6)
    free = Generator(model).generate(ids, 12)
    model.generation_config.eos_token_id = [int(free[0, 3]), int(free[2, 1])]
    expected = by_transformers(model, ids, 12)
    assert torch.equal(Generator(model).generate(ids, 12), expected)
    assert (expected == 0).any(), "padding follows an end"


@needs_kernels
@pytest.mark.parametrize("padding", [-1, 10**9])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_padding_need_not_be_a_token(family, padding):
    """Published configs have -1, or the first number after the vocabulary: the decoder must not read what lies there."""
    model, ids = tiny_model(family), tiny_tokens(4, 6)
    model.generation_config.eos_token_id = int(Generator(model).generate(ids, 12)[0, 3])
    model.generation_config.pad_token_id = 0
    expected = Generator(model).generate(ids, 12)
    model.generation_config.pad_token_id = padding
    assert torch.equal(Generator(model).generate(ids, 12), expected.masked_fill(expected == 0, padding))
    assert (expected == 0).any()


@needs_kernels
def test_streams_of_one_generator_do_not_meet():
    generator, one, other = Generator(tiny_model()), tiny_tokens(1, 5), tiny_tokens(1, 9, seed=1)
    expected, decoder = (generator.generate(one, 8), generator.generate(other, 8)), generator._decoder
    assert torch.equal(generator.generate(one, 8), expected[0])
    assert decoder is not None and generator._decoder is decoder, "one text after the other needs no other cache"
    for at, tokens in enumerate(zip(generator.stream(one, 8), generator.stream(other, 8), strict=True)):
        assert list(tokens) == [text[:, at] for text in expected]


@needs_kernels
@pytest.mark.parametrize(
    "change",
    [lambda model, new: model.load_state_dict(new), lambda model, new: model.load_state_dict(new, assign=True),
     lambda model, new: model.load_state_dict(new) and model.half().float()],
    ids=["in place", "other tensors", "cast"],
)  # fmt: skip
def test_a_model_that_changes_is_followed(change):
    model, other, ids = tiny_model(), tiny_model(seed=5), tiny_tokens(2, 5)
    generator = Generator(model)
    generator.generate(ids, 4)
    change(model, other.state_dict())
    assert torch.equal(generator.generate(ids, 8), Generator(model).generate(ids, 8))


@needs_kernels
def test_a_step_outside_the_cache_or_the_vocabulary():
    decoder = Decoder(tiny_model(), batch=2, max_tokens=8)
    for tokens, position in (([5, 260], 0), ([-1, 5], 0), ([5, 5], 8), ([5, 5], -1), ([5], 0)):
        with pytest.raises(IndexError):
            decoder.step(torch.tensor(tokens), position)
    pairs = torch.tensor([[5, 0], [6, 0]])
    expected = decoder.step(torch.tensor([5, 6]), 0).clone()
    assert torch.equal(decoder.step(pairs[:, 0], 0), expected), "tokens that lie apart"


@needs_kernels
def test_temperature_draws_by_the_seed():
    generator, ids = Generator(tiny_model()), tiny_tokens(2, 5)
    assert torch.equal(generator.generate(ids, 8, temperature=1e-45), generator.generate(ids, 8))
    drawn = [generator.generate(ids, 8, temperature=2.0, seed=seed) for seed in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert torch.equal(generator.generate(ids, 8, temperature=1e-4), generator.generate(ids, 8))


@needs_kernels
def test_layers_of_different_size_and_absent_ones():
    model = tiny_model()
    reshape(model, {
        "shapes": {
            "model.layers.0.self_attn.q_proj.weight": (16, 32), "model.layers.0.self_attn.k_proj.weight": (8, 32),
            "model.layers.0.self_attn.v_proj.weight": (8, 32), "model.layers.0.self_attn.o_proj.weight": (32, 16),
            "model.layers.0.mlp.gate_proj.weight": (24, 32), "model.layers.0.mlp.up_proj.weight": (24, 32),
            "model.layers.0.mlp.down_proj.weight": (32, 24),
        },
        "heads": {"model.layers.0.self_attn": [2, 1]}, "experts": {},
        "absent": [["model.layers.1.input_layernorm", "inside"], ["model.layers.1.self_attn", "attention"]],
    })  # fmt: skip
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    ids = tiny_tokens(2, 7)
    generator = Generator(model.eval())
    assert not generator.reason
    assert torch.equal(generator.generate(ids, 10), by_transformers(model, ids, 10))


@needs_kernels
@pytest.mark.parametrize("family", FAMILIES)
def test_sublayers_that_shrink_removed(family):
    """A norm goes with its sublayer; one that is gone by itself is another function."""
    gone = ("model.layers.0.self_attn:attention", "model.layers.1.mlp:ffn")
    groups = units_of(model := tiny_model(family), ("attention", "ffn"))
    kept = {group.key: torch.tensor([group.key not in gone]) for group in groups}
    small = shrunk(model, groups, kept, plan_layout(model, groups, kept, "hetero"))
    ids = tiny_tokens(2, 7)
    generator = Generator(small)
    assert not generator.reason
    assert torch.equal(generator.generate(ids, 10), by_transformers(small, ids, 10))
    model.model.layers[0].input_layernorm = Absent("inside", 0)
    assert Generator(model).reason == "the decoder knows no layer whose inside was removed"


@pytest.mark.parametrize(
    ("prompt", "new", "message"),
    [(60, 10, r"60 tokens of prompt and 10 new ones are more than the model's 64 positions"), (0, 1, "needs a token"),
     (4, 0, "at least 1")],
)  # fmt: skip
def test_refusals(prompt, new, message):
    with pytest.raises(TopiaristError, match=message):
        Generator(tiny_model()).generate(tiny_tokens(1, prompt), new)


def test_models_that_nothing_binds_go_beyond_the_length_in_their_config():
    model = tiny_types.tiny_model("xglm")
    model.config.max_position_embeddings = 16
    ids = tiny_tokens(1, 12)
    assert torch.equal(Generator(model).generate(ids, 10), by_transformers(model, ids, 10))


@pytest.mark.parametrize(
    ("ids", "options", "message"),
    [(torch.tensor([[5, 260]]), {}, "token 260, the model knows 0 to 259"),
     (torch.tensor([[5]]), {"temperature": float("nan")}, "temperature at least 0"),
     (torch.zeros(0, 4, dtype=torch.int64), {}, "needs a token")],
)  # fmt: skip
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_prompts_that_no_model_can_read(family, ids, options, message):
    with pytest.raises(TopiaristError, match=message):
        Generator(tiny_model(family)).generate(ids, 2, **options)


@needs_kernels
def test_the_decoder_allocates_once():
    decoder = Decoder(tiny_model(), batch=1, max_tokens=8)
    first, second = (decoder.step(torch.tensor([5]), position).data_ptr() for position in (0, 1))
    assert first == second


def test_the_command(command, tmp_path):
    from tiny import tiny_checkpoint

    folder = tiny_checkpoint(tmp_path / "model")
    code, text, said = command("generate", folder, "--prompt", "ab", "-n", 5)
    assert code == 0 and text.endswith("\n") and "2 tokens of prompt" in said
    assert command("generate", folder, "--prompt", "ab", "-n", 5)[1] == text
    code, _, said = command("generate", folder, "--prompt", "")
    assert code == 2 and "the prompt is empty" in said
    code, _, said = command("generate", folder, "--prompt", "ab", "-n", 500)
    assert code == 2 and "the model's 64 positions" in said
    assert command("generate", tmp_path / "nothing", "--prompt", "ab")[0] == 2


@pytest.mark.parametrize(
    "pieces",
    [
        (b"and", b" \xe6\x9d", b"\xb1", b"\xe4\xba", b"\xac \xe2", b"\x82", b"\xac5"),
        (b"a \xf0", b"\x9f", b"\x99\x82", b"\xff", b"\xef\xbf\xbd", b"b"),
        (b"cut", b" \xe2\x82"),
    ],
    ids=["halves", "no characters", "cut"],
)
def test_the_command_prints_every_character(pieces, command, tmp_path, monkeypatch):
    """Tokens of a byte-level tokenizer may end inside a character, and have whole ones before it."""
    from tiny import tiny_checkpoint

    folder = tiny_checkpoint(tmp_path / "model")
    tokenizer = mock.Mock()
    tokenizer.return_value.input_ids = tiny_tokens(1, 2)
    tokenizer.decode = lambda ids, **_: b"".join(pieces[i] for i in ids).decode(errors="replace")
    monkeypatch.setattr("topiarist.data.load_tokenizer", lambda _: tokenizer)
    monkeypatch.setattr(Generator, "stream", lambda *_, **__: iter(torch.arange(len(pieces))[:, None]))
    code, text, said = command("generate", folder, "--prompt", "ab")
    assert code == 0 and text == b"".join(pieces).decode(errors="replace") + "\n", said


def test_public_names():
    assert runtime.Generator is Generator
