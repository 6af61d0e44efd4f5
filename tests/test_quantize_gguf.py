"""GGUF files: read back by the gguf package, and run by llama.cpp where it is installed."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from tiny import tiny_checkpoint, tiny_model, tiny_tokens

import topiarist as tp
from topiarist.checkpoints.dequantised import DequantisedCheckpoint
from topiarist.checkpoints.reading import Checkpoint
from topiarist.core.errors import CheckpointError, QuantizationError, UnsupportedModel
from topiarist.core.grammar import OptionError
from topiarist.pipelines.exporting.gguf_file import export_gguf
from topiarist.quantization import Grid, round_to_nearest
from topiarist.quantization.gguf_blocks import block_scales, q4_0, q8_0

gguf = pytest.importorskip("gguf")


def tensors_of(path):
    return {
        tensor.name: torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        for tensor in gguf.GGUFReader(path).tensors
    }


@pytest.mark.parametrize(("bits", "encode", "raw"), [(8, q8_0, "Q8_0"), (4, q4_0, "Q4_0"), (4, q8_0, "Q8_0")])
def test_blocks_hold_the_very_values(bits, encode, raw):
    weight = torch.randn(6, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    found = round_to_nearest(weight, Grid(bits=bits, group=64))
    rows = encode(found.q, block_scales(found)).numpy()
    values = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[raw])
    assert torch.equal(torch.from_numpy(values), found.q * found.scale.float().repeat_interleave(64, 1))


def test_groups_and_scales_without_a_place_are_said():
    weight = torch.randn(4, 48, generator=torch.Generator().manual_seed(0))
    assert block_scales(round_to_nearest(weight, Grid(bits=8, group=16))) is None
    assert (
        block_scales(round_to_nearest(weight * 1e-3 / 3, Grid(bits=8, group=None))) is None
    )  # fp32 scales do not fit fp16


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_a_checkpoint_comes_back(tmp_path, family):
    source = tiny_checkpoint(tmp_path / "model", family, dtype=torch.bfloat16)
    done = export_gguf(source, tmp_path / "model.gguf")
    assert done.type == "bf16" and not list(tmp_path.glob("*.partial"))
    found, plain = tensors_of(done.path), Checkpoint(source)
    assert len(found) == len(plain.files)
    up = plain.read("model.layers.1.mlp.up_proj.weight").float()
    assert torch.equal(found["blk.1.ffn_up.weight"], up)
    query = plain.read("model.layers.0.self_attn.q_proj.weight").float()
    if family == "llama":  # rows of each head, halves interleaved
        query = query.view(4, 2, -1, query.shape[1]).transpose(1, 2).reshape(query.shape)
    assert torch.equal(found["blk.0.attn_q.weight"], query)
    reader = gguf.GGUFReader(done.path)
    assert reader.fields[f"{gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH[family.upper()]]}.block_count"].contents() == 2
    assert len(reader.fields["tokenizer.ggml.tokens"].contents()) == 260


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3"])
def test_as_much_of_a_head_turns_as_in_transformers(tmp_path, family):
    """A config may state a part, which most models do not heed."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    done = export_gguf(tiny_checkpoint(tmp_path / "model", family, rope_parameters=rope), tmp_path / "model.gguf")
    embeddings = tiny_model(family, rope_parameters=rope).model.rotary_emb
    cosines, _ = embeddings(torch.zeros(1, 1), torch.zeros(1, 1))
    stated = gguf.GGUFReader(done.path).fields[f"{family}.rope.dimension_count"].contents()
    assert stated == cosines.shape[-1] == (4 if family == "phi3" else 8)


def llama_cpp(path, ids: list[int]) -> torch.Tensor:
    """Log-probabilities of the token after `ids` as llama.cpp computes them."""
    llama = pytest.importorskip("xllamacpp")
    about = llama.CommonParams()
    about.model.path, about.n_ctx, about.n_parallel, about.warmup = str(path), 64, 1, False
    about.cpuparams.n_threads = about.cpuparams_batch.n_threads = 1
    # The server leaves out steps whose text is half a character, and one token is one byte here: the bias makes it take
    # a letter. What it reports is from before the bias.
    asked = {"prompt": ids, "n_predict": 1, "temperature": -1.0, "logprobs": 260, "logit_bias": [[68, 1000.0]]}
    (step,) = llama.Server(about).handle_completions(asked)["choices"][0]["logprobs"]["content"]
    found = torch.full((260,), -torch.inf)
    for entry in step["top_logprobs"]:
        found[entry["id"]] = entry["logprob"]
    return found


def llama_cpp_error(path, model) -> float:
    """Relative squared error of llama.cpp's logits; a wrong row or setting gives about 1."""
    ids = torch.randint(3, 259, (1, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model.float()(ids).logits[0, -1].log_softmax(-1)
    found = llama_cpp(path, ids[0].tolist())
    assert bool(torch.isfinite(found).all())
    return float((found - logits).square().sum() / (logits - logits.mean()).square().sum())


def with_a_merge(source):
    """llama.cpp takes no tokenizer without merges."""
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["ab"], tokenizer["model"]["merges"] = 259, [["a", "b"]]
    (source / "tokenizer.json").write_text(json.dumps(tokenizer))
    return source


NORMED = {"norm_topk_prob": True}
"""As the published models of type qwen3_moe have it."""


@pytest.mark.parametrize("family", ["llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "olmo2", "phi3"])
def test_llama_cpp_computes_the_same(tmp_path, family):
    more = NORMED if family == "qwen3_moe" else {}
    source = with_a_merge(tiny_checkpoint(tmp_path / "model", family, dtype=torch.bfloat16, **more))
    done = export_gguf(source, tmp_path / "model.gguf")
    assert len(tensors_of(done.path)) == done.tensors
    # llama.cpp rounds activations to bf16, which routing feels most
    assert llama_cpp_error(done.path, tiny_model(family, dtype=torch.bfloat16, **more)) < 0.05


EIGHT = {"num_attention_heads": 8, "num_key_value_heads": 4}


@pytest.mark.parametrize(
    ("family", "more", "units", "heads", "channels", "name"),
    [
        ("llama", {}, ("channels",), 4, 32, "llama"),
        ("llama", {}, ("kv_groups",), 2, 64, "llama"),
        ("llama", EIGHT, ("kv_groups", "channels"), 6, 40, "llama"),  # saved as mistral: 6 does not divide 32
        ("qwen2", {}, ("kv_groups",), 2, 64, "llama"),  # llama.cpp's qwen2 has heads of full width only
        ("qwen3", {}, ("kv_groups",), 2, 64, "qwen3"),
        ("phi3", {}, ("channels",), 4, 32, "phi3"),
    ],
)
def test_llama_cpp_computes_what_was_cut(tmp_path, family, more, units, heads, channels, name):
    source = with_a_merge(tiny_checkpoint(tmp_path / "model", family, dtype=torch.bfloat16, **more))
    cut = {"method": "magnitude", "keep": 0.7 if more else 0.55, "units": units, "layout": "uniform", "refit": False}
    tp.shrink(source, tmp_path / "cut", data=tiny_tokens(8, 16), batch_size=8, **cut)
    model = tp.load_pruned(tmp_path / "cut")
    size = 32 // more.get("num_attention_heads", 4)
    for type, bound in (("bf16", 0.001), ("q8_0", 0.02)):
        done = export_gguf(tmp_path / "cut", tmp_path / f"{type}.gguf", type=type)
        fields = gguf.GGUFReader(done.path).fields
        keys = ("attention.head_count", "attention.key_length", "attention.value_length", "rope.dimension_count")
        assert [fields[f"{name}.{key}"].contents() for key in keys] == [heads, size, size, size]
        assert fields[f"{name}.feed_forward_length"].contents() == channels
        assert llama_cpp_error(done.path, model) < bound


def test_a_sliding_window_bounds_the_context(tmp_path):
    """llama.cpp has none for these models, and computes the same up to there."""
    source = with_a_merge(tiny_checkpoint(tmp_path / "model", "mistral"))
    done = export_gguf(source, tmp_path / "model.gguf")
    assert gguf.GGUFReader(done.path).fields["llama.context_length"].contents() == 16
    with pytest.raises(KeyError, match="choices"):  # the answer to 40 tokens is an error instead
        llama_cpp(done.path, list(range(3, 43)))


def test_quantised_experts_keep_their_values(tmp_path):
    source = tiny_checkpoint(tmp_path / "model", "qwen3_moe", dtype=torch.bfloat16)
    with pytest.raises(QuantizationError, match="no whole groups"):
        tp.quantize(source, tmp_path / "int8", bits=8)  # rows of 16 weights
    more = {**NORMED, "moe_intermediate_size": 32}
    wide = tiny_checkpoint(tmp_path / "wide", "qwen3_moe", dtype=torch.bfloat16, **more)
    tp.quantize(wide, tmp_path / "int8", bits=8)
    done = export_gguf(tmp_path / "int8", tmp_path / "model.gguf")
    assert (done.type, done.rounded) == ("q8_0", 0) and done.integers > 0
    found, plain = tensors_of(done.path), DequantisedCheckpoint(tmp_path / "int8")
    for index in range(4):
        name = f"model.layers.1.mlp.experts.{index}.down_proj.weight"
        weight = plain.quantized(name)
        values = weight.q * weight.scale.float().repeat_interleave(32, 1)
        assert torch.equal(found["blk.1.ffn_down_exps.weight"][index], values)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_bf16_keeps_values_that_are_bf16(dtype, tmp_path, command):
    """A value is integer times scale, rounded to the scale's dtype: what that has beyond bf16 is lost."""
    source = tiny_checkpoint(tmp_path / "model", dtype=dtype)
    tp.quantize(source, tmp_path / "int8", bits=8)
    code, printed, said = command("export", tmp_path / "int8", tmp_path / "model.gguf", "--type", "bf16")
    found, plain = tensors_of(tmp_path / "model.gguf"), DequantisedCheckpoint(tmp_path / "int8")
    values = plain.read("model.layers.1.mlp.up_proj.weight")
    assert torch.equal(found["blk.1.ffn_up.weight"], values.bfloat16().float())
    same = torch.equal(found["blk.1.ffn_up.weight"], values.float())
    assert code == 0 and same == (dtype == torch.bfloat16)
    told = "keep their very values" if same else "were rounded again: bf16 cannot hold them as they are"
    assert f"14 quantised matrices {told}" in printed + said and "integers" not in printed + said


def test_what_cannot_be_written_is_refused(tmp_path):
    source = tiny_checkpoint(tmp_path / "model", "opt")
    with pytest.raises(UnsupportedModel, match="'opt' are not written as GGUF; llama"):
        export_gguf(source, tmp_path / "a.gguf")
    other = tiny_checkpoint(tmp_path / "gelu", hidden_act="gelu")
    with pytest.raises(UnsupportedModel, match="llama with hidden_act 'gelu' is not written as GGUF"):
        export_gguf(other, tmp_path / "a.gguf")
    narrow = tiny_checkpoint(tmp_path / "narrow", "olmo2", head_dim=4)
    with pytest.raises(UnsupportedModel, match="olmo2 with 4 heads of 4 at width 32 is not written as GGUF"):
        export_gguf(narrow, tmp_path / "a.gguf")
    source = tiny_checkpoint(tmp_path / "llama")
    with pytest.raises(OptionError, match="'q6_k' is not written"):
        export_gguf(source, tmp_path / "a.gguf", type="q6_k")
    for name in ("out.bin", "out", "folder.gguf.tmp"):
        with pytest.raises(CheckpointError, match=r"programs know by its name: call it .*\.gguf$"):
            export_gguf(source, tmp_path / name)
    (tmp_path / "b.gguf").touch()
    with pytest.raises(CheckpointError, match="exists"):
        export_gguf(source, tmp_path / "b.gguf")
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    tokenizer["pre_tokenizer"] = {"type": "Whitespace"}
    (source / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UnsupportedModel, match="BPE after Whitespace"):
        export_gguf(source, tmp_path / "a.gguf")
    for damaged in (tokenizer | {"model": None}, tokenizer | {"added_tokens": [{"id": 0}]}, [], {}):
        (source / "tokenizer.json").write_text(json.dumps(damaged))
        with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be read"):
            export_gguf(source, tmp_path / "a.gguf")
    (source / "tokenizer.json").write_text(json.dumps(tokenizer))
    (source / "tokenizer_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json is not valid JSON"):
        export_gguf(source, tmp_path / "a.gguf")
    (source / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be read"):
        export_gguf(source, tmp_path / "a.gguf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.gguf", "gelu", "llama", "model", "narrow"]


def test_q8_0_of_ordinary_weights_is_the_packages(tmp_path):
    source = tiny_checkpoint(tmp_path / "model")
    done = export_gguf(source, tmp_path / "model.gguf", type="q8_0")
    up = Checkpoint(source).read("model.layers.1.mlp.up_proj.weight")
    raw = gguf.quants.quantize(up.numpy(), gguf.GGMLQuantizationType.Q8_0)
    wanted = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType.Q8_0)
    assert np.array_equal(tensors_of(done.path)["blk.1.ffn_up.weight"].numpy(), wanted)
