"""What the system does not let be read is told in its own words, and not as damage or as a missing file."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
from safetensors import safe_open

import topiarist as tp
from topiarist.checkpoints import reading
from topiarist.checkpoints.access import check_name
from topiarist.checkpoints.reading import Checkpoint
from topiarist.checkpoints.states import FileState
from topiarist.data.record import RECORD, recorded_passages
from topiarist.masks import MaskFile, read_npz
from topiarist.masks import files as mask_files
from topiarist.results.pages import Result, refresh


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("access")
    tiny.tiny_checkpoint(root / "m")
    tp.prune(root / "m", root / "out", method="magnitude")
    return root


@pytest.fixture
def root(made: Path, tmp_path: Path, monkeypatch) -> Path:
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def close(monkeypatch) -> Callable[[Path], None]:
    """Lets the system refuse to open one file, whoever runs the tests; safetensors calls such a file missing."""

    def close(closed: Path) -> None:
        whole = Path.open

        def refuse(path: Path, *words, **named):
            if path.absolute() == closed.absolute():
                raise PermissionError(13, "Permission denied", str(path))
            return whole(path, *words, **named)

        def miss(path: Path, *words, **named):
            if path.absolute() == closed.absolute():
                raise FileNotFoundError(f"No such file or directory: {path}")
            return safe_open(path, *words, **named)

        monkeypatch.setattr(Path, "open", refuse)
        for module in (reading, mask_files):
            monkeypatch.setattr(module, "safe_open", miss)

    return close


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("m/config.json", lambda path: Checkpoint("m")),
        ("m/model.safetensors", lambda path: Checkpoint("m")),
        ("m/tokenizer.json", lambda path: tp.prune("m", "other", method="magnitude")),
        ("out/model.safetensors", lambda path: tp.prune("m", "out", method="magnitude")),
        ("out/pruning_report.json", lambda path: Result.from_folder("out")),
        ("out/README.md", lambda path: refresh("out")),
        (RECORD, recorded_passages),
        ("masks.safetensors", MaskFile),
        ("state.safetensors", lambda path: FileState(path).load()),
        ("masks.npz", lambda path: read_npz(path, {})),
    ],
)
def test_a_file_that_may_not_be_read_is_named_with_that_reason(root: Path, close, name: str, read):
    path = root / name
    path.touch()
    close(path)
    with pytest.raises(
        tp.CheckpointError, match=f"{Path(name).name} is not readable: permission denied; give the rights"
    ):
        read(path)
    assert not Path("other").exists()


def test_a_folder_that_may_not_be_looked_into_is_named(root: Path, monkeypatch):
    look = os.scandir

    def refuse(path) -> object:
        if Path(path).name == "out":
            raise PermissionError(13, "Permission denied", path)
        return look(path)

    monkeypatch.setattr(os, "scandir", refuse)
    for read in (Checkpoint, Result.from_folder, tp.text_files, lambda name: tp.prune("m", name, method="magnitude")):
        with pytest.raises(tp.TopiaristError, match="out is not readable: permission denied; give the rights"):
            read("out")


LONG = "x" * 300
DATA = ("--data", "t.txt")


@pytest.mark.parametrize(
    "words",
    [("prune", LONG, "o", *DATA), ("prune", "./" + LONG, "o", *DATA), ("prune", "m", LONG, *DATA),
     ("prune", "m", "o", "--data", LONG + ".txt"), ("prune", "m", "o", "--allocation", LONG, *DATA),
     ("prune", "m", "o", "--recipe", LONG), ("learn", "m", "o", "--prior", LONG),
     ("shrink", LONG, "o", "--keep", "0.5"), ("recover", LONG, "o", "--data", "t.txt"), ("quantize", LONG, "o"),
     ("allocate", LONG, "o", *DATA), ("allocate", "m", LONG, *DATA), ("apply", "m", LONG, "o"),
     ("run", LONG), ("eval", LONG, "--text", "t.txt"), ("eval", "m", "--text", LONG + ".txt"), ("inspect", LONG),
     ("inspect", "out", "--verify", "--masks", LONG), ("report", LONG), ("report", "out", "--out", LONG),
     ("push", LONG, "a/b"), ("pack", LONG, "o"), ("pack", "out", LONG), ("unpack", LONG, "o"), ("bench", LONG),
     ("generate", LONG, "--prompt", "a"), ("export", LONG, "o.gguf"), ("export", "m", LONG + ".gguf")],
)  # fmt: skip
def test_a_name_that_is_too_long_is_one_line(root: Path, command, words: tuple[str, ...]):
    tiny.tiny_text(root, "t.txt")
    code, printed, error = command(*words)
    assert code == 2 and "file name too long" in error.lower() and "Traceback" not in error, (printed, error)
    assert error.count("\n") == 1 and not Path("o").exists()


def test_names_of_any_other_kind_pass(root: Path):
    for name in (root / "none", root / "m", root / "m" / "config.json", root / "m" / "config.json" / "below"):
        check_name(name)
    with pytest.raises(tp.CheckpointError, match="has a character in it that no name may have"):
        check_name(Path("a\0b"))
    (root / "loop").symlink_to(root / "loop")
    with pytest.raises(
        tp.CheckpointError, match="loop is not readable: too many levels of symbolic links; name another"
    ):
        check_name(root / "loop")
