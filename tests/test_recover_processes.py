"""Two processes recover what one recovers, from text that the main one tokenises, and resume after a kill of both."""

from __future__ import annotations

import os
import signal
import socket
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file
from several import run_in

import topiarist as tp
from topiarist.pipelines.training import loop

pytestmark = pytest.mark.distributed


def run(folder: Path, out: str, kill: int | None = None, **options: Any) -> tp.RecoverReport:
    def progress(what: str, done: int, total: int) -> None:
        if what.startswith("recovery") and done == kill:
            os.kill(os.getpid(), signal.SIGKILL)

    # Of two micro-batches the sum is the same in any order; more may differ in the last bit of an fp32 sum.
    return tp.recover(
        folder / "pruned", folder / out, data=tp.text_files(folder / "text.txt"), window_tokens=32, tokens=6 * 64,
        sequences=2, batch_size=1, evaluate_every=2, progress=progress, **{"learning_rate": 3e-3, "held_out": 4} | options,
    )  # fmt: skip


def one_of_two(rank: int, port: int, folder: Path, out: str, kill: int | None, options: dict[str, Any]) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    run(folder, out, kill, **options)
    dist.destroy_process_group()


def two(folder: Path, out: str, kill: int | None = None, **options: Any) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = mp.get_context("fork")  # torch and transformers are there already
    workers = [context.Process(target=one_of_two, args=(r, port, folder, out, kill, options)) for r in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert kill is not None or all(worker.exitcode == 0 for worker in workers)


@pytest.mark.parametrize("quantised", [False, True])
def test_two_processes_recover_what_one_recovers(quantised: bool, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(loop, "SAVED_AFTER", 0.0)
    monkeypatch.setattr(loop, "SHARE", 1e9)
    base = tiny.tiny_checkpoint(tmp_path / "base", dtype=torch.bfloat16)
    if quantised:
        tp.prune(base, tmp_path / "sparse", method="magnitude")
        tp.quantize(tmp_path / "sparse", tmp_path / "pruned", bits=8, group=32, skip=["up_proj"])
    else:
        tp.prune(base, tmp_path / "pruned", method="magnitude")
    tiny.tiny_text(tmp_path)
    report = run(tmp_path, "one")
    two(tmp_path, "two")
    two(tmp_path, "stopped", kill=4)
    assert not (tmp_path / "stopped" / "config.json").exists() and (tmp_path / "stopped.tokens").is_dir()
    run(tmp_path, "stopped")  # one goes on where two stopped
    assert report.best["loss"] < report.before and not (tmp_path / "stopped.tokens").exists()
    wanted = load_file(tmp_path / "one" / "model.safetensors")
    for name in ("two", "stopped"):
        found = load_file(tmp_path / name / "model.safetensors")
        assert all(torch.equal(wanted[key], found[key]) for key in wanted), name
        again = tp.RecoverReport.from_folder(tmp_path / name)
        assert [e["loss"] for e in again.evaluations] == pytest.approx([e["loss"] for e in report.evaluations])


SHARDED: dict[str, tuple[str, torch.dtype, dict[str, Any]]] = {
    "bf16": ("llama", torch.bfloat16, {"dtype": "stored"}),
    "tied, hidden states": (
        "gpt2",
        torch.float32,
        {"loss": "kl+hidden", "activation_checkpointing": True, "embeddings": True},
    ),
    "experts, norms as they are": ("mixtral", torch.bfloat16, {"dtype": "float32", "norms": False}),
    "the default rate": ("llama", torch.float32, {"learning_rate": None}),
    "uneven rows, no teacher": ("llama", torch.float32, {"loss": "lm"}),
    "uneven looks": ("llama", torch.float32, {"held_out": 3}),
}


@pytest.mark.parametrize("case", SHARDED)
def test_shards_recover_what_one_process_recovers(case: str, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(loop, "SAVED_AFTER", 0.0)
    monkeypatch.setattr(loop, "SHARE", 1e9)
    family, dtype, options = SHARDED[case]
    odd = {"vocab_size": tiny.VOCAB + 1} if "uneven" in case else {}
    base = tiny.tiny_checkpoint(tmp_path / "base", family, dtype=dtype, **odd)
    tp.prune(base, tmp_path / "pruned", method="magnitude")
    tiny.tiny_text(tmp_path)
    report = run(tmp_path, "one", **options)
    two(tmp_path, "two", shard=True, **options)
    two(tmp_path, "stopped", kill=4, shard=True, **options)
    assert not (tmp_path / "stopped" / "config.json").exists()
    two(tmp_path, "stopped", shard=True, **options)
    assert report.best["loss"] < report.before
    start, wanted, found, stopped = (
        load_file(tmp_path / name / "model.safetensors") for name in ("pruned", "one", "two", "stopped")
    )
    assert not (tmp_path / "stopped" / ".topiarist").exists()
    for name in wanted:
        assert torch.equal(found[name], stopped[name]) and found[name].dtype == dtype, name
        assert found[name].ndim == 1 or torch.equal(found[name] == 0, start[name] == 0), name
    # Together: where a gradient is rounding alone, as that of a key's bias, Adam makes steps of it.
    apart, moved = (
        sum(float((one[name] - other[name]).float().square().sum()) for name in wanted) ** 0.5
        for one, other in ((found, wanted), (wanted, start))
    )
    assert moved > 0 and apart <= 0.01 * moved
    again = tp.RecoverReport.from_folder(tmp_path / "two")
    assert again.weights == report.weights and again.learning_rate == pytest.approx(report.learning_rate, rel=1e-5)
    assert [e["loss"] for e in again.evaluations] == pytest.approx([e["loss"] for e in report.evaluations], rel=1e-3)


def test_what_cannot_be_sharded_is_refused(tmp_path: Path):
    base = tiny.tiny_checkpoint(tmp_path / "base")
    tp.prune(base, tmp_path / "pruned", method="magnitude")
    tiny.tiny_text(tmp_path)
    with pytest.raises(tp.TopiaristError, match="shards need several processes"):
        run(tmp_path, "out", shard=True)
    cases: list[tuple[Any, dict[str, Any], str]] = [
        (tmp_path / "pruned", {"kind": "lora"}, "use kind full, or leave --shard out"),
        (tmp_path / "pruned", {"sequences": 3, "data": [[1]]}, "3 sequences a step cannot be divided among 2"),
        (tp.load_pruned(tmp_path / "pruned"), {}, "a model object cannot be sharded"),
        (tmp_path / "pruned", {"teacher": tiny.tiny_model()}, "a model object cannot be sharded"),
    ]

    def work(_: int) -> None:
        for model, options, message in cases:
            with pytest.raises(tp.TopiaristError, match=message):
                tp.recover(
                    model,
                    tmp_path / "out",
                    **{"teacher": base, "data": tiny.tiny_tokens(20, 32), "shard": True, **options},
                )

    assert run_in(2, work) == {}
    assert not (tmp_path / "out").exists()


TRAININGS: dict[str, tuple[Any, dict[str, Any]]] = {
    "recover": (tp.recover, {"window_tokens": 32, "tokens": 128, "sequences": 2, "held_out": 2}),
    "learn": (tp.learn, {"prior": "magnitude", "steps": 2, "shard": False}),
}


@pytest.mark.parametrize("command", TRAININGS)
@pytest.mark.parametrize(
    ("differently", "message"),
    [
        ({"seed": 1}, "process 1 on .* works on something else than process 0: seed was 0 and is 1"),
        ({"data": tiny.tiny_tokens(40, 32, seed=1)}, "process 1 on .*: text digest was"),
    ],
    ids=["seed", "text"],
)
def test_trainings_of_different_processes_are_compared(
    command: str, differently: dict[str, Any], message: str, tmp_path: Path
):
    train, options = TRAININGS[command]
    base = tiny.tiny_checkpoint(tmp_path / "base")
    tp.prune(base, tmp_path / "pruned", method="magnitude")
    model = tmp_path / ("pruned" if command == "recover" else "base")

    def work(rank: int) -> None:
        own = {"data": tiny.tiny_tokens(40, 32), **options, **(differently if rank else {})}
        with pytest.raises(tp.TopiaristError, match=message):
            train(model, tmp_path / "out", **own)

    assert run_in(2, work) == {}
    assert not (tmp_path / "out").exists()


def test_tokens_on_a_disk_of_one_machine_are_refused(tmp_path: Path):
    base = tiny.tiny_checkpoint(tmp_path / "base")
    tp.prune(base, tmp_path / "pruned", method="magnitude")
    tiny.tiny_text(tmp_path)
    for rank in range(2):
        (tmp_path / f"{rank}").mkdir()

    def work(rank: int) -> None:
        os.chdir(tmp_path / f"{rank}")  # OUT is another folder for each
        with pytest.raises(tp.TopiaristError, match=r"OUT\.tokens is not the same folder for process 1 on"):
            tp.recover(
                tmp_path / "pruned", "OUT", data=tp.text_files(tmp_path / "text.txt"), window_tokens=32, tokens=128,
                sequences=2,
            )  # fmt: skip

    assert run_in(2, work) == {}
    assert not any(any((tmp_path / f"{rank}").iterdir()) for rank in range(2))
