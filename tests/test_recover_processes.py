"""Two processes recover what one recovers, from text that the main one tokenises, and resume after a kill of both."""

from __future__ import annotations

import os
import signal
import socket
from pathlib import Path

import pytest
import tiny
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file

import topiarist as tp
from topiarist.pipelines.training import loop

pytestmark = pytest.mark.distributed


def run(folder: Path, out: str, kill: int | None = None) -> tp.RecoverReport:
    def progress(what: str, done: int, total: int) -> None:
        if what.startswith("recovery") and done == kill:
            os.kill(os.getpid(), signal.SIGKILL)

    # Of two micro-batches the sum is the same in any order; more may differ in the last bit of an fp32 sum.
    return tp.recover(
        folder / "pruned", folder / out, data=tp.text_files(folder / "text.txt"), window_tokens=32, tokens=6 * 64,
        sequences=2, batch_size=1, learning_rate=3e-3, held_out=4, evaluate_every=2, progress=progress,
    )  # fmt: skip


def one_of_two(rank: int, port: int, folder: Path, out: str, kill: int | None) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    run(folder, out, kill)
    dist.destroy_process_group()


def two(folder: Path, out: str, kill: int | None = None) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = mp.get_context("fork")  # torch and transformers are there already
    workers = [context.Process(target=one_of_two, args=(r, port, folder, out, kill)) for r in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert kill is not None or all(worker.exitcode == 0 for worker in workers)


def test_two_processes_recover_what_one_recovers(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(loop, "SAVED_AFTER", 0.0)
    monkeypatch.setattr(loop, "SHARE", 1e9)
    base = tiny.tiny_checkpoint(tmp_path / "base", dtype=torch.bfloat16)
    tp.prune(base, tmp_path / "pruned", method="magnitude")
    tiny.tiny_text(tmp_path)
    report = run(tmp_path, "one")
    two(tmp_path, "two")
    two(tmp_path, "stopped", kill=4)
    assert not (tmp_path / "stopped" / "config.json").exists() and (tmp_path / "stopped.tokens").is_dir()
    two(tmp_path, "stopped")
    assert report.best["loss"] < report.before and not (tmp_path / "stopped.tokens").exists()
    wanted = load_file(tmp_path / "one" / "model.safetensors")
    for name in ("two", "stopped"):
        found = load_file(tmp_path / name / "model.safetensors")
        assert all(torch.equal(wanted[key], found[key]) for key in wanted), name
        again = tp.RecoverReport.from_folder(tmp_path / name)
        assert [e["loss"] for e in again.evaluations] == pytest.approx([e["loss"] for e in report.evaluations])
