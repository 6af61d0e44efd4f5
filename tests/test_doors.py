"""Every command against every kind of bad input: one line, exit code 2, nothing written; never a traceback."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
from doors import (
    CHECKS,
    COMPUTING,
    DOORS,
    FAST,
    FOLDERS,
    FORMS,
    PLACES,
    PLANNING,
    RESUMING,
    STORING,
    WEIGHTS,
    at,
    opened,
    tried,
    words_of,
)
from killing import contents
from safetensors.torch import load_file

import topiarist as tp
from topiarist.cli.common import printable

NAMES = (*DOORS, *FORMS)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A dense model, its pruned form, masks, the packed form, a text, and a recipe."""
    folder = tmp_path_factory.mktemp("doors")
    tiny.tiny_text(folder)
    tiny.tiny_checkpoint(folder / "base")
    tp.prune(folder / "base", folder / "model", method="magnitude", calibration=tiny.tiny_tokens(4, 16))
    dense, pruned = load_file(folder / "base" / WEIGHTS), load_file(folder / "model" / WEIGHTS)
    names = [f"{name}.weight" for name in tp.audit(folder / "model")[0]["modules"]]
    masks = {name: pruned[name] != 0 for name in names}
    tp.masks.save_masks(folder / "masks.safetensors", masks, weights=dense, pattern="2:4", base_model="base")
    tp.runtime.pack_folder(folder / "model", folder / "packed")
    (folder / "recipe.yaml").write_text(
        "topiarist: 1\nmodel: base\ndata: text.txt\n"
        "stages:\n- prune: {method: wanda, num_windows: 4, window_tokens: 32}\n"
    )
    return folder


@pytest.fixture
def inputs(made: Path, tmp_path: Path, monkeypatch) -> Path:
    """A copy of what was made, as the current folder, where nothing asks, compiles or warns."""
    shutil.copytree(made, tmp_path / "inputs")
    monkeypatch.chdir(tmp_path / "inputs")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question was asked"))
    monkeypatch.setenv("TOPIARIST_NO_KERNELS", "1")
    monkeypatch.setattr("warnings.showwarning", lambda *_, **__: None)
    return tmp_path / "inputs"


def marked(door: str, *rest: str):
    """A cell; those of the doors in FAST are in the fast tier."""
    return pytest.param(door, *rest, marks=() if door in FAST else pytest.mark.slow, id=" | ".join((door, *rest)))


def writes_folder(door: str) -> bool:
    return at(door, FOLDERS) and door not in PLANNING


def places(door: str) -> list[str]:
    """Where its OUT may be: the packed form takes the place of nothing, not even of a link."""
    return [place for place in PLACES if "link" not in place or not at(door, frozenset({"pack", "unpack"}))]


def said(error: str) -> str:
    """The line of an error, or the parser's box."""
    return next((line for line in error.splitlines() if line.startswith("error ")), error)


@pytest.mark.parametrize("door", [marked(door) for door in NAMES])
def test_a_good_input_passes(inputs: Path, command, door: str):
    """What the other tests spoil is right before."""
    code, _, error = command(*words_of(door))
    assert code == 0, error


@pytest.mark.parametrize(("door", "check"), [marked(door, check) for door in NAMES for check in tried(door)])
def test_a_bad_input_at_a_door(inputs: Path, command, door: str, check: str):
    CHECKS[check].spoil(opened(door))
    before = sorted(Path().rglob("*"))
    code, _, error = command(*words_of(door), *CHECKS[check].words)
    assert code == 2 and re.search(CHECKS[check].says, said(error)), (code, error)
    assert sorted(Path().rglob("*")) == before, "a refusal left something behind"


@pytest.mark.parametrize(
    ("door", "place"), [marked(door, place) for door in DOORS if writes_folder(door) for place in places(door)]
)
def test_a_strange_place_for_the_output(inputs: Path, command, door: str, place: str):
    """It is written there and nowhere else, and the last line names it; a command that resumes finds it finished."""
    out = PLACES[place](opened(door))
    words, before = [str(out) if word == "out" else word for word in words_of(door)], set(inputs.rglob("*"))
    for _ in range(1 + at(door, RESUMING)):
        code, printed, error = command(*words)
        assert code == 0, error
        assert printable(str(out)) in printed
    home = out.resolve()
    assert all(home in (new, *new.parents) or new in home.parents for new in set(inputs.rglob("*")) - before)


@pytest.mark.parametrize("door", [marked(door) for door in DOORS if writes_folder(door)])
def test_a_name_that_is_no_text_for_the_output(inputs: Path, command, door: str):
    before = sorted(Path().rglob("*"))
    code, _, error = command(*[os.fsdecode(b"out\xff") if word == "out" else word for word in words_of(door)])
    assert code == 2 and "no UTF-8" in said(error), (code, error)
    assert sorted(Path().rglob("*")) == before


def fail_writing(error: BaseException) -> Callable[[int], None]:
    def fsync(_: int) -> None:
        raise error

    return fsync


def writes(door: str) -> bool:
    return at(door, STORING | {"allocate"}) and door not in PLANNING


@pytest.mark.parametrize("door", [marked(door) for door in NAMES if writes(door)])
def test_a_full_disk(inputs: Path, command, monkeypatch, door: str):
    """The line names the reason, and the same command finishes once there is room."""
    with monkeypatch.context() as full:
        full.setattr("os.fsync", fail_writing(OSError(errno.ENOSPC, "No space left on device")))
        code, _, error = command(*words_of(door))
        assert code == 2 and re.search("space|full", said(error)), (code, error)
    assert command(*words_of(door))[0] == 0


def interrupted(door: str) -> bool:
    return at(door, COMPUTING | STORING)


@pytest.mark.parametrize("door", [marked(door) for door in NAMES if interrupted(door)])
def test_an_interrupt(inputs: Path, command, monkeypatch, door: str):
    """The line says whether work is kept; a command that keeps none leaves nothing; the same command finishes."""
    before = sorted(Path().rglob("*"))
    resuming = at(door, RESUMING | {"allocate", "apply"}) and door not in PLANNING
    with monkeypatch.context() as stopped:
        where = "torch.nn.functional.embedding" if at(door, COMPUTING) else "os.fsync"
        stopped.setattr(where, lambda *_, **__: fail_writing(KeyboardInterrupt())(0))
        code, _, error = command(*words_of(door))
    assert code == 130 and ("the same command resumes" in error) == resuming, (code, error)
    assert resuming or sorted(Path().rglob("*")) == before
    assert command(*words_of(door))[0] == 0


def stop_at(number: int) -> Callable[[int], None]:
    """An fsync that interrupts the run when it is called for the so many-th time."""
    calls = iter(range(number))

    def fsync(_: int) -> None:
        if next(calls, None) is None:
            raise KeyboardInterrupt

    return fsync


@pytest.mark.parametrize("door", [marked(door) for door in NAMES if at(door, RESUMING) and door not in PLANNING])
def test_what_a_stopped_run_left_may_be_damaged(inputs: Path, command, monkeypatch, door: str):
    """One bit is turned, or the end is cut off: the same command gives the same bytes, or says what to delete."""
    out = Path("out")
    assert command(*words_of(door))[0] == 0
    whole = contents(out)
    shutil.rmtree(out)
    with monkeypatch.context() as stopped:
        stopped.setattr("os.fsync", stop_at(8))
        assert command(*words_of(door))[0] == 130
    left = sorted(path for path in out.rglob("*") if path.is_file() and path.stat().st_size)
    assert left
    shutil.copytree(out, "kept")
    damages = [(path, lambda raw: raw[:-9] + bytes([raw[-9] ^ 1]) + raw[-8:]) for path in (left[0], left[-1])]
    for path, damage in (*damages, (left[-1], lambda raw: raw[: len(raw) // 3])):
        path.write_bytes(damage(path.read_bytes()))
        code, _, error = command(*words_of(door))
        assert (code == 0 and contents(out) == whole) or (code == 2 and "delete" in said(error)), (path, code, error)
        shutil.rmtree(out)
        shutil.copytree("kept", out)


@pytest.mark.parametrize("door", [marked(door) for door in DOORS if writes(door) and door != "allocate"])
def test_two_runs_at_once(inputs: Path, command, monkeypatch, door: str):
    """One of them is refused, and the other's result is that of a run alone."""
    words, out, fsync = words_of(door), Path(next(word for word in words_of(door) if word.startswith("out"))), os.fsync
    assert command(*words)[0] == 0
    whole = contents(out)
    out.rename("alone")
    others = []

    def and_another(handle: int) -> None:
        if not others:
            others.append(os.fork())
            if not others[0]:
                os._exit(outcome(*command(*words)))
            others.append(os.waitstatus_to_exitcode(os.waitpid(others[0], 0)[1]))
        fsync(handle)

    monkeypatch.setattr("os.fsync", and_another)
    assert sorted([outcome(*command(*words)), others[1]]) == [0, REFUSED]
    assert contents(out) == whole


REFUSED = 3


def outcome(code: int, _: str, error: str) -> int:
    """0 of a run that finished, REFUSED of one that another is in the way of."""
    return REFUSED if code == 2 and re.search("being written by process|exists", said(error)) else code


TABLE = Path(__file__).parents[1] / "docs/develop/doors.md"


def table() -> str:
    """The cells of the tests above as a table of Markdown: a row a check, a column a door."""
    rows = {check: [door for door in NAMES if check in tried(door)] for check in CHECKS}
    rows |= {"a full disk": list(filter(writes, NAMES)), "an interrupt": list(filter(interrupted, NAMES))}
    lines = ["| | " + " | ".join(NAMES) + " |", "|---" + "|:-:" * len(NAMES) + "|"]
    lines += [
        f"| {name} | " + " | ".join("●" if d in doors else "" for d in NAMES) + " |" for name, doors in rows.items()
    ]
    return "\n".join(lines)


def test_the_documents_have_the_table():
    """`python tests/test_doors.py` prints what to write there."""
    assert table() in TABLE.read_text()


if __name__ == "__main__":
    print(table())
