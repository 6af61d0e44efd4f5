"""Legacy sparse checkpoints: files that compressed-tensors 0.9.4 wrote, hand-made vectors, and damaged ones."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, load_file, save_file

from topiarist.core.errors import CheckpointError
from topiarist.runtime import legacy

WRITTEN = json.loads((Path(__file__).parent / "data" / "compressed_tensors_0_9_4.json").read_text())


def expected(case: str) -> torch.Tensor:
    return torch.tensor(WRITTEN[case]["dense"]).to(getattr(torch, case.split()[1]))


def legacy_folder(folder: Path, tensors: dict[str, torch.Tensor], sparsity_format: str, **quantization) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    config = {
        "model_type": "llama",
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "sparsity_config": {"format": sparsity_format, "targets": ["Linear"]},
            **quantization,
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.mark.parametrize("case", WRITTEN)
def test_files_of_the_old_library(case, tmp_path):
    tensors = load(base64.b64decode(WRITTEN[case]["safetensors_base64"]))
    src = legacy_folder(tmp_path / "old", tensors, case.split()[0])
    assert legacy.sparse_format(src) == case.split()[0]
    legacy.convert_legacy(src, tmp_path / "new")
    read = load_file(tmp_path / "new" / "model.safetensors")
    assert read.keys() == {"m.up.weight", "norm.bias"}
    weight = read["m.up.weight"]
    assert weight.dtype == expected(case).dtype and torch.equal(weight.float(), expected(case).float())
    assert json.loads((tmp_path / "new" / "config.json").read_text()) == {"model_type": "llama"}
    assert (tmp_path / "new" / "tokenizer.json").exists()


def by_hand() -> dict[str, torch.Tensor]:
    """[[0, 5, 0, 0, 0, 0, 0, 0, 7], [0] * 9]: bit 1 of the first byte and bit 0 of the second."""
    return {
        "compressed": torch.tensor([5.0, 7.0]),
        "bitmask": torch.tensor([[2, 1], [0, 0]], dtype=torch.uint8),
        "shape": torch.tensor([2, 9]),
        "row_offsets": torch.tensor([0, 2]),
    }


def test_by_hand():
    dense = torch.zeros(2, 9)
    dense[0, 1], dense[0, 8] = 5, 7
    assert torch.equal(legacy.decode(**by_hand()), dense)


def test_parts_in_several_files_and_names_with_weight(tmp_path):
    src = legacy_folder(tmp_path / "old", {"a.weight.compressed": by_hand()["compressed"]}, "sparse-bitmask")
    rest = {f"a.weight.{part}": tensor for part, tensor in by_hand().items() if part != "compressed"}
    save_file(rest | {"b": torch.ones(1)}, src / "model-2.safetensors")
    weight_map = {"a.weight.compressed": "model.safetensors"} | dict.fromkeys([*rest, "b"], "model-2.safetensors")
    (src / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert dict(legacy.read_legacy(src)).keys() == {"a.weight", "b"}


def test_a_quantisation_beside_the_sparsity_stays(tmp_path):
    tensors = {f"a.{part}": tensor for part, tensor in by_hand().items()} | {"a.weight_scale": torch.ones(1)}
    groups = {"group_0": {"weights": {"num_bits": 8, "type": "float"}}}
    src = legacy_folder(tmp_path / "old", tensors, "sparse-bitmask", config_groups=groups, format="float-quantized")
    legacy.convert_legacy(src, tmp_path / "new")
    config = json.loads((tmp_path / "new" / "config.json").read_text())["quantization_config"]
    assert config == {"quant_method": "compressed-tensors", "config_groups": groups, "format": "float-quantized"}
    assert load_file(tmp_path / "new" / "model.safetensors").keys() == {"a.weight", "a.weight_scale"}


@pytest.mark.parametrize("found", ["marlin-24", "dense", None])
def test_other_formats_are_refused(tmp_path, found):
    src = legacy_folder(tmp_path / "old", {"a": torch.ones(1)}, found)
    message = "is in format 'marlin-24'" if found == "marlin-24" else "is not packed, and names no sparse format"
    with pytest.raises(CheckpointError, match=message):
        legacy.convert_legacy(src, tmp_path / "new")


@pytest.mark.parametrize(
    ("part", "wrong", "message"),
    [
        ("compressed", torch.tensor([5.0]), "1 values for 2 bits"),
        ("bitmask", torch.tensor([[2, 1]], dtype=torch.uint8), "does not fit a weight of 2 x 9"),
        ("bitmask", torch.tensor([[2, 0], [1, 0]], dtype=torch.uint8), "row offsets"),
        ("shape", torch.tensor([2, 9, 1]), "too many values"),
        ("shape", None, "lacks its shape"),
        ("bitmask", None, "lacks its bitmask"),
    ],
)
def test_damage(tmp_path, part, wrong, message):
    parts = by_hand() | {part: wrong}
    tensors = {f"a.{name}": tensor for name, tensor in parts.items() if tensor is not None}
    src = legacy_folder(tmp_path / "old", tensors, "sparse-bitmask")
    with pytest.raises(CheckpointError, match=message):
        legacy.convert_legacy(src, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_truncated(tmp_path):
    src = legacy_folder(tmp_path / "old", {f"a.{part}": tensor for part, tensor in by_hand().items()}, "sparse-bitmask")
    file = src / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(CheckpointError, match="truncated"):
        legacy.convert_legacy(src, tmp_path / "new")


def test_no_config(tmp_path):
    with pytest.raises(CheckpointError, match="cannot read"):
        legacy.convert_legacy(tmp_path, tmp_path / "new")
