"""`inspect --verify`: weights that came back are found and counted, by pattern and by mask, quantised or not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

import topiarist as tp
from topiarist import verify
from topiarist.masks import save_masks

UP = "model.layers.1.mlp.up_proj"


@pytest.fixture
def pruned(tmp_path: Path) -> Path:
    tiny.tiny_checkpoint(tmp_path / "base")
    tp.prune(tmp_path / "base", tmp_path / "out", method="magnitude", calibration=tiny.tiny_tokens(4, 16))
    return tmp_path / "out"


def edit(folder: Path, name: str, change) -> None:
    """Rewrite one tensor; `change` edits it in place or returns another."""
    shard = next(p for p in folder.glob("*.safetensors") if p.name.startswith("model") and name in load_file(p))
    tensors = load_file(shard)
    changed = change(tensors[name])
    tensors[name] = tensors[name] if changed is None else changed
    save_file(tensors, shard, metadata={"format": "pt"})


def fill_first_row(weight: torch.Tensor) -> None:
    weight[0] = 1.0


def empty_the_rest(weight: torch.Tensor) -> None:
    weight[4:] = 0.0


def write_masks(folder: Path) -> Path:
    """masks.safetensors of a pruned folder, as learning would have left it."""
    weights = {name: t for p in folder.glob("model*.safetensors") for name, t in load_file(p).items()}
    wanted = {
        f"{name}.weight" for name in json.loads((folder / "config.json").read_text())["pruning_config"]["modules"]
    }
    masks = {name: t != 0 for name, t in weights.items() if name in wanted}
    save_masks(folder / "masks.safetensors", masks, weights=weights, pattern="2:4", base_model="base")
    return folder / "masks.safetensors"


def fill_row(weight: torch.Tensor) -> None:
    weight[3] = 1.0


def test_what_was_pruned_holds(pruned: Path, command):
    found = verify(pruned)
    assert found.holds and (found.patterns, found.masks) == (14, 0)
    write_masks(pruned)
    found = verify(pruned)
    assert found.holds and (found.patterns, found.masks) == (14, 14), "masks beside the model are held too"
    code, printed, _ = command("inspect", str(pruned), "--verify")
    assert code == 0 and "14 patterns and 14 masks: held" in printed


def test_weights_that_came_back_are_counted_and_named(pruned: Path, command):
    masks = write_masks(pruned)
    edit(pruned, f"{UP}.weight", fill_row)
    by_pattern, by_mask = verify(pruned, masks).breaches
    assert (by_pattern.name, by_pattern.came_back, by_pattern.against) == (UP, 16, "2:4")
    assert "1 of 64 rows" in by_pattern.where and "row 3, columns 0-3" in by_pattern.where
    assert (by_mask.name, by_mask.came_back, by_mask.of) == (f"{UP}.weight", 16, 64 * 16)
    assert "first at [3, " in by_mask.where
    code, printed, _ = command("inspect", str(pruned), "--verify")
    assert code == 1 and f"{UP}: 16 of 1,024 weights came back against 2:4" in printed
    code, printed, _ = command("inspect", str(pruned), "--verify", "--json")
    assert code == 1 and json.loads(printed)["holds"] is False


def test_a_moved_mask_breaks_though_the_pattern_holds(pruned: Path):
    masks = write_masks(pruned)
    edit(pruned, f"{UP}.weight", lambda weight: weight.roll(4, dims=1).contiguous())
    found = verify(pruned, masks)
    assert {breach.against for breach in found.breaches} == {"its mask"} and not found.holds


@pytest.mark.parametrize(
    ("pattern", "says"), [("0.7", "weights are not zero"), ("0.7/row", "1 of 64 rows, first in row 3")]
)
def test_unstructured_patterns(tmp_path: Path, pattern: str, says: str):
    tiny.tiny_checkpoint(tmp_path / "base")
    out = tmp_path / "out"
    tp.prune(tmp_path / "base", out, method="magnitude", pattern=pattern, calibration=tiny.tiny_tokens(4, 16))
    assert verify(out).holds
    zeros = []

    def fill(weight: torch.Tensor) -> None:
        zeros.append(int((weight[3] == 0).sum()))
        weight[3] = 1.0

    edit(out, f"{UP}.weight", fill)
    (breach,) = verify(out).breaches
    assert breach.came_back == zeros[0] and says in breach.where


def quantise(folder: Path, dtype: torch.dtype, extra: dict[str, torch.Tensor] | None = None) -> None:
    """Store the matrix as a quantiser would, and say so in the config."""
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "compressed-tensors"}
    (folder / "config.json").write_text(json.dumps(config))
    for name in config["pruning_config"]["modules"]:
        edit(
            folder, f"{name}.weight", lambda weight: (weight * 100).to(dtype) if dtype != torch.int8 else _int8(weight)
        )
    if extra:
        (shard,) = folder.glob("model*.safetensors")
        save_file({**load_file(shard), **extra}, shard, metadata={"format": "pt"})


def _int8(weight: torch.Tensor) -> torch.Tensor:
    return (weight / weight.abs().amax(1, keepdim=True) * 127).round().to(torch.int8)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantised_weights(pruned: Path, dtype: torch.dtype):
    masks = write_masks(pruned)
    quantise(pruned, dtype)
    assert verify(pruned, masks).holds
    edit(pruned, f"{UP}.weight", lambda weight: torch.ones_like(weight.float()).to(dtype))
    assert {b.name for b in verify(pruned, masks).breaches} == {UP, f"{UP}.weight"}


def test_what_cannot_be_seen_is_neither_held_nor_broken(pruned: Path, command):
    quantise(pruned, torch.int8, {f"{UP}.weight_zero_point": torch.ones(64, 1)})
    found = verify(pruned)
    assert not found.breaches and not found.holds and "zero point" in found.unread[UP]
    edit(pruned, f"{UP}.weight", lambda weight: torch.zeros(1024, 1, dtype=torch.uint8))
    assert verify(pruned).unread == {UP: "cannot look into compressed-tensors weights (uint8)"}
    code, printed, _ = command("inspect", str(pruned), "--verify")
    assert code == 2 and "unseen in 1 tensors" in printed and f"first {UP}: cannot look into" in printed
    code, printed, _ = command("inspect", str(pruned))
    assert code == 0 and "1 matrices are unseen" in printed and "50.00% zeros in 13 matrices" in printed


def as_gptq(folder: Path) -> None:
    """What GPTQ leaves: qweight instead of weight."""
    for shard in folder.glob("model*.safetensors"):
        tensors = load_file(shard)
        renamed = {k.replace("proj.weight", "proj.qweight"): t.int() if "proj" in k else t for k, t in tensors.items()}
        save_file(renamed, shard, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))


def test_weights_quantised_by_others_are_unseen(pruned: Path, command):
    as_gptq(pruned)
    found = verify(pruned)
    assert not found.breaches and set(found.unread) == set(tp.audit(pruned)[0]["modules"])
    assert found.unread[UP] == f"cannot look into gptq weights ({UP}.qweight)"
    code, printed, _ = command("inspect", str(pruned))
    assert code == 0 and "14 matrices are unseen" in printed and "gptq" in printed
    tiny.tiny_text(pruned.parent)
    code, _, error = command("eval", str(pruned), "--text", str(pruned.parent / "text.txt"), "--window", "32")
    assert code == 2 and "quantised" in error and len(error.strip().splitlines()) <= 2


def test_a_type_without_a_row_is_looked_at_by_its_files(pruned: Path, command):
    """Also one that this transformers does not know at all."""
    before = [(m.name, m.sparsity, m.holds) for m in tp.audit(pruned)[1]]
    config = json.loads((pruned / "config.json").read_text())
    (pruned / "config.json").write_text(json.dumps(config | {"model_type": "brand_new"}))
    assert sorted(before) == sorted((m.name, m.sparsity, m.holds) for m in tp.audit(pruned)[1])
    assert verify(pruned).holds
    edit(pruned, f"{UP}.weight", fill_row)
    assert [breach.name for breach in verify(pruned).breaches] == [UP]
    assert command("inspect", str(pruned))[0] == 0


def test_nothing_to_verify(pruned: Path, tmp_path: Path, command):
    code, _, error = command("inspect", str(tmp_path / "base"), "--verify")
    assert code == 2 and "claims no pattern" in error and "--masks" in error
    masks = write_masks(pruned)
    code, printed, _ = command("inspect", str(tmp_path / "base"), "--masks", str(masks))
    assert code == 1 and "14 masks: broken in 14 tensors" in printed
    code, _, error = command("inspect", str(pruned), "--masks", "nowhere.safetensors")
    assert code == 2 and "does not exist" in error


def test_transposable_groups_that_hold_too_many_are_counted(tmp_path: Path):
    tiny.tiny_checkpoint(tmp_path / "base")
    tp.prune(tmp_path / "base", tmp_path / "out", method="magnitude", pattern="2:4/transposable")
    edit(tmp_path / "out", f"{UP}.weight", fill_first_row)
    edit(tmp_path / "out", f"{UP}.weight", empty_the_rest)  # fewer weights than it may have
    (breach,) = verify(tmp_path / "out").breaches
    assert breach.came_back == 32 // 4 * 2 and "8 groups of rows and 16 of columns keep more than 2" in breach.where
