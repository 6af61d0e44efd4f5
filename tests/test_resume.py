"""A run killed at any moment resumes with the same call and ends in the same bytes."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import time
from pathlib import Path

import pytest
import tiny

import topiarist as tp
from topiarist.output import JOURNAL


def contents(folder: Path) -> dict[str, str]:
    """Hashes of every file; only the timings may differ between runs."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
        if path.name != "pruning_run.json"
    }


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tiny.tiny_checkpoint(tmp_path / "base", num_hidden_layers=6)


def run(base: Path, out: Path, **options) -> tp.Report:
    defaults = {"method": "sparsegpt", "pattern": "2:4", "calibration": tiny.tiny_tokens(16, 32), "batch_size": 4}
    return tp.prune(base, out, **(defaults | options))


def run_and_kill(base: Path, out: Path, delay: float) -> bool:
    """Prune in a forked process and SIGKILL it after `delay` seconds. True if it was killed before it finished."""
    pid = os.fork()
    if pid == 0:
        try:
            run(base, out)
            os._exit(0)
        except BaseException:
            os._exit(1)
    time.sleep(delay)
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    assert not os.WIFEXITED(status) or os.WEXITSTATUS(status) == 0, "a resumed run failed"
    return os.WIFSIGNALED(status)


def test_killed_at_random_points_ends_in_the_same_bytes(base: Path, tmp_path: Path):
    run(base, tmp_path / "warm-up")
    started = time.perf_counter()
    run(base, tmp_path / "whole")
    duration = time.perf_counter() - started
    expected = contents(tmp_path / "whole")

    generator, kills, rounds = random.Random(0), 0, 0
    while kills < 20:
        out = tmp_path / f"killed-{rounds}"
        rounds += 1
        # Several kills into one folder, short ones too, so that a resume is itself interrupted.
        for _ in range(5):
            kills += run_and_kill(base, out, generator.uniform(0.02, 1.1) * duration)
        resumed = run(base, out)
        assert contents(out) == expected
        assert len(resumed.layers) == 6 * 7
        assert not (out / JOURNAL).exists()
    assert rounds >= 4


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
