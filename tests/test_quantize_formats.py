"""Quantised tensors in files: ours bit for bit, others' against the programs that define them or by hand."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_checkpoint, tiny_model, tiny_tokens

from topiarist.checkpoints.dequantised import DequantisedCheckpoint, readable
from topiarist.checkpoints.reading import Checkpoint
from topiarist.checkpoints.streaming import write_tensors
from topiarist.core.errors import CheckpointError, QuantizationError, UnsupportedModel
from topiarist.quantization import Grid, compressed_tensors, readers, round_to_nearest
from topiarist.quantization.packing import pack, unpack


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def quantised_folder(path, tensors, about):
    path.mkdir()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(
        json.dumps({"model_type": "llama", "dtype": "float32", "quantization_config": about})
    )
    return path


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_words_of_integers_come_back(bits):
    q = torch.randint(0, 1 << bits, (5, 37), generator=torch.Generator().manual_seed(0))
    words = pack(q, bits)
    assert words.shape == (5, -(-37 * bits // 32)) and words.dtype == torch.int32
    assert torch.equal(unpack(words, bits, 37), q.to(torch.int16))
    with pytest.raises(QuantizationError, match="damaged"):
        unpack(words[:, :-1], bits, 37)


@pytest.mark.parametrize("grid", [Grid(bits=b, group=g) for b in (4, 8) for g in (32, None)], ids=str)
def test_our_tensors_are_those_of_compressed_tensors(grid):
    package = pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    weight = round_to_nearest(random(6, 64).bfloat16(), grid)
    tensors = compressed_tensors.to_tensors(weight)
    again = compressed_tensors.from_tensors(tensors, grid.bits)
    assert torch.equal(again.q, weight.q) and torch.equal(again.scale, weight.scale)
    config = compressed_tensors.quantization_config([(["Linear"], grid)], ["lm_head"])
    scheme = package.quantization.QuantizationConfig.model_validate(config).config_groups["group_0"]
    theirs = PackedQuantizationCompressor.decompress(tensors, scheme)["weight"]
    assert torch.equal(theirs, weight.dequantized())
    assert torch.equal(pack_to_int32(weight.q, grid.bits), tensors["weight_packed"])
    dense = readers.from_packed_integers(tensors["weight_packed"], weight.scale, (6, 64))
    assert torch.equal(dense, weight.dequantized())
    with pytest.raises(QuantizationError, match="do not make a matrix"):
        readers.from_packed_integers(tensors["weight_packed"], weight.scale[:, :0], (6, 64))


def test_asymmetric_and_sorted_groups_are_read():
    from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    args = QuantizationArgs(num_bits=4, type="int", symmetric=False, strategy="group", group_size=16)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    state = {
        "weight": random(16, 64),
        "weight_scale": random(16, 4).abs() / 4 + 0.1,
        "weight_zero_point": torch.randint(-8, 8, (16, 4), dtype=torch.int8),
    }
    packed = PackedQuantizationCompressor.compress(state, scheme)
    wanted = PackedQuantizationCompressor.decompress(packed, scheme)["weight"]
    found = readers.from_packed_integers(
        packed["weight_packed"], packed["weight_scale"], (16, 64), packed["weight_zero_point"]
    )
    assert torch.allclose(found, wanted)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    plain = packed["weight_packed"], packed["weight_scale"]
    sorted_groups = readers.from_packed_integers(*plain, (16, 64), None, (order // 16).int())
    q = unpack(plain[0], 4, 64) - 8
    assert torch.equal(sorted_groups, q * plain[1][:, order // 16])


def test_float8_by_tensor_row_and_block():
    weight = random(200, 130).to(torch.float8_e4m3fn)
    blocks = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    dense = readers.from_float8(weight, blocks)
    for i, rows in enumerate((slice(0, 128), slice(128, 200))):
        for j, columns in enumerate((slice(0, 128), slice(128, 130))):
            assert torch.equal(dense[rows, columns], weight.float()[rows, columns] * blocks[i, j])
    rows = random(200).abs()
    assert torch.equal(readers.from_float8(weight, rows[:, None]), weight.float() * rows[:, None])
    assert torch.equal(readers.from_float8(weight, torch.tensor(0.5)), weight.float() / 2)
    with pytest.raises(QuantizationError, match="64 x 64"):
        readers.from_float8(weight, blocks, (64, 64))


def test_mxfp4_is_that_of_transformers():
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (2, 6, 3, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(120, 134, (2, 6, 3), dtype=torch.uint8, generator=generator)
    wanted = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    assert torch.equal(readers.from_mxfp4(blocks, scales).transpose(1, 2), wanted)


def gptq_tensors(weight, scale, zero, group):
    """AutoGPTQ's layout by hand: 4 bits, zero points stored one less than they are."""
    index = torch.arange(weight.shape[1]) // group
    q = (weight / scale[:, index] + zero[:, index]).round().clamp(0, 15)
    tensors = {
        "qweight": pack(q.long(), 4).t().contiguous(),
        "qzeros": pack((zero.t().long() - 1) & 15, 4),
        "scales": scale.t().contiguous(),
        "g_idx": index.int(),
    }
    return tensors, (q - zero[:, index]) * scale[:, index]


def test_a_gptq_folder_reads_as_an_ordinary_one(tmp_path):
    weight, scale = random(16, 64), random(16, 2).abs() / 4 + 0.2
    zero = torch.randint(0, 16, (16, 2), generator=torch.Generator().manual_seed(1)).float()
    tensors, wanted = gptq_tensors(weight, scale, zero, 32)
    stem = "model.layers.0.mlp.up_proj."
    folder = quantised_folder(
        tmp_path / "gptq",
        {stem + end: t for end, t in tensors.items()} | {"model.norm.weight": torch.ones(16)},
        {"quant_method": "gptq", "bits": 4, "group_size": 32},
    )
    checkpoint = readable(folder)
    assert set(checkpoint.files) == {stem + "weight", "model.norm.weight"}
    assert torch.equal(checkpoint.read(stem + "weight"), wanted)
    assert checkpoint.shape(stem + "weight") == (16, 64) and checkpoint.nbytes(stem + "weight") == 4096
    assert "quantization_config" not in checkpoint.config
    stored = {name: checkpoint.stored(name) for name in checkpoint.files}
    write_tensors(tmp_path / "copy.safetensors", stored, lambda name: checkpoint.chunks(name, 100))
    copied = load_file(tmp_path / "copy.safetensors")
    assert torch.equal(copied[stem + "weight"], wanted) and torch.equal(copied["model.norm.weight"], torch.ones(16))


def test_float8_and_mxfp4_folders_read_as_ordinary_ones(tmp_path):
    weight = random(200, 130).to(torch.float8_e4m3fn)
    eight = quantised_folder(
        tmp_path / "fp8",
        {"a.weight": weight, "a.weight_scale_inv": torch.full((2, 2), 0.5)},
        {"quant_method": "fp8", "weight_block_size": [128, 128]},
    )
    assert torch.equal(readable(eight).read("a.weight"), weight.float() / 2)
    blocks = torch.full((2, 6, 3, 16), 0x22, dtype=torch.uint8)
    four = quantised_folder(
        tmp_path / "mxfp4",
        {"m.gate_up_proj_blocks": blocks, "m.gate_up_proj_scales": torch.full((2, 6, 3), 128, dtype=torch.uint8)},
        {"quant_method": "mxfp4"},
    )
    assert torch.equal(readable(four).read("m.gate_up_proj"), torch.full((2, 96, 6), 2.0))
    assert readable(four).shape("m.gate_up_proj") == (2, 96, 6)


def test_what_cannot_be_read_is_refused(tmp_path):
    folder = quantised_folder(tmp_path / "a", {"a.weight": torch.ones(2, 2)}, {"quant_method": "awq"})
    with pytest.raises(UnsupportedModel, match=r"'awq'.*compressed-tensors, fp8, mxfp4, gptq"):
        readable(folder)
    folder = quantised_folder(tmp_path / "b", {"a.weight": torch.ones(2, 2)}, {"quant_method": "gptq"})
    with pytest.raises(CheckpointError, match="no tensor is stored so"):
        readable(folder)
    words = torch.zeros(2, 2, dtype=torch.int32)
    folder = quantised_folder(tmp_path / "c", {"a.weight_packed": words}, {"quant_method": "compressed-tensors"})
    with pytest.raises(CheckpointError, match="weight_scale is missing"):
        readable(folder)


def test_a_dequantised_folder_is_a_checkpoint_like_any_other(tmp_path):
    from topiarist.models import family_of, matrices_of

    grid = Grid(bits=8, group=32)
    plain = Checkpoint(tiny_checkpoint(tmp_path / "plain"))
    tensors = {name: plain.read(name) for name in plain.files}
    names = [name for name in tensors if "_proj" in name]
    for name in names:
        packed = compressed_tensors.to_tensors(round_to_nearest(tensors.pop(name), grid))
        tensors |= {name.removesuffix("weight") + end: t for end, t in packed.items()}
    about = compressed_tensors.quantization_config([(["Linear"], grid)], ["lm_head"])
    folder = tmp_path / "quantised"
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(plain.config | {"quantization_config": about}))
    found = readable(folder)
    assert isinstance(found, DequantisedCheckpoint) and set(found.files) == set(plain.files)
    assert [found.shape(n) for n in names] == [plain.shape(n) for n in names]
    assert found.weight_bytes() == sum(plain.nbytes(n) for n in plain.files)
    for name in names:
        weight = found.quantized(name)
        assert weight is not None and torch.equal(weight.dequantized(), found.read(name))
    model = tiny_model()
    assert {f"model.layers.0.{m.name}.weight" for m in matrices_of(model.model.layers[0], family_of(model))} <= set(
        names
    )

    from transformers import AutoModelForCausalLM

    pytest.importorskip("compressed_tensors")
    opened = AutoModelForCausalLM.from_pretrained(folder)
    model.load_state_dict({name: found.read(name) for name in found.files}, strict=False)
    tokens = tiny_tokens(2, 16)
    with torch.no_grad():
        assert torch.allclose(opened(tokens).logits, model(tokens).logits, atol=1e-4)
