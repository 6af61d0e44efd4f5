"""Packed folders of integers: every form bit for bit, what a model made of one computes, and quantised folders of others."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_runtime_integers import integers
from tiny import tiny_checkpoint, tiny_tokens

from topiarist import runtime
from topiarist.core.compiled import NoKernels
from topiarist.core.errors import CheckpointError, TopiaristError
from topiarist.core.patterns import NM
from topiarist.quantization.grid import Grid, QuantizedWeight
from topiarist.runtime import packed
from topiarist.runtime.build import load_kernels
from topiarist.runtime.entries import pack_integers, restore, store, unpack_integers
from topiarist.runtime.linear import QuantisedEmbedding, QuantisedLinear


class Opened(dict):
    """An open file: tensors by name."""

    get_tensor = dict.__getitem__

    def get_slice(self, name):
        return SimpleNamespace(get_shape=lambda: list(self[name].shape))


@settings(deadline=None, max_examples=150)
@given(
    rows=st.integers(1, 9),
    fours=st.integers(1, 11),
    ragged=st.sampled_from([0, 0, 1, 3]),
    bits=st.sampled_from([8, 4]),
    zeros=st.sampled_from(["none", "2:4", "0.5", "0.7", "1"]),
    seed=st.integers(0, 1000),
)
def test_every_form_is_exact(rows, fours, ragged, bits, zeros, seed):
    codes, scales = integers(
        rows, 4 * fours + (ragged if zeros != "2:4" else 0), bits, zeros, 1, torch.bfloat16, seed=seed
    )
    weight = QuantizedWeight(codes, scales, Grid(bits=bits, group=None))
    parts, entry = store("a", weight)
    back = restore(Opened(parts), "a", entry)
    assert torch.equal(back.q, codes) and torch.equal(back.scale, scales) and back.grid.bits == bits
    for part in filter(torch.Tensor.numel, parts.values()):
        part.view(torch.uint8)[..., 0] ^= 1
        with pytest.raises(ValueError, match="checksum"):
            restore(Opened(parts), "a", entry)
        part.view(torch.uint8)[..., 0] ^= 1


@pytest.mark.parametrize(
    ("zeros", "bits", "form", "size"),
    [("none", 8, "dense", 1.0), ("none", 4, "dense", 0.5), ("2:4", 8, "six", 0.584), ("2:4", 4, "six", 0.334),
     ("0.7", 8, "bitmask", 0.425), ("0.7", 4, "bitmask", 0.275)],
)  # fmt: skip
def test_bytes_a_weight(zeros, bits, form, size):
    codes, _ = integers(256, 768, bits, zeros, 1, torch.bfloat16)
    found, parts = pack_integers(codes, bits)
    assert found == form
    assert sum(part.nbytes for part in parts.values()) / codes.numel() == pytest.approx(size, rel=0.08)


def test_parts_that_do_not_belong_together():
    codes, _ = integers(4, 16, 4, "0.5", 1, torch.bfloat16)
    form, parts = pack_integers(codes, 4)
    with pytest.raises(ValueError, match="bytes of values"):
        unpack_integers(form, (4, 16), parts["values"][:-1], parts["index"], 4)
    with pytest.raises(ValueError, match="does not fit"):
        unpack_integers(form, (4, 24), parts["values"], parts["index"], 4)
    with pytest.raises(ValueError, match="pair that does not exist"):
        unpack_integers("six", (4, 16), torch.zeros(32), torch.full((6,), 255, dtype=torch.uint8), 4)


@pytest.fixture
def folder(tmp_path):
    """A 2:4 model with tied embeddings and biases."""
    path = tiny_checkpoint(
        tmp_path / "model", "llama", hidden_size=64, intermediate_size=128, tie_word_embeddings=True, attention_bias=True,
        dtype=torch.bfloat16,
    )  # fmt: skip
    state = load_file(path / "model.safetensors")
    for name, tensor in state.items():
        if "proj.weight" in name:
            tensor *= NM(2, 4).mask(tensor.abs().float())
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    return path


def compiled() -> bool:
    try:
        load_kernels()
    except NoKernels:
        return False
    return True


@pytest.mark.parametrize("values", ["int8", "int4"])
def test_a_folder_is_rounded_and_runs_packed(folder, tmp_path, values):
    out = tmp_path / "packed"
    report = runtime.pack_folder(folder, out, values=values, group=32, head="int8")
    assert report.num_packed == 15 and report.ratio < (0.36 if values == "int8" else 0.26)
    dense = runtime.from_packed(out)
    bits = 8 if values == "int8" else 4
    mask = load_file(folder / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    weight = dense.model.layers[0].mlp.up_proj.weight
    assert NM(2, 4).holds(weight != 0) and not weight[mask == 0].any()
    if not compiled():
        return
    model = runtime.load_model(out)
    linears = [module for module in model.modules() if isinstance(module, QuantisedLinear)]
    assert len(linears) == 15 and {linear.bits for linear in linears} == {8, bits}
    assert isinstance(model.get_input_embeddings(), QuantisedEmbedding)
    assert model.lm_head is model.get_input_embeddings().table, "tied"
    dense_state, state = dense.state_dict(), model.state_dict()
    assert dense_state.keys() == state.keys()
    assert all(torch.equal(dense_state[name], state[name]) for name in state)
    ids = tiny_tokens(2, 16)
    with torch.inference_mode():
        for linear in linears:
            linear.max_batch = 0  # panels compute what dense weights do
        error = (model(ids).logits - dense(ids).logits).float().norm() / dense(ids).logits.float().norm()
    assert error < 0.03, "the rounding of bf16 alone"
    generator = runtime.Generator(model)
    assert not generator.reason and generator.generate(ids, 4).shape == (2, 4)


@pytest.mark.skipif(not compiled(), reason="no C++ compiler")
def test_embeddings_of_ids_in_any_layout():
    """The last token of every text is a column of a table: its ids lie apart."""
    codes, scales = integers(40, 64, 8, "none", 1, torch.bfloat16)
    embeddings = QuantisedEmbedding(QuantisedLinear(codes, scales, 8))
    ids = torch.randint(40, (3, 5), generator=torch.Generator().manual_seed(0))
    for wanted in (ids, ids[:, -1:], ids[:, 2], ids.T, ids.int(), ids[:0]):
        assert torch.equal(embeddings(wanted), embeddings.weight[wanted])
    for wrong in (-1, 40):
        with pytest.raises(IndexError, match="a table of 40 rows"):
            embeddings(torch.tensor([[wrong, 3]]))


@pytest.mark.parametrize("values", [None, "int8"])
def test_a_packed_model_has_the_dtypes_and_the_ends_of_its_folder(folder, tmp_path, values):
    """Norms in fp32 beside matrices in bf16, and a chat model's own ends: as transformers opens the folder."""
    state = load_file(folder / "model.safetensors")
    state = {name: tensor.float() if "norm" in name else tensor for name, tensor in state.items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 77], "pad_token_id": 5}')
    runtime.pack_folder(folder, tmp_path / "packed", values=values)
    expected, ids = runtime.from_packed(tmp_path / "packed"), tiny_tokens(2, 8)
    model = runtime.load_model(tmp_path / "packed")
    assert model.generation_config.eos_token_id == expected.generation_config.eos_token_id == [2, 77]
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    for linear in model.modules():
        if isinstance(linear, QuantisedLinear):
            linear.max_batch = 0  # panels compute what dense weights do
    error = (model(ids).logits - expected(ids).logits).float().norm() / expected(ids).logits.float().norm()
    assert error < 0.03 if values else error == 0


@pytest.mark.parametrize(
    ("values", "change", "message"),
    [(values, change, message) for values in (None, "int8") for change, message in (
        ({"num_hidden_layers": 3}, "lacks model.layers.2"), ({"intermediate_size": 96}, "config.json asks for .*96"))],
)  # fmt: skip
def test_a_config_of_another_model_is_refused(folder, tmp_path, values, change, message):
    runtime.pack_folder(folder, tmp_path / "packed", values=values)
    config = json.loads((tmp_path / "packed/config.json").read_text())
    (tmp_path / "packed/config.json").write_text(json.dumps(config | change))
    for load in (runtime.load_model, runtime.from_packed):
        with pytest.raises(CheckpointError, match=message):
            load(tmp_path / "packed")


@pytest.mark.parametrize(
    ("options", "message"),
    [(("int2", 64), "int8 or int4"), (("int8", 64, "int4"), "take int8"), (("int8", 0), "group is 0"),
     (("int8", -5), "group is -5")],
)  # fmt: skip
def test_roundings_that_there_are_not(options, message):
    with pytest.raises(TopiaristError, match=message):
        packed.check_rounding(*options)


def test_unpacking_gives_the_dense_weights(folder, tmp_path):
    runtime.pack_folder(folder, tmp_path / "packed", values="int4", group=64)
    runtime.unpack_folder(tmp_path / "packed", tmp_path / "back")
    back, before = load_file(tmp_path / "back/model.safetensors"), load_file(folder / "model.safetensors")
    assert back.keys() == before.keys()
    contents = dict(packed.read_contents(tmp_path / "packed"))
    for name, tensor in back.items():
        content = contents[name]
        expected = content.dequantized() if isinstance(content, QuantizedWeight) else before[name]
        assert torch.equal(tensor, expected)
    assert isinstance(contents["model.layers.0.mlp.up_proj.weight"], QuantizedWeight)
    assert isinstance(contents["model.embed_tokens.weight"], torch.Tensor), "embeddings only if asked"


def test_a_quantised_folder_keeps_its_integers(folder, tmp_path):
    """compressed-tensors' layout: three tensors a matrix become one, and the config says no more of it."""
    from topiarist.quantization.compressed_tensors import quantization_config, to_tensors
    from topiarist.quantization.grid import round_to_nearest

    grid, name = Grid(bits=4, group=32), "model.layers.0.mlp.up_proj"
    state = load_file(folder / "model.safetensors")
    weight = round_to_nearest(state.pop(f"{name}.weight"), grid)
    state |= {f"{name}.{end}": part for end, part in to_tensors(weight).items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = quantization_config([(["Linear"], grid)], ["lm_head"])
    (folder / "config.json").write_text(json.dumps(config))
    runtime.pack_folder(folder, tmp_path / "packed")
    content = dict(packed.read_contents(tmp_path / "packed"))[f"{name}.weight"]
    assert torch.equal(content.q, weight.q) and torch.equal(content.scale, weight.scale)
    assert "quantization_config" not in json.loads((tmp_path / "packed/config.json").read_text())
    loaded = runtime.from_packed(tmp_path / "packed")
    assert torch.equal(loaded.model.layers[0].mlp.up_proj.weight, weight.dequantized())


def test_a_model_that_transformers_does_not_know(folder, tmp_path):
    (folder / "config.json").write_text('{"model_type": "nothing"}')
    with pytest.raises(CheckpointError, match=r"cannot build a model|no causal LM"):
        runtime.pack_folder(folder, tmp_path / "packed", values="int8")
    assert not (tmp_path / "packed").exists()


def test_the_command(command, folder, tmp_path):
    code, said, _ = command("pack", folder, tmp_path / "packed", "--values", "int4", "--group", 64, "--head", "int8")
    assert code == 0 and "15 of " in said
    code, _, said = command("pack", folder, tmp_path / "more", "--values", "int5")
    assert code == 2 and not (tmp_path / "more").exists()
    code, text, _ = command("generate", tmp_path / "packed", "--prompt", "ab", "-n", 3)
    assert code == 0 and text
