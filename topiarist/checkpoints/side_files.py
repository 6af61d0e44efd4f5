"""What stands beside the weights in a model folder: tokenizer, generation config, chat templates, code."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from topiarist.checkpoints.access import check_readable
from topiarist.core.errors import CheckpointError

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".onnx", ".index.json")
FOLDERS = ("additional_chat_templates",)
"""Folders that belong to a tokenizer; whatever else lies in folders is other people's."""
OWN = ("config.json", "README.md", "recipe.yaml")
"""Written anew for every result."""


def side_files(folder: Path) -> Iterator[Path]:
    """Yield the files that a copy of the model needs beside its weights and config, relative to `folder`.

    Not among them: files of topiarist, adapters (their weights stay behind), hidden files.
    Raises CheckpointError for a symbolic link that leads out of the folder, whose target is none of the model's business, or
    nowhere, and for a file that cannot be read.
    """
    places = [folder, *(folder / name for name in FOLDERS if (folder / name).is_dir())]
    for path in sorted(file for place in places for file in place.iterdir()):
        if path.name.endswith(WEIGHT_SUFFIXES) or path.name.startswith((".", "pruning_", "adapter_")):
            continue
        if path.name in OWN and path.parent == folder:
            continue
        if path.is_dir():
            continue
        check_inside(path, folder)
        if not path.exists():
            raise CheckpointError(
                f"{path} is a symbolic link that leads nowhere: download the model again, or remove it"
            )
        if not path.is_file():
            continue
        check_readable(path)
        yield path.relative_to(folder)


def copy_side_files(source: Path, target: Path) -> None:
    """Copy the side files of a model folder. Raises CheckpointError as `side_files`, OSError as copying does."""
    for name in list(side_files(source)):
        (target / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(source / name, target / name)


def check_inside(path: Path, folder: Path) -> None:
    """Raise CheckpointError for a link that leads out of a model folder; in the hub's cache, to other than its blobs."""
    home, target = folder.resolve(), path.resolve()
    blobs = home.parents[1] / "blobs" if home.parent.name == "snapshots" else home
    if not target.is_relative_to(home) and not target.is_relative_to(blobs):
        raise CheckpointError(
            f"{path} is a symbolic link to {target}, outside the model's folder: replace it by a copy, or remove it"
        )
