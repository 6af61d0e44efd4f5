"""C++ kernels: compiled once with the system's compiler, cached, loaded; or a sentence that says why not.

Folder: $TOPIARIST_CACHE, else $XDG_CACHE_HOME/topiarist, else ~/.cache/topiarist. TOPIARIST_NO_KERNELS=1 does without.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from topiarist.core.errors import TopiaristError

_TIMEOUT = 300  # seconds for one compilation, which takes about five


class NoKernels(TopiaristError, RuntimeError):
    """The kernels cannot be had on this machine; everything still runs, with plain torch."""


def compiled(source: Path, flags: Sequence[str], *, machine: str = "") -> Path:
    """The shared library of a C++ source, from the cache or newly built; safe when several processes start at once.

    machine: what else the code depends on, as the processor under -march=native. Raises NoKernels with the reason and the
    cure.
    """
    if os.environ.get("TOPIARIST_NO_KERNELS"):
        raise NoKernels("TOPIARIST_NO_KERNELS is set")
    compiler = find_compiler()
    version = _run([*compiler, "--version"]).splitlines()[:1]
    what = (source.read_text(), compiler, version, tuple(flags), platform.machine(), machine)
    folder = cache_folder()
    library = folder / f"{source.stem}-{hashlib.sha256(repr(what).encode()).hexdigest()[:16]}.so"
    if library.exists():
        return library
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as work:
            object_file, built = Path(work) / "kernels.o", Path(work) / "kernels.so"
            _run([*compiler, *flags, "-fPIC", "-c", str(source), "-o", str(object_file)])
            # Linked without -fopenmp, so that no second OpenMP runtime with its own threads is loaded.
            _run([*compiler, "-shared", str(object_file), "-o", str(built)])
            os.replace(built, library)
    except OSError as error:
        raise NoKernels(
            f"cannot write to {folder} ({error.strerror}); set $TOPIARIST_CACHE to a writable folder"
        ) from None
    return library


def loaded(source: Path, flags: Sequence[str]) -> tuple[ctypes.CDLL, bool]:
    """The library of a C++ source, compiled if need be and loaded, and whether its OpenMP loops have threads.

    OpenMP comes from the library that torch has loaded already; where that one lacks GNU's entry points, one thread. Raises
    NoKernels with the reason and the cure.
    """
    problems = []
    for openmp in (True, False):
        try:
            return ctypes.CDLL(str(compiled(source, (*flags, "-fopenmp") if openmp else flags))), openmp
        except OSError as error:
            problems.append(str(error))
    raise NoKernels(f"the compiled kernels cannot be loaded: {'; '.join(problems)}")


def find_compiler() -> list[str]:
    """The C++ compiler's command: $CXX, g++, c++ or clang++."""
    if os.environ.get("CXX"):
        command = shlex.split(os.environ["CXX"])
        if shutil.which(command[0]) is None:
            raise NoKernels(f"$CXX names {command[0]!r}, which is not installed")
        return command
    for name in ("g++", "c++", "clang++"):
        if shutil.which(name):
            return [name]
    raise NoKernels("no C++ compiler found; install g++ (or set $CXX) for the fast kernels")


def cache_folder() -> Path:
    """Where compiled kernels are kept."""
    if os.environ.get("TOPIARIST_CACHE"):
        return Path(os.environ["TOPIARIST_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "topiarist"


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NoKernels(f"{shlex.join(command)} failed: {error}") from None
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines() or ["?"]
        raise NoKernels(f"{shlex.join(command)} failed: {lines[0]}")
    return done.stdout
