"""What stands beside the weights in a model folder: tokenizer, generation config, chat templates, code."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from topiarist.core.errors import CheckpointError

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".onnx", ".index.json")
FOLDERS = ("additional_chat_templates",)
"""Folders that belong to a tokenizer; whatever else lies in folders is other people's."""
_OWN = ("config.json", "README.md")
"""Written anew for every result."""


def side_files(folder: Path) -> Iterator[Path]:
    """Yield the files that a copy of the model needs beside its weights and config, relative to `folder`.

    Not among them: files of topiarist, adapters (their weights stay behind), hidden files.
    Raises CheckpointError for a symbolic link that leads out of the folder: its target is none of the model's business.
    """
    places = [folder, *(folder / name for name in FOLDERS if (folder / name).is_dir())]
    for path in sorted(file for place in places for file in place.iterdir()):
        if path.name.endswith(WEIGHT_SUFFIXES) or path.name.startswith((".", "pruning_", "adapter_")):
            continue
        if path.name in _OWN and path.parent == folder:
            continue
        if not path.is_file():
            continue
        if not inside(path.resolve(), folder):
            raise CheckpointError(
                f"{path} is a symbolic link to {path.resolve()}, outside the model's folder: replace it by a copy, or remove it"
            )
        yield path.relative_to(folder)


def copy_side_files(source: Path, target: Path) -> None:
    """Copy the side files of a model folder. Raises CheckpointError as `side_files`, OSError as copying does."""
    for name in list(side_files(source)):
        (target / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(source / name, target / name)


def inside(target: Path, folder: Path) -> bool:
    """Whether a file lies in a model folder; those of the hub's cache are links to blobs beside the snapshots."""
    home = folder.resolve()
    if target.is_relative_to(home):
        return True
    return home.parent.name == "snapshots" and target.is_relative_to(home.parents[1] / "blobs")
