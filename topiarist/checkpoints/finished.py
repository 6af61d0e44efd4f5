"""A finished run, held against what its report says of its files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from topiarist.checkpoints.reading import file_digest
from topiarist.core.errors import CheckpointError


def check_files(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    """Compare a finished run's files with its report. Raises CheckpointError for the first that differs."""
    for name, known in files.items():
        path = folder / name
        if not path.is_file():
            fault = "is missing"
        elif path.stat().st_size != known["bytes"] or file_digest(path) != known["sha256"]:
            fault = "is not what the run wrote"
        else:
            continue
        raise CheckpointError(
            f"{folder} is finished, but {name} {fault}: delete the folder and run the same command again"
        )
