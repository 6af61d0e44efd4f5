"""Compiled kernels: cached once, built anew when damaged, and nothing is loaded that others could have written."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from topiarist.core.compiled import NoKernels, cache_folder, compiled, find_compiler, loaded

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")


@pytest.fixture
def source(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.setenv("TOPIARIST_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "answer.cpp"
    path.write_text('extern "C" int answer() { return 42; }')
    return path


def answer(library: Path) -> int:
    return ctypes.CDLL(str(library)).answer()


@needs_compiler
def test_the_second_time_comes_from_the_cache(source: Path):
    first = compiled(source, ("-O0",))
    when = first.stat().st_mtime_ns
    assert answer(first) == 42 and compiled(source, ("-O0",)) == first and first.stat().st_mtime_ns == when
    assert first.parent.stat().st_mode & 0o777 == 0o700
    assert [path.name for path in first.parent.iterdir()] == [first.name], "nothing else is left"
    assert compiled(source, ("-O1",)) != first
    assert loaded(source, ("-O0",))[0].answer() == 42


@needs_compiler
@pytest.mark.parametrize("damage", [b"", None, b"something else"])
def test_a_damaged_library_is_built_anew(source: Path, damage: bytes | None):
    library = compiled(source, ("-O0",))
    library.write_bytes(library.read_bytes()[:-100] if damage is None else damage)
    again = compiled(source, ("-O0",))
    assert answer(again) == 42 and len(list(again.parent.iterdir())) == 1


@needs_compiler
@pytest.mark.parametrize("what", ["folder", "library"])
@pytest.mark.parametrize("mode", [0o777, 0o770, 0o720])
def test_what_others_can_write_is_not_loaded(source: Path, what: str, mode: int):
    library = compiled(source, ("-O0",))
    (library if what == "library" else library.parent).chmod(mode)
    with pytest.raises(NoKernels, match=r"can be written by others.*chmod 700.*TOPIARIST_CACHE"):
        compiled(source, ("-O0",))


@needs_compiler
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("what", ["folder", "library"])
def test_what_another_user_planted_is_not_loaded(source: Path, what: str):
    library = compiled(source, ("-O0",))
    os.chown(library if what == "library" else library.parent, 12345, 12345)
    with pytest.raises(NoKernels, match="belongs to another user"):
        compiled(source, ("-O0",))


@needs_compiler
def test_a_kill_while_compiling_leaves_nothing_for_long(source: Path, tmp_path: Path):
    slow = tmp_path / "slow"
    slow.write_text('#!/bin/sh\n[ "$1" = --version ] || { touch started; sleep 60; }\n')
    slow.chmod(0o755)
    code = (
        f"from topiarist.core.compiled import compiled; from pathlib import Path; compiled(Path({str(source)!r}), ())"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code], env={**os.environ, "CXX": str(slow)}, cwd=tmp_path, start_new_session=True
    )
    while not (tmp_path / "started").exists():
        assert child.poll() is None
        time.sleep(0.05)
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    assert list((tmp_path / "cache").glob("build-*"))
    library = compiled(source, ("-O0",))
    assert [path.name for path in library.parent.iterdir()] == [library.name]


@pytest.mark.parametrize("value", ["", "   "])
def test_an_empty_compiler_variable_is_as_none(monkeypatch, value: str):
    monkeypatch.setenv("CXX", value)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(NoKernels, match=r"no C\+\+ compiler found"):
        find_compiler()


def test_a_compiler_variable_that_is_no_command(monkeypatch):
    monkeypatch.setenv("CXX", "g++ '")
    with pytest.raises(NoKernels, match="cannot be read as a command"):
        find_compiler()


def test_without_a_home_there_is_a_cache_too(monkeypatch):
    for name in ("TOPIARIST_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", classmethod(lambda _: (_ for _ in ()).throw(RuntimeError("no home"))))
    assert cache_folder().name == f"topiarist-{os.geteuid()}"
