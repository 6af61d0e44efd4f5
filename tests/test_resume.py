"""A run killed at any moment resumes with the same call and ends in the same bytes."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
from killing import Killed, assert_kills_change_nothing, contents

import topiarist as tp
from topiarist.checkpoints.writing import JOURNAL, OutputFolder


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tiny.tiny_checkpoint(tmp_path / "base", num_hidden_layers=6)


def run(base: Path, out: Path, **options) -> tp.Report:
    defaults = {"method": "sparsegpt", "pattern": "2:4", "calibration": tiny.tiny_tokens(16, 32), "batch_size": 4}
    return tp.prune(base, out, **(defaults | options))


@pytest.mark.slow
def test_killed_at_random_points_ends_in_the_same_bytes(base: Path, tmp_path: Path):
    assert_kills_change_nothing(lambda out: run(base, out), tmp_path, kills=20, each=5)
    assert not list(tmp_path.glob(f"*/{JOURNAL}"))
    assert len(run(base, tmp_path / "killed-0").layers) == 6 * 7


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
def test_another_recipe_is_refused_and_the_difference_named(
    base: Path, tmp_path: Path, change, named: str, finished, monkeypatch
):
    out = tmp_path / "out"
    if finished:
        run(base, out)
    else:
        interrupted(base, out, 2, monkeypatch)
    before = contents(out)
    with pytest.raises(tp.CheckpointError, match=f"holds another run: .*{named}"):
        run(base, out, **change)
    assert contents(out) == before


def test_another_model_is_refused(base: Path, tmp_path: Path):
    run(base, tmp_path / "out")
    tiny.tiny_checkpoint(tmp_path / "base", num_hidden_layers=6, seed=3)
    with pytest.raises(tp.CheckpointError, match="model was"):
        run(base, tmp_path / "out")


def test_a_damaged_finished_block_is_done_again(base: Path, tmp_path: Path, monkeypatch):
    expected = contents(run_folder(base, tmp_path / "whole"))
    out = tmp_path / "out"
    interrupted(base, out, 5, monkeypatch)
    shard = sorted(out.rglob("*.safetensors"))[3]
    raw = bytearray(shard.read_bytes())
    raw[-5] ^= 0xFF
    shard.write_bytes(raw)
    assert contents(run_folder(base, out)) == expected


def interrupted(base: Path, out: Path, blocks: int, monkeypatch) -> None:
    """Run, and stop when `blocks` are written."""

    def counted(self: OutputFolder, tensors, info) -> None:
        if len(self.blocks) == blocks:
            raise Killed
        write_block(self, tensors, info)

    write_block = OutputFolder.write_block
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(OutputFolder, "write_block", counted)
        run(base, out)


def run_folder(base: Path, out: Path) -> Path:
    run(base, out)
    return out
