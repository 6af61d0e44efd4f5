"""Where text lies, and its documents in order: files of every kind, datasets folders, the hub, lists in memory."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from topiarist.checkpoints.access import check_name
from topiarist.core.errors import CalibrationError, CalibrationWarning, CheckpointError
from topiarist.data.compressed import DAMAGE
from topiarist.data.folders import HUB, HubRows, folder_readers, hub_rows
from topiarist.data.kinds import check_kind, has_fields, reader_of
from topiarist.data.readers import SEPARATOR, Reader, TextReader

CALIBRATION = ("train",)
HELD_OUT = ("test", "validation")
"""Splits of a dataset that are read when none is named."""


@dataclass(frozen=True)
class TextFiles:
    """Where text lies; nothing is read until it is needed."""

    paths: tuple[Path, ...]
    field: str = "text"
    """Of rows: the one that holds the text, or chat messages for the tokenizer's template."""
    split: str | None = None
    """Of datasets; by default `train` for calibration and training, `test` or `validation` for evaluation."""


def text_files(paths: str | Path | Iterable[str | Path], *, field: str = "text", split: str | None = None) -> TextFiles:
    """Name one or several text sources: files, datasets folders, or datasets of the hub as hub:NAME[:CONFIG].

    field: of rows, the one that holds the text or the chat messages. split: of datasets; see `TextFiles`.
    Raises CalibrationError if one does not exist, is of no kind that can be read or has a name that is no UTF-8, and for a
    field or a split that none has.
    """
    listed = [paths] if isinstance(paths, str | Path) else list(paths)
    if not listed:
        raise CalibrationError("no text files given: name at least one .txt, .jsonl, .parquet or datasets folder")
    for path in listed:
        try:
            check_name(Path(path))
        except CheckpointError as error:
            raise CalibrationError(str(error)) from None
        if str(path).startswith(HUB):
            continue
        if not str(path):
            raise CalibrationError("a text file without a name: name a .txt, .jsonl, .parquet or datasets folder")
        if not Path(path).exists():
            raise CalibrationError(f"text file {path} does not exist")
        if not Path(path).is_dir():
            check_kind(Path(path))
    source = TextFiles(tuple(Path(path) for path in listed), field, split)
    check_heeded(source)
    return source


def check_heeded(source: TextFiles) -> None:
    """Raise CalibrationError for a field or a split that none of the sources has: it would be ignored without a word."""
    first = source.paths[0]
    datasets = [path for path in source.paths if str(path).startswith(HUB) or path.is_dir()]
    if source.split is not None and not datasets:
        raise CalibrationError(f"--split {source.split} is for datasets, and {first} is a file: leave it out")
    if not datasets:  # of their files it is known once they are opened
        _check_field(source, any(map(has_fields, source.paths)))


def _check_field(source: TextFiles, heeded: bool) -> None:
    if source.field != TextFiles.field and not heeded:
        raise CalibrationError(
            f"--text-field {source.field} is for rows with fields, and {source.paths[0]} has none: leave it out"
        )


def readers(source: TextFiles, usual: Sequence[str]) -> list[Reader | HubRows]:
    """A reader for every file of the source. usual: splits that are read when it names none.

    Raises CalibrationError for a file that cannot be read, and for a field that none of the files has.
    """
    found: list[Reader | HubRows] = []
    for path in source.paths:
        if str(path).startswith(HUB):
            found.append(hub_rows(str(path), source.field, source.split, usual))
        elif path.is_dir():
            found += folder_readers(path, source.field, source.split, usual)
        else:
            with reading(path):
                found.append(reader_of(path, source.field))
    if any(path.is_dir() for path in source.paths):  # files were told apart when they were named, perhaps beside others
        _check_field(source, not all(isinstance(reader, TextReader) for reader in found))
    return found


@contextmanager
def reading(path: object) -> Iterator[None]:
    """Turns what a damaged file raises into a CalibrationError."""
    try:
        yield
    except DAMAGE as error:
        cure = ": convert it to UTF-8" if isinstance(error, UnicodeDecodeError) else ""
        raise CalibrationError(f"cannot read text from {path}: {error}{cure}") from error


class Rows:
    """Rows' values as texts. Counts those that hold none, and says so at the end."""

    def __init__(self, tokenizer: Any = None) -> None:
        self.tokenizer, self.empty, self.seen = tokenizer, 0, 0

    def text(self, value: Any, where: str) -> str:
        """The text of a value, "" if it is blank. Raises CalibrationError for a value that is no text, null among them."""
        self.seen += 1
        if isinstance(value, list) and value and all(isinstance(turn, dict) for turn in value):
            value = self._conversation(value, where)
        if isinstance(value, str) and not value.strip():
            self.empty += 1
            return ""
        if value is None:
            raise CalibrationError(f'{where} holds null where text is expected: leave such rows out, or put "" there')
        if not isinstance(value, str):
            raise CalibrationError(f"{where} holds {type(value).__name__} where text is expected")
        # Half of a surrogate pair, which JSON can spell, is no character; a tokenizer refuses it.
        return value if value.isascii() else value.encode("utf-8", "replace").decode()

    def _conversation(self, messages: list[Any], where: str) -> str:
        if getattr(self.tokenizer, "chat_template", None) is None:
            raise CalibrationError(f"{where} holds chat messages, and the tokenizer has no chat template for them")
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False)
        except Exception as error:  # templates raise what they like
            raise CalibrationError(f"the chat template does not take the messages of {where}: {error}") from error

    def warn(self) -> None:
        """Warn (CalibrationWarning) of rows that held no text, if there were any."""
        if self.empty:
            warnings.warn(
                f"{self.empty:,} of {self.seen:,} rows hold no text and were skipped", CalibrationWarning, stacklevel=3
            )


def read_documents(
    source: TextFiles | Sequence[Any], *, tokenizer: Any = None, usual: Sequence[str] = CALIBRATION
) -> Iterator[str]:
    """Every document, in order. Blank rows are skipped, and counted in a warning at the end.

    tokenizer: its chat template makes text of chat messages. usual: splits that are read when the source names none.
    Raises CalibrationError for an unreadable file and for a row that is no text.
    """
    parts: list[str] = []
    for text, ends in pieces(source, tokenizer=tokenizer, usual=usual):
        parts.append(text)
        if ends:
            yield "".join(parts)
            parts = []


def pieces(
    source: TextFiles | Sequence[Any], *, tokenizer: Any = None, usual: Sequence[str] = CALIBRATION
) -> Iterator[tuple[str, bool]]:
    """(text, whether its document ends there), so that a long document need not be in memory whole."""
    rows = Rows(tokenizer)
    if not isinstance(source, TextFiles):
        for number, value in enumerate(source, 1):
            if text := rows.text(value, f"calibration text {number}"):
                yield text, True
        rows.warn()
        return
    for reader in readers(source, usual):
        with reading(reader.path):
            yield from _pieces_of(reader, rows)
    rows.warn()


def _pieces_of(reader: Reader | HubRows, rows: Rows) -> Iterator[tuple[str, bool]]:
    values = enumerate(reader.values())
    if isinstance(reader, Reader) and reader.separator != SEPARATOR:  # all rows are one document
        previous, begun = "", False
        for _, value in values:
            if previous:
                yield previous, False
                begun = True
            previous = value
        if begun or previous.strip():  # what was begun ends, were its last piece blank
            yield previous, True
        return
    for row, value in values:
        if text := rows.text(value, reader.where(row)):
            yield text, True
