"""Readers of text and JSON: all rows in order, or single rows by number once the file is indexed."""

from __future__ import annotations

import io
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np

from topiarist.core.errors import CalibrationError
from topiarist.data.compressed import kind_of, open_bytes

SEPARATOR = "\n\n"
"""Between two documents of a stream of text."""
LONG_TEXT = 1 << 22
"""Characters of a text file that are held at once: a longer file comes in pieces."""
BLOCK = 1 << 16
"""Bytes of a text file that one row of its index stands for."""
_SCAN = 1 << 23
_MAX_ARRAY = 1 << 28  # bytes; a JSON array is parsed whole, at about five times its size in memory


class Reader(ABC):
    """One file. A row's value is what stands in the field: a text, or chat messages."""

    separator = SEPARATOR
    """What stands between two rows."""

    def __init__(self, path: Path, field: str) -> None:
        self.path, self.field = path, field

    @abstractmethod
    def values(self) -> Iterator[Any]:
        """Every row's value, in order."""

    @abstractmethod
    def size(self, limit: int) -> int:
        """Bytes of the file without compression, or any number above `limit` if there are more."""

    @property
    @abstractmethod
    def sizes(self) -> np.ndarray:
        """Bytes of every row, int64 (rows,): how likely a draw is to begin there. Reads the file once."""

    @abstractmethod
    def value(self, row: int) -> Any:
        """One row's value; cheap for rows in ascending order."""

    def where(self, row: int) -> str:
        """How messages name a row; `row` counts from 0, the message from 1."""
        return f"{self.path} row {row + 1}"

    def lacks_field(self, where: str, known: Sequence[str]) -> CalibrationError:
        """The error to raise when the field is missing; `known` are the fields that there are."""
        return CalibrationError(
            f"{where} has no field `{self.field}`; it has {', '.join(map(str, known)) or 'none'}: name one with --text-field"
        )

    def check_field(self, known: Sequence[str]) -> None:
        """Raise CalibrationError if the field is none of those there are, or is two of them."""
        if known.count(self.field) > 1:
            raise CalibrationError(f"{self.path} has several columns `{self.field}`: rename all but one")
        if self.field not in known:
            raise self.lacks_field(str(self.path), known)


class ByteReader(Reader):
    """A reader of the file's bytes, compressed or not."""

    @cached_property
    def stream(self) -> io.BufferedIOBase:
        """Kept open for single rows."""
        return open_bytes(self.path)

    def close(self) -> None:
        """Close what single rows were read from."""
        if stream := vars(self).pop("stream", None):
            stream.close()

    def size(self, limit: int) -> int:
        """Bytes of the file; a compressed one is unpacked no further than to see that it has more than `limit`."""
        if not kind_of(self.path)[1]:
            return self.path.stat().st_size
        with open_bytes(self.path) as stream:
            return sum(len(found) for found in _chunks(stream, limit + 1))


class TextReader(ByteReader):
    """Plain text: one document. Its rows are blocks of `BLOCK` bytes, for a draw from a file of any length."""

    separator = ""

    def values(self) -> Iterator[str]:
        """The document, in several pieces if it is long. Raises CalibrationError for NUL bytes, which no text has."""
        with open_bytes(self.path) as stream, io.TextIOWrapper(cast(Any, stream), encoding="utf-8-sig") as text:
            rest = ""
            while found := text.read(LONG_TEXT):
                rest += self._checked(found)
                if len(rest) >= LONG_TEXT:
                    end = good_cut(rest)
                    yield rest[:end]
                    rest = rest[end:]
            if rest:
                yield rest

    @cached_property
    def sizes(self) -> np.ndarray:
        """Bytes of every block of the file, int64 (blocks,): `BLOCK`, and what is left for the last."""
        total = self.size(1 << 62)
        return np.diff(np.append(np.arange(0, total, BLOCK), total))

    def value(self, row: int) -> str:
        r"""The text of one block: the characters whose first byte lies in it, with line ends as \n."""
        before = min(row, 1)
        self.stream.seek(row * BLOCK - before)
        raw = self.stream.read(before + BLOCK + 3)
        split, raw = raw[: before + 1] == b"\r\n", raw[before:]
        # A character belongs to the block in which its first byte stands, and so does a line end.
        begin, end = _first_byte(raw, 0) + split, _first_byte(raw, min(BLOCK, len(raw)))
        text = raw[begin:end].decode("utf-8-sig" if row == 0 else "utf-8")
        return self._checked(text).replace("\r\n", "\n").replace("\r", "\n")

    def _checked(self, text: str) -> str:
        if "\0" in text:
            raise CalibrationError(
                f"cannot read text from {self.path}: it holds NUL bytes, as UTF-16 and binary files do; convert it to UTF-8"
            )
        return text


class LineReader(ByteReader):
    """JSON, one row a line."""

    def where(self, row: int) -> str:
        """How messages name a row: by its line, from 1."""
        return f"{self.path} line {row + 1}"

    def values(self) -> Iterator[Any]:
        """The field of every line that is not blank. Raises CalibrationError for a line that is no JSON object with it."""
        with open_bytes(self.path) as stream:
            for row, line in enumerate(stream):
                if line.strip():
                    yield self._parse(row, line)

    @cached_property
    def _ends(self) -> np.ndarray:
        """Where every line ends, in bytes."""
        ends, position = [], 0
        with open_bytes(self.path) as stream:
            for found in _chunks(stream):
                ends.append(np.flatnonzero(np.frombuffer(found, np.uint8) == ord("\n")) + (position + 1))
                position += len(found)
        joined = np.concatenate(ends) if ends else np.empty(0, np.int64)
        return joined if position == (joined[-1] if len(joined) else 0) else np.append(joined, position)

    @cached_property
    def sizes(self) -> np.ndarray:
        """Bytes of every line, int64 (lines,); 0 for a blank one."""
        lengths = np.diff(self._ends, prepend=0)
        return np.where(lengths > len("\r\n"), lengths, 0)  # blank lines are no rows

    def value(self, row: int) -> Any:
        """The field of one line, "" if it is blank. Raises CalibrationError as `values` does."""
        begin = int(self._ends[row - 1]) if row else 0
        self.stream.seek(begin)
        line = self.stream.read(int(self._ends[row]) - begin)
        return self._parse(row, line) if line.strip() else ""

    def _parse(self, row: int, line: bytes) -> Any:
        try:
            found = json.loads(line.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            raise CalibrationError(f"cannot read text from {self.where(row)}: {error}: convert it to UTF-8") from None
        except (ValueError, RecursionError) as error:
            raise CalibrationError(f"cannot read text from {self.where(row)}: it is not JSON ({error})") from None
        return self._in_field(row, found)

    def _in_field(self, row: int, found: Any) -> Any:
        if not isinstance(found, dict):
            raise CalibrationError(f"{self.where(row)} is not a JSON object with a field `{self.field}`")
        if self.field not in found:
            raise self.lacks_field(self.where(row), list(found))
        return found[self.field]


class ArrayReader(LineReader):
    """JSON, one array of rows."""

    where = Reader.where

    @cached_property
    def _rows(self) -> list[Any]:
        if self.size(_MAX_ARRAY) > _MAX_ARRAY:
            raise CalibrationError(
                f"{self.path} is one array of over {_MAX_ARRAY >> 20} MB; write a row a line (.jsonl)"
            )
        with open_bytes(self.path) as stream:
            text = stream.read().decode("utf-8-sig")  # what is not UTF-8 is named by `reading`
            try:
                return json.loads(text)
            except (ValueError, RecursionError) as error:
                raise CalibrationError(f"cannot read text from {self.path}: it is not JSON ({error})") from None

    def values(self) -> Iterator[Any]:
        """The field of every element. Raises CalibrationError if the file is too large, or an element lacks the field."""
        return map(self.value, range(len(self._rows)))

    @cached_property
    def sizes(self) -> np.ndarray:
        """Characters of every element's value, int64 (rows,), in place of bytes, which are not known once it is parsed."""
        return np.array([len(str(value)) for value in self.values()], dtype=np.int64)

    def value(self, row: int) -> Any:
        """The field of one element, from the array that is held in memory."""
        return self._in_field(row, self._rows[row])


def good_cut(text: str) -> int:
    """Where a text that goes on can be cut without changing its tokens: before the word after its last blank, if any.

    Tokenizers that split words at blanks give the two parts the tokens they have in the whole.
    """
    late = max(0, len(text) - (1 << 16))
    line = text.rfind("\n", late, -1)
    if line >= 0 and not text[line + 1].isspace():
        return line + 1
    found = [match.start() for match in re.finditer(r"(?<=\S) (?=\S)", text[late:])]
    return late + found[-1] if found else len(text)


def _chunks(stream: io.BufferedIOBase, limit: int = 1 << 62) -> Iterator[bytes]:
    """The stream's bytes, at most `limit` of them, some megabytes at a time."""
    while limit > 0 and (found := stream.read(min(_SCAN, limit))):
        limit -= len(found)
        yield found


def _first_byte(raw: bytes, at: int) -> int:
    """The first position from `at` on that begins a UTF-8 character."""
    while at < len(raw) and raw[at] & 0xC0 == 0x80:
        at += 1
    return at
