"""The same work in several processes that are started here, as torchrun starts them but without its imports."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

CONTEXT: Any = mp.get_context("fork")  # torch and transformers are there already


def _set_up(rank: int, size: int, port: int) -> None:
    places = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= places | {"LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _one(rank: int, size: int, port: int, work: Callable[[int], object], failures: Any) -> None:
    _set_up(rank, size, port)
    try:
        work(rank)
    except Exception as error:
        failures.put((rank, f"{type(error).__name__}: {error}"))
    else:
        dist.destroy_process_group()


def run_in(size: int, work: Callable[[int], object]) -> dict[int, str]:
    """Run `work(rank)` in `size` processes; what each that failed raised, by rank."""
    port, failures = free_port(), CONTEXT.SimpleQueue()
    workers = [CONTEXT.Process(target=_one, args=(r, size, port, work, failures)) for r in range(size)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(180)
    assert all(worker.exitcode == 0 for worker in workers), [worker.exitcode for worker in workers]
    found = {}
    while not failures.empty():
        rank, text = failures.get()
        found[rank] = text
    return found


def _command(rank: int, size: int, port: int, words: Sequence[object], printed: Path) -> None:
    _set_up(rank, size, port)
    with (printed / f"{rank}.txt").open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    from topiarist import cli
    from topiarist.cli import common

    sys.stderr = sys.__stderr__ = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    for console in (common.out, common.err):
        console.file = sys.stderr
    sys.argv = ["topiarist", *map(str, words)]
    cli.main()


def start_command(size: int, words: Sequence[object], printed: Path) -> list[Any]:
    """Start `topiarist WORDS...` in `size` processes; each prints to a file of its rank in the folder `printed`."""
    printed.mkdir(parents=True, exist_ok=True)
    port = free_port()
    workers = [CONTEXT.Process(target=_command, args=(r, size, port, words, printed)) for r in range(size)]
    for worker in workers:
        worker.start()
    return workers
