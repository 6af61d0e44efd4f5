"""Several processes learn the masks that one learns from the same global batch."""

from __future__ import annotations

import os
import signal
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file

import topiarist as tp
from topiarist.checkpoints.writing import STATES
from topiarist.masklearn import Preset, Schedule
from topiarist.pipelines.training import loop
from topiarist.pipelines.training.processes import Processes

RECIPE = Preset(
    steps=6, sequences=4, length=32, lr=Schedule(2e-2, 0.0, "cosine"), tau=Schedule(1.0, 0.05, "exponential"),
    lam=Schedule(1e-5, 0.0), max_norm=1.0, gap=0.02, prior_samples=8,
)  # fmt: skip


def run(base: Path, out: Path, recipe: Preset, **options: Any) -> tp.LearnReport:
    data = tiny.tiny_tokens(2, 32).repeat(20, 1)  # what is held out is what is learned, so the masks do get better
    return tp.learn(base, out, data=data, preset=recipe, prior="magnitude", evaluate_every=2, **options)


Kill = tuple[str, int] | None
"""Stage and step after which every process is killed."""


def one_of_two(rank: int, port: int, base: Path, out: Path, recipe: Preset, shard: bool, kill: Kill) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": "2"}
    torch.set_num_threads(1)

    def progress(what: str, done: int, total: int) -> None:
        if kill is not None and what.startswith(kill[0]) and done > kill[1]:
            os.kill(os.getpid(), signal.SIGKILL)

    recover = False if shard else tp.Recover(steps=6)
    run(base, out, recipe, batch_size=1, shard=shard, recover=recover, progress=progress)
    dist.destroy_process_group()


def two(base: Path, out: Path, recipe: Preset, *, shard: bool, kill: Kill = None) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = mp.get_context("fork")  # torch and transformers are there already
    workers = [context.Process(target=one_of_two, args=(r, port, base, out, recipe, shard, kill)) for r in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    # Whoever loses its partner fails; what matters then is that the state on disk is whole.
    assert kill is not None or all(worker.exitcode == 0 for worker in workers)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {key: value for path in folder.glob("model*.safetensors") for key, value in load_file(path).items()}


@pytest.mark.distributed
@pytest.mark.parametrize(
    "family, sample, shard",
    [
        ("llama", "step", False),
        ("llama", "micro-batch", False),
        ("llama", "micro-batch", True),
        ("gpt2", "step", True),  # Conv1D: sharded along its second axis
        ("mixtral", "step", True),  # fused experts: some of them in each process
    ],
)
def test_two_processes_learn_what_one_learns(family: str, sample: Any, shard: bool, tmp_path: Path):
    base = tiny.tiny_checkpoint(tmp_path / "base", family)
    recipe = replace(RECIPE, sample=sample)
    # Of two micro-batches the sum is the same in any order; more may differ in the last bit of an fp32 sum.
    exact = replace(recipe, sequences=2)
    # Shards draw one mask for all that runs at a time: with noise for each micro-batch, one forward of both sequences.
    together = 2 if shard and sample == "micro-batch" else 1
    recover = False if shard else tp.Recover(steps=6)
    report = run(base, tmp_path / "one", exact, batch_size=together, recover=recover)
    two(base, tmp_path / "two", exact, shard=shard)
    wanted, found = weights_of(tmp_path / "one"), weights_of(tmp_path / "two")
    assert report.flips > 0.01 and all(torch.equal(wanted[n], found[n]) for n in wanted)
    history = [tp.LearnReport.from_folder(tmp_path / name).history for name in ("one", "two")]
    assert [e["flips"] for e in history[0]] == [e["flips"] for e in history[1]]
    assert [e["hard_loss"] for e in history[0]] == pytest.approx([e["hard_loss"] for e in history[1]])


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("shard", "kill"),
    [(False, ("learning", 3)), (True, ("learning", 3)), (False, ("recovery", 3))],
    ids=["copies", "shards", "recovery"],
)
def test_two_killed_processes_resume(shard: bool, kill: Kill, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(loop, "SAVED_AFTER", 0.0)
    monkeypatch.setattr(loop, "SHARE", 1e9)
    base = tiny.tiny_checkpoint(tmp_path / "base")
    two(base, tmp_path / "whole", RECIPE, shard=shard)
    two(base, tmp_path / "stopped", RECIPE, shard=shard, kill=kill)
    assert not (tmp_path / "stopped" / "config.json").exists()
    two(base, tmp_path / "stopped", RECIPE, shard=shard)
    wanted, found = weights_of(tmp_path / "whole"), weights_of(tmp_path / "stopped")
    assert all(torch.equal(wanted[n], found[n]) for n in wanted)
    names = [sorted(path.name for path in (tmp_path / run).iterdir()) for run in ("whole", "stopped")]
    assert names[0] == names[1] and STATES not in names[0]


def test_sequences_that_cannot_be_divided_are_refused(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(Processes, "join", classmethod(lambda cls: Processes(0, 3)))
    monkeypatch.setattr(Processes, "on_main", lambda self, what: what())
    monkeypatch.setattr(Processes, "check_agreement", lambda self, about: None)
    monkeypatch.setattr("topiarist.pipelines.learning.job.training_text", lambda *_, **__: pytest.fail("text is read"))
    base = tiny.tiny_checkpoint(tmp_path / "base")
    with pytest.raises(tp.CalibrationError, match="4 sequences a step cannot be divided among 3 processes: start 2"):
        run(base, tmp_path / "out", RECIPE, shard=False)


def test_what_cannot_be_sharded_is_refused_before_the_prior(tmp_path: Path, monkeypatch):
    base = tiny.tiny_checkpoint(tmp_path / "base")
    with pytest.raises(tp.TopiaristError, match="shards need several processes"):
        run(base, tmp_path / "out", RECIPE, shard=True)
    monkeypatch.setattr("topiarist.pipelines.learning.run.Run.prior_masks", lambda *_: pytest.fail("a prior"))
    monkeypatch.setattr(Processes, "on_main", lambda self, what: what())
    monkeypatch.setattr(Processes, "check_agreement", lambda self, about: None)
    for processes, pattern, message in (
        (3, "2:4", r"cannot be divided among 3 processes; .* \(--no-shard\)"),
        (2, "0.5", "looks at whole matrices, .*: --no-shard"),
    ):
        monkeypatch.setattr(Processes, "join", classmethod(lambda cls, size=processes: Processes(0, size)))
        with pytest.raises(tp.PatternError, match=message):
            run(base, tmp_path / "out", RECIPE, pattern=pattern)
    assert not (tmp_path / "out").exists()
