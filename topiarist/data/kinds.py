"""Which reader a file gets, by its name."""

from __future__ import annotations

from pathlib import Path

from topiarist.core.errors import CalibrationError
from topiarist.data.compressed import COMPRESSIONS, kind_of, open_bytes
from topiarist.data.readers import ArrayReader, LineReader, Reader, TextReader
from topiarist.data.tables import ColumnReader, ParquetReader, TableReader

_KINDS: dict[str, type[Reader]] = {
    **dict.fromkeys((".txt", ".text", ".md", ".raw", ".tokens"), TextReader),
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), LineReader),
    **dict.fromkeys((".csv", ".tsv"), TableReader),
    ".parquet": ParquetReader,
    ".arrow": ColumnReader,
}


def check_kind(path: Path) -> None:
    """Raise CalibrationError for a file of no kind that is read, naming those that are."""
    if kind_of(path)[0] not in _KINDS:
        raise CalibrationError(
            f"cannot read text from {path}: its kind is not known; known are {', '.join(_KINDS)}, each also with "
            f"{', '.join(COMPRESSIONS)}, a datasets folder, and hub:NAME[:CONFIG]"
        )


def has_fields(path: Path) -> bool:
    """Whether a file's rows have fields, of which one holds the text."""
    return _KINDS.get(kind_of(path)[0]) is not TextReader


def reader_of(path: Path, field: str) -> Reader:
    """The reader for a file's kind. Raises CalibrationError if the kind is not known."""
    check_kind(path)
    kind = kind_of(path)[0]
    if kind == ".json":  # rows a line, as C4's files have them, or one array
        with open_bytes(path) as stream:
            if stream.read(4096).decode("utf-8-sig", "ignore").lstrip().startswith("["):
                return ArrayReader(path, field)
    return _KINDS[kind](path, field)
