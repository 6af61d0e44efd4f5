"""GGUF files: read back by the gguf package, and run by llama.cpp where it is installed."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from tiny import tiny_checkpoint

from topiarist.checkpoints.reading import Checkpoint
from topiarist.core.errors import CheckpointError, UnsupportedModel
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


def test_what_cannot_be_written_is_refused(tmp_path):
    source = tiny_checkpoint(tmp_path / "model", "gpt2")
    with pytest.raises(UnsupportedModel, match="'gpt2' are not written as GGUF; llama"):
        export_gguf(source, tmp_path / "a.gguf")
    source = tiny_checkpoint(tmp_path / "llama")
    with pytest.raises(OptionError, match="'q6_k' is not written"):
        export_gguf(source, tmp_path / "a.gguf", type="q6_k")
    (tmp_path / "b.gguf").touch()
    with pytest.raises(CheckpointError, match="exists"):
        export_gguf(source, tmp_path / "b.gguf")
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    tokenizer["pre_tokenizer"] = {"type": "Whitespace"}
    (source / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UnsupportedModel, match="BPE after Whitespace"):
        export_gguf(source, tmp_path / "a.gguf")
    (source / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be read"):
        export_gguf(source, tmp_path / "a.gguf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.gguf", "llama", "model"]


def test_q8_0_of_ordinary_weights_is_the_packages(tmp_path):
    source = tiny_checkpoint(tmp_path / "model")
    done = export_gguf(source, tmp_path / "model.gguf", type="q8_0")
    up = Checkpoint(source).read("model.layers.1.mlp.up_proj.weight")
    raw = gguf.quants.quantize(up.numpy(), gguf.GGMLQuantizationType.Q8_0)
    wanted = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType.Q8_0)
    assert np.array_equal(tensors_of(done.path)["blk.1.ffn_up.weight"].numpy(), wanted)
