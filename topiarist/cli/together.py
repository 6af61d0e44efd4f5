"""The command line under torchrun: one process talks, and none goes on when another, or torchrun itself, is gone."""

from __future__ import annotations

import os
import select
import signal
import socket
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from topiarist.cli.common import err, literal
from topiarist.core.errors import ProcessError

DIVIDED = ("prune", "quantize", "learn", "recover", "allocate")
"""Commands whose work several processes divide."""
GLANCE, SILENCE, COURTESY = 1.0, 20.0, 10.0
"""Seconds: between two looks at the others; without a sign of life until a process counts as gone; for a last word."""
KEPT = "what is finished is kept, and the same command resumes, with any number of processes"
ENDED = 2


def several() -> bool:
    """Whether torchrun started this process among others."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def check_divided(words: Sequence[str]) -> None:
    """Raise ProcessError for a command that would do the same work in every process."""
    if words and not words[0].startswith("-") and words[0] not in DIVIDED:
        raise ProcessError(f"{words[0]} runs in one process: start it without torchrun")


def place() -> str:
    """Where this process' number means this process: a host since its start, a container."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.stat('/proc/self/ns/pid').st_ino}"
    return socket.gethostname()


def alive(process: int) -> bool:
    """Whether a process of this place still runs; one that has ended and waits for its parent does not."""
    stat = Path(f"/proc/{process}/stat")
    try:
        if stat.parent.parent.joinpath("self").exists():
            return stat.read_text().rpartition(")")[2].split()[0] not in "ZX"
        os.kill(process, 0)
    except (FileNotFoundError, ProcessLookupError):
        return False
    except OSError:
        return True
    return True


class Together:
    """This process among the others of its run, watched by a thread of its own.

    Every process shows a sign of life in torchrun's store. Where one is gone, was stopped, or left an error there, the main
    process says so in one line and all end: the main thread may be in a product or a collective that nothing interrupts.
    """

    def __init__(self) -> None:
        import torch.distributed as dist

        from topiarist.pipelines.training.processes import JOINING, Processes

        self._parent, self._place = os.getppid(), place()
        self.rank, self.size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        # A connection of its own: that of the group is held while a collective waits. Without torchrun's store, the main
        # process opens the one that the group will use too.
        self._torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        opens = self.rank == 0 and not self._torchrun
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(  # pyright: ignore[reportPrivateImportUsage]
            address, port, is_master=opens, wait_for_workers=False, multi_tenant=True, timeout=JOINING
        )
        restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)
        self._store = dist.PrefixStore(f"topiarist {restart}", store)  # pyright: ignore[reportPrivateImportUsage]
        self._store.set(f"place {self.rank}", f"{os.getpid()} {self._place}")
        self._others: dict[int, tuple[int, str]] = {}
        """(process, place) of those that have started, by rank."""
        self._beats, self._seen = 0, dict[int, tuple[bytes, float]]()
        self._leaving, self._terminated, self._one = False, False, threading.Lock()
        self._woken, self._waker = socket.socketpair()
        self._waker.setblocking(False)
        signal.signal(signal.SIGTERM, lambda *_: None)
        signal.set_wakeup_fd(self._waker.fileno())
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        Processes.join()

    def _watch(self) -> None:
        while not self._ended.is_set():
            if select.select([self._woken], [], [], GLANCE)[0]:
                self._terminated |= signal.SIGTERM in self._woken.recv(64)
            try:
                fault = self._fault()
            except RuntimeError:  # of the store, which torchrun or the main process has
                fault = self._fault_without_store()
            if fault and not self._leaving:
                self._end(fault)

    def _fault(self) -> str:
        """What keeps the run from going on; empty if nothing does."""
        self._beats += 1
        self._store.set(f"beat {self.rank}", str(self._beats))
        if os.getppid() != self._parent:
            return f"torchrun ended: {KEPT}"
        for rank in set(range(self.size)) - {self.rank} - set(self._others):
            if self._has(f"place {rank}"):
                process, where = self._store.get(f"place {rank}").decode().split(" ", 1)
                self._others[rank] = int(process), where
        for rank in sorted(self._others):
            name = self._name(rank)
            if self._has(f"error {rank}"):
                return f"process {rank}: {self._store.get(f'error {rank}').decode()}"
            if self._has(f"left {rank}"):
                continue
            if self._is_gone(rank):
                return f"{name} ended: {KEPT}"
            beat = self._store.get(f"beat {rank}") if self._has(f"beat {rank}") else b""
            last, since = self._seen.get(rank, (b"", time.monotonic()))
            if beat != last or rank not in self._seen:
                self._seen[rank] = beat, time.monotonic()
            elif time.monotonic() - since > SILENCE:
                return f"{name} has given no sign of life for {SILENCE:.0f} s: {KEPT}"
        return f"stopped, as torchrun stops all processes when one ends: {KEPT}" if self._terminated else ""

    def _fault_without_store(self) -> str:
        if self._is_gone(0):
            return f"{self._name(0)} ended: {KEPT}"
        holder = "torchrun" if self._torchrun else f"process 0 of {self.size}"
        return f"{holder}, or the connection to it, ended: {KEPT}"

    def _name(self, rank: int) -> str:
        return f"process {rank} of {self.size} on {self._others[rank][1].split()[0]}"

    def _is_gone(self, rank: int) -> bool:
        """Whether a process of this place has ended; of other places nobody knows but by their silence."""
        process, where = self._others.get(rank, (os.getpid(), ""))
        return where == self._place and not alive(process)

    def _has(self, key: str) -> bool:
        return self._store.check([key])

    def _end(self, fault: str) -> None:
        """End this process; the main one has the word, and any other one if that is gone."""
        with self._one:
            if self.rank == 0 or not self._said():
                err.quiet = False
                err.print(f"[red]error[/red] {literal(fault)}", highlight=False, soft_wrap=True)
            with suppress(RuntimeError):
                self._go()
            os._exit(ENDED)

    def _go(self) -> None:
        """Note that this process ends for good; the main one, whose end would look like a fault, waits for the others."""
        self._store.set(f"left {self.rank}", "1")
        if self.rank:
            return
        self._store.set("said", "1")
        until = time.monotonic() + COURTESY
        others = set(range(1, self.size))
        while others and time.monotonic() < until:
            others -= {rank for rank in others if self._is_gone(rank) or self._has(f"left {rank}")}
            time.sleep(0.05)

    def _said(self) -> bool:
        """Wait for the main process to have said what there is to say. False if it could not."""
        until = time.monotonic() + COURTESY
        while time.monotonic() < until:
            if self._is_gone(0):
                return False
            try:
                if self._has("said"):
                    return True
            except RuntimeError:  # the store is gone with torchrun, which the main process sees as well
                return 0 in self._others and self._others[0][1] == self._place
            time.sleep(0.1)
        return False

    def fail(self, text: str) -> None:
        """Leave an error of this process where the main one finds it, and stop looking for others."""
        with self._one, suppress(RuntimeError):
            self._leaving = True
            self._store.set(f"error {self.rank}", text)

    def wait_for_cause(self) -> None:
        """After a lost connection: give the watch the time to see who is gone, and to end this process with its name."""
        time.sleep(SILENCE + 5 * GLANCE)

    def leave(self) -> None:
        """End the watch. The main process, whose word counts and which may have the store, goes last."""
        from topiarist.pipelines.training.processes import Processes

        with self._one:
            self._leaving = True
        with suppress(RuntimeError):
            if self.rank and self._has(f"error {self.rank}"):
                self._said()
            self._go()
        self._ended.set()
        self._waker.send(b"\0")
        self._thread.join(COURTESY)
        Processes.destroy()
