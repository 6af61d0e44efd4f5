"""A finished run, held against what its report says of its files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from topiarist.checkpoints.atomic import write_atomically
from topiarist.checkpoints.reading import INDEX, PACKED, file_digest, read_json
from topiarist.core.errors import CheckpointError

REPORT = "pruning_report.json"


def read_finished(folder: Path) -> dict[str, Any]:
    """The report of a finished run. Raises CheckpointError if it is damaged: its `fingerprint` and `files` are JSON objects."""
    report = read_json(folder / REPORT, cure=f"delete {folder}, or choose another output")
    if not all(isinstance(report.get(part, {}), dict) for part in ("fingerprint", "files")):
        raise CheckpointError(f"{folder / REPORT} is damaged; delete {folder}, or choose another output")
    return report


def check_files(folder: Path, files: Mapping[str, Any]) -> None:
    """Compare a finished run's files with its report. Raises CheckpointError for the first that differs."""
    for name, known in files.items():
        path = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts or not isinstance(known, Mapping):
            fault = "is damaged in its report"
        elif not path.is_file():
            fault = "is missing"
        elif path.stat().st_size != known.get("bytes") or file_digest(path) != known.get("sha256"):
            fault = "is not what the run wrote"
        else:
            continue
        raise CheckpointError(
            f"{folder} is finished, but {name} {fault}: delete the folder and run the same command again"
        )


def described(path: Path) -> dict[str, Any]:
    """Return what a report says of a file."""
    return {"bytes": path.stat().st_size, "sha256": file_digest(path)}


def describe_again(source: Path, folder: Path) -> None:
    """Let the report in `folder`, if it has one, say what its files are: those of `source`, but packed or unpacked weights."""
    if not (folder / REPORT).is_file():
        return
    report = read_json(source / REPORT, cure=f"copy {source} again")
    if not isinstance(known := report.get("files"), dict):
        return
    weights = sorted(path.name for kind in ("model", "packed-") for path in folder.glob(f"{kind}*.safetensors"))
    anew = [*weights, INDEX, PACKED]
    files = {
        name: described(folder / name) if name in (*anew, "config.json") else known[name]
        for name in dict.fromkeys((*anew, *known))
        if (folder / name).is_file()
    }
    write_atomically(folder / REPORT, json.dumps(report | {"files": files}, indent=2) + "\n")


def check_finished(folder: Path) -> None:
    """Raise CheckpointError unless the files of a finished run, packed or not, are what its report says."""
    check_files(folder, read_finished(folder).get("files", {}))
