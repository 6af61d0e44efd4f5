"""The list of contents of a packed folder, held against the folder; and the folder while it is being written."""

from __future__ import annotations

import glob
import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from topiarist.checkpoints.access import check_name
from topiarist.checkpoints.atomic import disk_errors, fsync
from topiarist.checkpoints.reading import PACKED, read_json
from topiarist.core.errors import CheckpointError

VERSIONS = (1, 2)
"""Those that are read; the last one is written."""
MANIFEST = PACKED
KEY = "topiarist_packed"
"""The format's name, in the manifest and in the shards' headers."""


def read_manifest(folder: Path) -> dict[str, list[str]]:
    """Shard -> names of its tensors. Raises CheckpointError if the manifest is damaged or does not fit the folder."""
    path = folder / MANIFEST
    if not path.is_file():
        raise CheckpointError(f"{folder} is not a packed model: it has no {MANIFEST}")
    manifest = read_json(path, cure="copy the folder again")
    kind, version = manifest.get("format"), manifest.get("version")
    if kind != KEY or version not in VERSIONS:
        raise CheckpointError(
            f"{folder} is of packed format {kind!r} version {version}, this topiarist reads versions 1 and 2; "
            "unpack it with the topiarist that wrote it"
        )
    shards: Any = manifest.get("shards")
    if not _is_listing(shards):
        raise CheckpointError(f"{path} cannot be read (it has no list of shards and tensors); copy the folder again")
    for shard in shards:
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise CheckpointError(
                f"{path} names the shard {shard!r}: only .safetensors files inside the folder are read"
            )
        if not (folder / shard).is_file():
            raise CheckpointError(f"{folder} lacks {shard}; copy the folder again")
    if unlisted := sorted({file.name for file in folder.glob("packed-*.safetensors")} - set(shards)):
        raise CheckpointError(f"{folder} holds {unlisted[0]}, which {MANIFEST} does not list; copy the folder again")
    names = [name for listed in shards.values() for name in listed]
    if len(set(names)) != len(names) or len(names) != manifest.get("num_tensors"):
        raise CheckpointError(
            f"{path} lists {len(set(names))} tensors and says that there are {manifest.get('num_tensors')}; copy the folder "
            "again"
        )
    return shards


def _is_listing(shards: Any) -> bool:
    return isinstance(shards, dict) and all(
        isinstance(names, list) and all(isinstance(name, str) for name in names) for names in shards.values()
    )


@contextmanager
def new_folder(out: Path | str) -> Iterator[Path]:
    """A folder that becomes `out` if the block succeeds, and leaves nothing behind if it does not. Raises as `new_place`."""
    with new_place(out) as partial:
        partial.mkdir(parents=True)
        yield partial


@contextmanager
def new_place(out: Path | str, *, cure: str = "") -> Iterator[Path]:
    """Where to make the file or the folder that becomes `out` if the block succeeds; nothing stays if it does not.

    Every process has a place of its own; what others, for this `out` or one beside it, left when they were killed on this
    machine is removed.
    cure: what a user can do about a full disk. Raises CheckpointError if `out` exists or cannot be written.
    """
    out = Path(out)
    _check_free(out)
    mark = f".partial-{platform.node()}-"
    for left in out.parent.glob(f".*{glob.escape(mark)}*"):
        process = left.name.rpartition(mark)[2]
        if process.isdecimal() and not _runs(int(process)):
            _remove(left)
    partial = out.with_name(f".{out.name}{mark}{os.getpid()}")
    with disk_errors(f"cannot write {out}", cure=cure):
        try:
            yield partial
            for path in (*partial.rglob("*"), partial):
                fsync(path)
            _check_free(out)  # again: another process may have made it meanwhile
            partial.rename(out)
            fsync(out.parent)
        except BaseException:
            _remove(partial)
            raise


def _check_free(out: Path) -> None:
    check_name(out)
    if out.exists() or out.is_symlink():
        raise CheckpointError(f"{out} exists; choose a name that does not")


def _remove(place: Path) -> None:
    if place.is_dir():
        shutil.rmtree(place, ignore_errors=True)
    else:
        place.unlink(missing_ok=True)


def _runs(process: int) -> bool:
    """Whether a process of this machine is alive."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):  # another user's; a number that no process has is no name of ours
        return True
    return True
