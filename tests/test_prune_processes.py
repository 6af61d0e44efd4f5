"""Pruning divided among processes writes the bytes that one process writes, also where some of them are killed."""

from __future__ import annotations

import copy
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from killing import contents
from several import run_in, start_command

import topiarist as tp
from topiarist.cli import together

pytestmark = pytest.mark.distributed


def prune(base: Path, out: Path, **options: Any) -> tp.Report:
    defaults: dict[str, Any] = {"pattern": "2:4", "data": tiny.tiny_tokens(20, 32), "batch_size": 2}
    return tp.prune(base, out, **(defaults | options))


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "sparsegpt": ("llama", {"method": "sparsegpt", "true_sequential": True}),
    "alps": ("llama", {"method": "alps", "pattern": "0.6", "allocation": "owl"}),
    "search": ("llama", {"method": "wanda", "pattern": "0.6", "allocation": "search:generations=2,sequences=2"}),
    "correct": ("llama", {"method": "sparsegpt", "correct": tp.Correct(), "batch_size": 1}),
    "refine": ("llama", {"method": "wanda", "refine": tp.Refine(epochs=2)}),
    "steps of four": (
        "llama",
        {"method": "wanda", "refine": tp.Refine(target="current", accumulate=4), "batch_size": 1},
    ),
    "steps of three, experts": (
        "mixtral",
        {
            "method": "wanda",
            "refine": tp.Refine(epochs=1, accumulate=3),
            "batch_size": 1,
            "data": tiny.tiny_tokens(12, 3),
        },
    ),
    "sparsellm": ("llama", {"method": tp.SparseLLM(epochs=2)}),
    "sparsellm, all windows fit": ("opt", {"method": tp.SparseLLM(epochs=1, held_out=0.0), "pattern": "0.6"}),
    "sparsellm, refined": ("llama", {"method": "sparsellm:epochs=1,target=dense", "refine": tp.Refine(epochs=1)}),
    "gpt2": ("gpt2", {"method": "wanda"}),
    "experts": ("mixtral", {"method": "alps"}),  # some processes do not reach them all
    "few tokens": ("mixtral", {"method": "wanda", "batch_size": 1, "data": tiny.tiny_tokens(4, 4)}),  # or none does
}


@pytest.mark.parametrize("case", CASES)
def test_any_number_of_processes_writes_the_same_bytes(case: str, tmp_path: Path):
    family, options = CASES[case]
    base = tiny.tiny_checkpoint(tmp_path / "base", family)
    prune(base, tmp_path / "1", **options)
    expected = contents(tmp_path / "1")
    for size in (2, 4):
        assert run_in(size, lambda _: prune(base, tmp_path / str(size), **options)) == {}  # noqa: B023
        assert contents(tmp_path / str(size)) == expected, size


def test_quantising_divides_as_well(tmp_path: Path):
    base = tiny.tiny_checkpoint(tmp_path / "base")
    options = {"bits": 8, "group": 32, "data": tiny.tiny_tokens(20, 32), "batch_size": 2}
    tp.quantize(base, tmp_path / "1", **options)
    assert run_in(2, lambda _: tp.quantize(base, tmp_path / "2", **options)) == {}
    assert contents(tmp_path / "2") == contents(tmp_path / "1")


def test_an_object_becomes_the_same_in_all(tmp_path: Path):
    model = tiny.tiny_model()
    options: dict[str, Any] = {"method": "sparsegpt", "data": tiny.tiny_tokens(20, 32), "batch_size": 2}
    pruned = copy.deepcopy(model)
    tp.prune(pruned, tmp_path / "1", **options)

    def work(_: int) -> None:
        tp.prune(model, tmp_path / "2", **options)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), pruned.parameters(), strict=True))

    assert run_in(2, work) == {}
    assert contents(tmp_path / "2") == contents(tmp_path / "1")


def wait_for_watch(workers: list[Any]) -> None:
    """Until every process has a second thread: one that dies before is torchrun's to notice."""
    until = time.monotonic() + 600
    while time.monotonic() < until and any(len(list(Path(f"/proc/{w.pid}/task").iterdir())) < 2 for w in workers):
        time.sleep(0.01)


KILLS = int(os.environ.get("KILLS", "3"))


def test_any_process_may_be_killed_at_any_moment(tmp_path: Path):
    base = tiny.tiny_checkpoint(tmp_path / "base", num_hidden_layers=4)
    tiny.tiny_text(tmp_path)

    def start(out: Path, size: int) -> list[Any]:
        words = ("prune", base, out, "--method", "sparsegpt", "--data", tmp_path / "text.txt")
        return start_command(
            size, [*words, "--samples", "16", "--window", "32", "--batch-size", "1"], tmp_path / "printed"
        )

    def finish(out: Path, size: int) -> float:
        started = time.perf_counter()
        workers = start(out, size)
        for worker in workers:
            worker.join(120)
        printed = "".join(path.read_text() for path in sorted((tmp_path / "printed").iterdir()))
        assert [worker.exitcode for worker in workers] == [0] * size, printed
        return time.perf_counter() - started

    finish(tmp_path / "whole", 1)
    expected = contents(tmp_path / "whole")
    duration = finish(tmp_path / "two", 2)
    generator, killed, rounds = random.Random(0), 0, 0
    while killed < KILLS:
        out, size = tmp_path / f"killed-{rounds}", (2, 4)[rounds % 2]
        rounds += 1
        workers = start(out, size)
        wait_for_watch(workers)
        time.sleep(generator.uniform(0.0, 1.0) * duration)
        victim = generator.randrange(size)
        alive = workers[victim].is_alive()
        if alive:
            os.kill(workers[victim].pid, signal.SIGKILL)
        until = time.monotonic() + 30
        for worker in workers:
            worker.join(max(0.1, until - time.monotonic()))
        assert not any(worker.is_alive() for worker in workers), "the others go on"
        over = all(
            worker.exitcode == 0 for worker in workers if worker is not workers[victim]
        )  # nothing was left to do
        killed += alive and not over
        if over:
            assert contents(out) == expected
        elif alive:
            said = "".join((tmp_path / "printed" / f"{rank}.txt").read_text() for rank in range(size) if rank != victim)
            lines = [line for line in said.splitlines() if line.startswith("error ")]
            assert len(lines) == (1 if victim else size - 1), said  # without the main process each has the word
            assert f"process {victim} of {size}" in said and "the same command resumes" in said
        finish(out, generator.choice([1, 2, 4]))
        assert contents(out) == expected


@pytest.mark.parametrize(
    ("size", "everywhere", "differently", "message"),
    [
        (3, True, {}, "3 processes cannot divide 8 slots of windows evenly: start 1, 2, 4 or 8"),
        (4, True, {"batch_size": 8}, "3 batches of windows are too few for 4 processes"),
        (
            2,
            False,
            {"pattern": "4:8"},
            "process 1 on .* works on something else than process 0: patterns .* was '2:4' and is '4:8'",
        ),
        (2, False, {"data": tiny.tiny_tokens(20, 32, seed=1)}, "process 1 on .*: calibration digest was"),
        (2, True, {"method": "magnitude", "data": None}, "without text there is nothing that 2 processes could divide"),
    ],
    ids=["size", "batches", "settings", "text", "no text"],
)
def test_what_processes_cannot_share_is_refused(
    size: int, everywhere: bool, differently: dict[str, Any], message: str, tmp_path: Path
):
    base = tiny.tiny_checkpoint(tmp_path / "base")

    def work(rank: int) -> None:
        options = {"method": "wanda", **(differently if everywhere or rank == 1 else {})}
        with pytest.raises(tp.TopiaristError, match=message):
            prune(base, tmp_path / "out", **options)

    assert run_in(size, work) == {}
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("differently", "message"),
    [
        ("versions", "transformers version was .* and is '4.0'"),
        ("threads", "threads was 1 and is 2"),
        ("files", "model was"),
    ],
)
def test_processes_of_other_versions_threads_and_files_are_named(
    differently: str, message: str, tmp_path: Path, monkeypatch
):
    base = tiny.tiny_checkpoint(tmp_path / "base")
    other = tiny.tiny_checkpoint(tmp_path / "other", seed=1)

    def work(rank: int) -> None:
        if rank and differently == "versions":
            monkeypatch.setattr("topiarist.pipelines.training.processes.version", lambda _: "4.0")
        if rank and differently == "threads":
            torch.set_num_threads(2)
        with pytest.raises(tp.TopiaristError, match=f"process 1 on .* than process 0: {message}"):
            prune(other if rank and differently == "files" else base, tmp_path / "out", method="wanda")

    assert run_in(2, work) == {}
    assert not (tmp_path / "out").exists()


def test_a_process_that_gives_no_sign_of_life_is_named(tmp_path: Path, monkeypatch):
    """One that is stopped looks to the others like one behind a lost network."""
    monkeypatch.setattr(together, "SILENCE", 6.0)
    base = tiny.tiny_checkpoint(tmp_path / "base")
    tiny.tiny_text(tmp_path)
    words = ("prune", base, tmp_path / "out", "--data", tmp_path / "text.txt", "--samples", "16", "--window", "32")
    workers = start_command(2, words, tmp_path / "printed")
    wait_for_watch(workers)
    os.kill(workers[1].pid, signal.SIGSTOP)
    try:
        workers[0].join(120)
        assert workers[0].exitcode == together.ENDED
    finally:
        os.kill(workers[1].pid, signal.SIGKILL)
    said = [line for line in (tmp_path / "printed" / "0.txt").read_text().splitlines() if line.startswith("error ")]
    assert len(said) == 1 and "process 1 of 2 on " in said[0] and "has given no sign of life for 6 s" in said[0], said


def test_an_output_that_is_not_shared_is_refused(tmp_path: Path):
    base = tiny.tiny_checkpoint(tmp_path / "base")
    for rank in range(2):
        (tmp_path / f"{rank}").mkdir()

    def work(rank: int) -> None:
        os.chdir(tmp_path / f"{rank}")  # OUT is another folder for each
        with pytest.raises(tp.TopiaristError, match=r"OUT is not the same folder for process 1 on .* and process 0 on"):
            prune(base, Path("OUT"), method="wanda")

    assert run_in(2, work) == {}
    assert not any(any((tmp_path / f"{rank}").iterdir()) for rank in range(2))
