"""A run killed at any moment resumes with the same call and ends in the same bytes."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import tiny
from killing import assert_kills_change_nothing, contents

import topiarist as tp
from topiarist.checkpoints.writing import JOURNAL


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tiny.tiny_checkpoint(tmp_path / "base", num_hidden_layers=6)


def run(base: Path, out: Path, **options) -> tp.Report:
    defaults = {"method": "sparsegpt", "pattern": "2:4", "calibration": tiny.tiny_tokens(16, 32), "batch_size": 4}
    return tp.prune(base, out, **(defaults | options))


def test_killed_at_random_points_ends_in_the_same_bytes(base: Path, tmp_path: Path):
    assert_kills_change_nothing(lambda out: run(base, out), tmp_path, kills=20, each=5)
    assert not list(tmp_path.glob(f"*/{JOURNAL}"))
    assert len(run(base, tmp_path / "killed-0").layers) == 6 * 7


def test_a_finished_run_is_not_done_again(base: Path, tmp_path: Path):
    first = run(base, tmp_path / "out")
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    again = run(base, tmp_path / "out")
    assert again.to_dict() == first.to_dict()
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"pattern": "4:8"}, "patterns"),
        ({"method": "wanda"}, "method"),
        ({"calibration": tiny.tiny_tokens(16, 32, seed=1)}, "calibration"),
        ({"method": tp.solvers.SparseGPT(damping=0.1)}, "damping"),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_another_recipe_is_refused_and_the_difference_named(base: Path, tmp_path: Path, change, named: str, finished):
    out = tmp_path / "out"
    run(base, out)
    if not finished:
        interrupted(out)
    before = contents(out)
    with pytest.raises(tp.CheckpointError, match=f"holds another run: .*{named}"):
        run(base, out, **change)
    assert contents(out) == before


def test_another_model_is_refused(base: Path, tmp_path: Path):
    run(base, tmp_path / "out")
    tiny.tiny_checkpoint(tmp_path / "base", num_hidden_layers=6, seed=3)
    with pytest.raises(tp.CheckpointError, match="model was"):
        run(base, tmp_path / "out")


def test_a_damaged_finished_shard_is_done_again(base: Path, tmp_path: Path):
    expected = contents(run_folder(base, tmp_path / "whole"))
    out = run_folder(base, tmp_path / "out")
    interrupted(out)
    shard = sorted(out.glob("model-*.safetensors"))[3]
    raw = bytearray(shard.read_bytes())
    raw[-5] ^= 0xFF
    shard.write_bytes(raw)
    assert contents(run_folder(base, out)) == expected


def run_folder(base: Path, out: Path) -> Path:
    run(base, out)
    return out


def interrupted(out: Path) -> None:
    """Turn a finished folder back into one that was killed before its last block."""
    import json

    report = json.loads((out / "pruning_report.json").read_text())
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    shards = sorted(set(index.values()))
    lines = [report["fingerprint"]]
    for shard in shards[:-1]:
        names = [name for name, file in index.items() if file == shard]
        block = {name.split(".")[2] for name in names if ".layers." in name}
        layers = [layer for layer in report["layers"] if layer["name"].split(".")[2] in block]
        digest = hashlib.sha256((out / shard).read_bytes()).hexdigest()
        sizes = {name: size_of(out / shard, name) for name in names}
        lines.append(
            {"file": shard, "sha256": digest, "tensors": sizes, "layers": layers, "warnings": [], "refined": []}
        )
    for path in out.iterdir():
        if path.name not in shards[:-1]:
            path.unlink()
    (out / JOURNAL).write_text("".join(json.dumps(line) + "\n" for line in lines))


def size_of(path: Path, name: str) -> int:
    from safetensors import safe_open

    with safe_open(path, "pt") as reader:
        return reader.get_tensor(name).nbytes
