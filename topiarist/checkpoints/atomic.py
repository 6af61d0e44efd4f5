"""Files that appear whole or not at all, whenever the power fails."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from topiarist.checkpoints.access import check_name
from topiarist.core.errors import CheckpointError

TEMPORARY = ".tmp"
"""What a file is called until it is whole, after its own name."""
CHUNK = 1 << 24


@contextmanager
def replacing(path: Path, *, cure: str = "") -> Iterator[Path]:
    """Give a temporary name to write to; the file then takes the place of `path`: temporary file, fsync, rename, fsync.

    path: the file to be made or replaced. cure: what a user can do about a full or read-only disk, for the message.
    Raises CheckpointError, and leaves the old file as it was, if the new one cannot be written.
    """
    temporary = path.with_name(path.name + TEMPORARY)
    with disk_errors(f"cannot write {path}", cure=cure):
        try:
            yield temporary
            fsync(temporary)
            temporary.replace(path)
            fsync(path.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def write_atomically(path: Path, text: str, *, cure: str = "") -> None:
    """Write a text file: the old one or the new one stays. Raises CheckpointError if it cannot be written."""
    with replacing(path, cure=cure) as temporary:
        temporary.write_text(text, encoding="utf-8")


def refuse_foreign(path: Path, mark: str) -> None:
    """Raise CheckpointError if there is no folder for a file, or a file without `mark`, which all files of our kind hold."""
    check_name(path)
    if not path.parent.is_dir():
        raise CheckpointError(f"folder {path.parent} does not exist: make it first")
    if not path.exists():
        return
    with disk_errors(f"cannot read {path}"):
        ours = path.is_file() and mark.encode() in path.read_bytes()
    if not ours:
        raise CheckpointError(f"{path} is not topiarist's own file, so it is not overwritten: choose another name")


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], *, cure: str = "") -> None:
    """Write tensors of any shape as one safetensors file. Raises CheckpointError if it cannot be written."""
    with replacing(path, cure=cure) as temporary:
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, temporary, metadata=dict(metadata))
        temporary.chmod(0o644)  # the library creates private files


def make_folder(folder: Path, *, cure: str = "") -> list[Path]:
    """Create a folder, and return what of its path was not there, the innermost first.

    Raises CheckpointError if it cannot be created.
    """
    with disk_errors(f"cannot create {folder}", cure=cure):
        made = [place for place in (folder, *folder.parents) if not place.exists()]
        folder.mkdir(parents=True, exist_ok=True)
    return made


def remove_empty(made: Iterable[Path]) -> None:
    """Remove folders that `make_folder` made, up to the first that something was written in."""
    with suppress(OSError):  # of a folder that is not empty
        for place in filter(Path.exists, made):
            place.rmdir()


@contextmanager
def disk_errors(what: str, *, cure: str = "") -> Iterator[None]:
    """Turn errors of the disk into one line: `what` failed, why, and the cure. Raises CheckpointError."""
    try:
        yield
    except CheckpointError:  # has its line already
        raise
    except (OSError, SafetensorError) as error:
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
        cause = "the disk is full" if full else (getattr(error, "strerror", None) or str(error))
        raise CheckpointError(f"{what}: {cause}{cure}") from error


def fsync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
