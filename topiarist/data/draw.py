"""Windows drawn from text that is too long to be tokenised whole.

The files are indexed once: how many bytes every row takes. A place is drawn evenly among all bytes, and the text is
tokenised from there, through the rows that follow, until a window is full. Windows never share text.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from topiarist.core.errors import CalibrationError
from topiarist.data.folders import HubRows
from topiarist.data.readers import SEPARATOR, ByteReader, Reader
from topiarist.data.text import Rows, reading
from topiarist.data.tokens import ids_of

SMALL = 1 << 23
"""Bytes of text that are tokenised whole, so that the windows are a sample of all windows."""
SPARSE = 64
"""Bytes of text for every token that is asked for, below which text is tokenised whole however long it is."""
_ROUNDS = 50
_SPARE = 8  # tokens after the window, so that the cut end of the text has no part in it


def is_long(readers: Sequence[Reader | HubRows], tokens: int) -> bool:
    """Whether windows of so many tokens in all are drawn instead of sampled from the tokenised whole."""
    limit, total = max(SMALL, SPARSE * tokens), 0
    for reader in readers:
        if isinstance(reader, HubRows):
            return True
        with reading(reader.path):
            total += reader.size(limit - total)
        if total > limit:
            return True
    return False


def draw_windows(
    readers: Sequence[Reader | HubRows], rows: Rows, tokenizer: Any, *, num: int, length: int, seed: int
) -> tuple[np.ndarray, list[str]]:
    """Token ids (num, length), int64, in the order of the draw, and the text of each window.

    Depends on the files, the tokenizer, `num`, `length` and `seed` alone. Raises CalibrationError if the text holds too few.
    """
    generator = torch.Generator().manual_seed(seed)
    hub = [reader for reader in readers if isinstance(reader, HubRows)]
    if 0 < len(hub) < len(readers):
        other = next(reader.path for reader in readers if not isinstance(reader, HubRows))
        raise CalibrationError(
            f"windows of {hub[0].path} are drawn as it arrives, of unknown length, so that {other} beside it has no known "
            "share: name datasets of the hub alone"
        )
    if hub:
        return _from_hub(hub, rows, tokenizer, num, length, seed, generator)
    files = [reader for reader in readers if isinstance(reader, Reader)]
    try:
        return _from_files(_Text(files, rows), tokenizer, num, length, generator)
    finally:
        for reader in files:
            if isinstance(reader, ByteReader):
                reader.close()


class _Text:
    """All rows of all files as one line of bytes."""

    def __init__(self, readers: Sequence[Reader], rows: Rows) -> None:
        self.readers, self.rows = readers, rows
        sizes = []
        for reader in readers:
            with reading(reader.path):
                sizes.append(reader.sizes)
        self.firsts = np.cumsum([0, *map(len, sizes)])
        self.ends = np.cumsum(np.concatenate([np.empty(0, np.int64), *sizes]))
        self.total = float(self.ends[-1]) if len(self.ends) else 0.0

    def window(self, place: float, tokenizer: Any, length: int) -> tuple[np.ndarray, str, float] | None:
        """(ids (length,), their text, where it ends in bytes) from a place on; None if the text ends before."""
        wanted = 8 * length + 64
        while True:
            text, spans, ended = self._read(place, wanted)
            ids = ids_of(text, tokenizer)
            if len(ids) >= length + (0 if ended else _SPARE):
                used = _characters(text, tokenizer, length)
                first, byte, each = spans[bisect_right(spans, (used, 0.0, 0.0)) - 1]
                return ids[:length], text[:used], byte + (used - first) * each
            if ended:
                return None
            wanted *= 2

    def _read(self, place: float, wanted: int) -> tuple[str, list[tuple[int, float, float]], bool]:
        """At least `wanted` characters from a place on, and whether the text ends there.

        With them the spans: (first character, where it stands in bytes, bytes a character) of every row in it.
        """
        row = int(np.searchsorted(self.ends, place, side="right"))
        spans: list[tuple[int, float, float]] = []
        text = joint = ""
        while row < len(self.ends) and len(text) < wanted:
            begin = float(self.ends[row - 1]) if row else 0.0
            size = float(self.ends[row]) - begin
            whole, separator = self._row(row)
            start = _word_after(whole, (place - begin) / size) if not text and place > begin else 0
            if part := whole[start : start + wanted - len(text)]:
                text += joint if text else ""
                each = size / len(whole)
                spans.append((len(text), begin + start * each, each))
                text += part
                joint = separator
            row += 1
        return text, spans, len(text) < wanted

    def _row(self, row: int) -> tuple[str, str]:
        """A row's text, "" if it holds none, and what stands between it and the next."""
        file = int(np.searchsorted(self.firsts, row, side="right")) - 1
        reader, number = self.readers[file], row - int(self.firsts[file])
        separator = SEPARATOR if row + 1 == self.firsts[file + 1] else reader.separator
        with reading(reader.path):
            value = reader.value(number)
            # A block of a text file is no row of its own.
            text = value if reader.separator != SEPARATOR else self.rows.text(value, reader.where(number))
        return text, separator


def _from_files(
    text: _Text, tokenizer: Any, num: int, length: int, generator: torch.Generator
) -> tuple[np.ndarray, list[str]]:
    found: dict[int, tuple[np.ndarray, str]] = {}
    taken: list[tuple[float, float]] = []
    for _ in range(_ROUNDS):
        missing = [number for number in range(num) if number not in found]
        places = torch.rand(len(missing), generator=generator, dtype=torch.float64) * text.total
        # In the order of the files, so that a compressed one is read once a round.
        for place, number in sorted(zip(places.tolist(), missing, strict=True)):
            if _meets(taken, place, place):
                continue
            window = text.window(place, tokenizer, length)
            if window is None or _meets(taken, place, window[2]):
                continue
            insort(taken, (place, window[2]))
            found[number] = window[:2]
        if len(found) == num:
            return np.stack([found[i][0] for i in range(num)]), [found[i][1] for i in range(num)]
    raise CalibrationError(
        f"the text holds too few separate windows of {length} tokens: {num} were asked for, {len(found)} found; add text, "
        "or ask for fewer or shorter windows"
    )


def _from_hub(
    hub: Sequence[HubRows], rows: Rows, tokenizer: Any, num: int, length: int, seed: int, generator: torch.Generator
) -> tuple[np.ndarray, list[str]]:
    """Of datasets that arrive row by row: a window from every row that is drawn, at a place in it that is drawn too."""
    found: list[np.ndarray] = []
    texts: list[str] = []
    shares = [num // len(hub) + (i < num % len(hub)) for i in range(len(hub))]
    for reader, share in zip(hub, shares, strict=True):
        values = _texts(reader, rows, seed)
        for _ in range(share):
            text, ids, wanted, ended = "", np.empty(0, np.int64), 8 * length + 64, False
            while len(ids) < length + (0 if ended else _SPARE):
                if ended:
                    raise CalibrationError(
                        f"{reader.path} holds too few windows of {length} tokens: {num} were asked for"
                    )
                while len(text) < wanted and not ended:
                    more = next(values, "")
                    ended = not more
                    start = 0 if text else _word_after(more, float(torch.rand((), generator=generator)))
                    text = SEPARATOR.join(filter(None, [text, more[start:]]))
                ids = ids_of(text[:wanted], tokenizer)
                wanted *= 2
            found.append(ids[:length])
            texts.append(text[: _characters(text[: wanted // 2], tokenizer, length)])
    return np.stack(found), texts


def _texts(reader: HubRows, rows: Rows, seed: int) -> Iterator[str]:
    for number, value in enumerate(reader.shuffled(seed)):
        if text := rows.text(value, reader.where(number)):
            yield text


def _word_after(text: str, share: float) -> int:
    """Where the first word begins after a share of the text; exactly there if no blank is near."""
    start = int(share * len(text))
    blank = re.compile(r"\s\S").search(text, start, start + 256)
    return blank.start() + 1 if blank else start


def _characters(text: str, tokenizer: Any, length: int) -> int:
    """How many characters the first `length` tokens take; all of them if the tokenizer cannot say."""
    if not getattr(tokenizer, "is_fast", False):
        return len(text)
    found = tokenizer(text, add_special_tokens=False, verbose=False, return_offsets_mapping=True)
    return int(found["offset_mapping"][length - 1][1]) or len(text)


def _meets(taken: list[tuple[float, float]], begin: float, end: float) -> bool:
    """Whether [begin, end) shares bytes with a taken interval; those are sorted and share none among themselves."""
    at = bisect_left(taken, (begin, end))
    return (at < len(taken) and taken[at][0] < end) or (at > 0 and taken[at - 1][1] > begin)
