"""The state of which every process writes its rows: read by another number of processes, refused if damaged, no code run."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import topiarist as tp
from topiarist.pipelines.training.processes import Processes
from topiarist.pipelines.training.sharded_state import LATEST, STATE, ShardedState

WHOLE = {"logits": torch.randn(8, 3), "bits": torch.arange(16, dtype=torch.uint8).view(8, 2), "step": torch.tensor(4)}


class Alone(Processes):
    """One of several processes, as the others would see it, in one process."""

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def on_main(self, work: Callable[[], Any]) -> Any:
        return work()


def rows_of(rank: int, size: int, *, like: bool = False) -> dict[str, torch.Tensor]:
    count = 8 // size
    own = {k: t[rank * count : (rank + 1) * count] if t.ndim else t for k, t in WHOLE.items()}
    return {key: torch.zeros_like(value) for key, value in own.items()} if like else own


def save(folder: Path, size: int, step: int = 4) -> None:
    for rank in range(size):
        ShardedState(folder, Alone(rank, size)).save(step, rows_of(rank, size), {"step": str(step)})


@pytest.mark.parametrize("written", [1, 2, 4])
@pytest.mark.parametrize("read", [1, 2, 8])
def test_any_number_of_processes_reads_what_another_wrote(written: int, read: int, tmp_path: Path):
    save(tmp_path, written)
    for rank in range(read):
        found = rows_of(rank, read, like=True)
        assert ShardedState(tmp_path, Alone(rank, read)).load(found) == {"step": "4"}
        assert all(torch.equal(found[key], value) for key, value in rows_of(rank, read).items())


def test_every_process_tells_why_one_could_not_save(tmp_path: Path):
    class WithAFullDisk(Alone):
        def gather(self, value: Any) -> list[Any]:
            return [value, "No space left on device"]

    with pytest.raises(tp.CheckpointError, match=r"No space left on device \(process 1\); the state before it is kept"):
        ShardedState(tmp_path, WithAFullDisk(0, 2)).save(4, rows_of(0, 2), {})
    assert not (tmp_path / LATEST).exists()


def test_only_the_last_state_stays(tmp_path: Path):
    assert ShardedState(tmp_path, Alone()).load({}) is None
    save(tmp_path, 2, step=4)
    save(tmp_path, 2, step=8)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000008", LATEST]


def test_reading_a_state_runs_no_code(tmp_path: Path):
    class Planted:
        def __reduce__(self):
            return (tmp_path / "executed").touch, ()

    save(tmp_path, 2)
    for folder in (tmp_path, tmp_path / "00000004"):
        (folder / ".metadata").write_bytes(pickle.dumps(Planted()))
    assert ShardedState(tmp_path, Alone()).load(rows_of(0, 1, like=True)) is not None
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / LATEST).write_text("../elsewhere"),
        lambda folder: (folder / "00000004" / STATE).write_text("[1"),
        lambda folder: (folder / "00000004" / STATE).unlink(),
        lambda folder: (folder / "00000004" / "rank-1.safetensors").write_bytes(b"none"),
        lambda folder: (folder / "00000004" / "rank-1.safetensors").unlink(),
    ],
)
def test_a_damaged_state_is_refused_in_one_line(damage: Callable[[Path], Any], tmp_path: Path):
    save(tmp_path, 2)
    damage(tmp_path)
    with pytest.raises(tp.CheckpointError, match=r"delete .* to begin again") as refused:
        ShardedState(tmp_path, Alone()).load(rows_of(0, 1, like=True))
    assert "\n" not in str(refused.value)


def test_a_changed_byte_is_refused_or_changes_nothing(tmp_path: Path):
    save(tmp_path, 2)
    refused = []
    for path in sorted(path for path in tmp_path.rglob("*") if path.is_file()):
        raw = path.read_bytes()
        for place in range(len(raw)):
            path.write_bytes(raw[:place] + bytes([raw[place] ^ 1 << place % 8]) + raw[place + 1 :])
            found = rows_of(0, 1, like=True)
            try:
                assert ShardedState(tmp_path, Alone()).load(found) == {"step": "4"}
                assert all(torch.equal(found[key], value) for key, value in WHOLE.items()), (path, place)
            except tp.CheckpointError as error:
                assert "\n" not in str(error)
                refused.append(path.name)
        path.write_bytes(raw)
    assert {LATEST, STATE, "rank-0.safetensors", "rank-1.safetensors"} == set(refused)


def test_a_failed_save_keeps_the_state_before_it(tmp_path: Path):
    save(tmp_path, 1, step=4)
    (tmp_path / "00000008").write_text("in the way")
    with pytest.raises(tp.CheckpointError, match="the state before it is kept"):
        save(tmp_path, 1, step=8)
    assert ShardedState(tmp_path, Alone()).load(rows_of(0, 1, like=True)) == {"step": "4"}
