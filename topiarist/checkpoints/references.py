"""How a result says where its dense model is, so that others find it: a hub id, or a path relative to the result."""

from __future__ import annotations

import os
from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

MODEL = "MODEL"
"""Stands for a model object in a command or a recipe."""


def reference(name: str | Path, result: Path) -> str:
    """Return how the folder `result` names a model: a hub id, a path that begins with a dot, or nothing.

    name: as the user gave it; a snapshot in the hub's cache counts as its hub id.
    """
    path = Path(name)
    if path.parent.name == "snapshots" and path.parents[1].name.startswith("models--"):
        return path.parents[1].name.removeprefix("models--").replace("--", "/", 1)
    if os.path.exists(path) and str(name):
        way = Path(os.path.relpath(path.resolve(), result.resolve())).as_posix()
        return way if way.startswith("../") else f"./{way}"  # never to be taken for a hub id
    try:
        validate_repo_id(str(name))
    except HFValidationError:
        return ""
    return str(name)


def resolved(reference: str, result: Path) -> str:
    """Return the model that the folder `result` refers to, for whoever opens it from the current folder."""
    if not reference.startswith("."):
        return reference
    plain, real = (os.path.normpath(place / reference) for place in (result, result.resolve()))
    return plain if os.path.realpath(plain) == os.path.realpath(real) else real  # "..": of a link, of where it leads
