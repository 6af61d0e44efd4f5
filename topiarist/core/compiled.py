"""C++ kernels: compiled once with the system's compiler, cached, loaded; or a sentence that says why not.

Folder: $TOPIARIST_CACHE, else $XDG_CACHE_HOME/topiarist, else ~/.cache/topiarist. TOPIARIST_NO_KERNELS=1 does without.
A library is code that this process will run, so nothing is loaded that another user could have written, and its name
holds the digest of its bytes: a damaged file is built anew. torch.utils.cpp_extension does the same with ninja and
Python's headers, which many machines lack; these kernels need neither.
"""

from __future__ import annotations

import ctypes
import glob
import hashlib
import os
import platform
import shlex
import shutil
import stat
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
    what = (source.read_text(encoding="utf-8"), compiler, version, tuple(flags), platform.machine(), machine)
    folder, stem = cache_folder(), f"{source.stem}-{hashlib.sha256(repr(what).encode()).hexdigest()[:16]}"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        _check_private(folder)
        if (library := _cached(folder, stem)) is not None:
            return library
        _remove_leftovers(folder)
        with tempfile.TemporaryDirectory(dir=folder, prefix=_work_prefix(os.getpid())) as work:
            object_file, built = Path(work) / "kernels.o", Path(work) / "kernels.so"
            _run([*compiler, *flags, "-fPIC", "-c", str(source), "-o", str(object_file)])
            # Linked without -fopenmp, so that no second OpenMP runtime with its own threads is loaded.
            _run([*compiler, "-shared", str(object_file), "-o", str(built)])
            built.chmod(0o700)
            library = folder / f"{stem}-{_digest(built)}.so"
            os.replace(built, library)
    except OSError as error:
        raise NoKernels(
            f"cannot write to {folder} ({error.strerror}); set $TOPIARIST_CACHE to a writable folder"
        ) from None
    return library


def _cached(folder: Path, stem: str) -> Path | None:
    """The library that was built earlier; those whose bytes are not the ones that were built are removed."""
    for library in folder.glob(f"{stem}-*.so"):
        _check_private(library)
        if library.name == f"{stem}-{_digest(library)}.so":
            return library
        library.unlink(missing_ok=True)
    return None


def _digest(library: Path) -> str:
    with library.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()[:32]


def _check_private(path: Path) -> None:
    """Raise NoKernels if another user owns the path, or can write to it."""
    about = path.stat()
    if about.st_uid != os.geteuid():
        cause = "belongs to another user"
    elif about.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        cause = "can be written by others"
    else:
        return
    raise NoKernels(
        f"{path} {cause}, and what is in it would be run: chmod 700 it, or set $TOPIARIST_CACHE to a folder of your own"
    )


def _work_prefix(process: int) -> str:
    return f"build-{platform.node()}-{process}-"


def _remove_leftovers(folder: Path) -> None:
    """Remove what compilations left that were killed on this machine."""
    for work in folder.glob(f"build-{glob.escape(platform.node())}-*-*"):
        process = work.name.removeprefix(f"build-{platform.node()}-").partition("-")[0]
        if process.isdigit() and not Path(f"/proc/{process}").exists():
            shutil.rmtree(work, ignore_errors=True)


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
    try:
        command = shlex.split(os.environ.get("CXX", ""))
    except ValueError as error:
        raise NoKernels(f"$CXX cannot be read as a command ({error})") from None
    if command:
        if shutil.which(command[0]) is None:
            raise NoKernels(f"$CXX names {command[0]!r}, which is not installed")
        return command
    for name in ("g++", "c++", "clang++"):
        if shutil.which(name):
            return [name]
    raise NoKernels("no C++ compiler found; install g++ (or set $CXX) for the fast kernels")


def cache_folder() -> Path:
    """Where compiled kernels are kept; without a home, a folder of the user's own among temporary files."""
    if os.environ.get("TOPIARIST_CACHE"):
        return Path(os.environ["TOPIARIST_CACHE"])
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "topiarist"
    except RuntimeError:
        return Path(tempfile.gettempdir()) / f"topiarist-{os.geteuid()}"


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_TIMEOUT, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NoKernels(f"{shlex.join(command)} failed: {error}") from None
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines() or ["?"]
        raise NoKernels(f"{shlex.join(command)} failed: {lines[0]}")
    return done.stdout
