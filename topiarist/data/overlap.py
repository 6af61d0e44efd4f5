"""Whether two texts share a source, however their lines are wrapped: hashes of a sample of their passages.

A passage is `PASSAGE` bytes of UTF-8 without blanks. Which passages belong to the sample depends on their own hash
alone (Manber, Finding similar files in a large file system, USENIX 1994), so that the same passage is in the samples of
both texts or of neither.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

PASSAGE = 64
"""Bytes; shorter passages are too common to say that two texts share a source."""
ONE_OF = 128
"""Of so many passages one is in the sample."""
MAX_SHARED = 0.01
"""Fraction of held-out passages that may stand in calibration text: boilerplate, not leakage."""
_BLOCK = 1 << 20
_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so that it has an inverse modulo 2^64
_INVERSE = np.uint64(pow(int(_BASE), -1, 1 << 64))


def passage_hashes(texts: Iterable[str]) -> np.ndarray:
    """The sample of 64-bit hashes of the texts' passages, uint64 (n,), repeats included.

    A text that is shorter than a passage gives the hash of itself.
    """
    found = [hashes for text in texts for hashes in _of_text(text)]
    return np.concatenate(found) if found else np.empty(0, np.uint64)


def shared(hashes: np.ndarray, known: frozenset[int]) -> float:
    """The share of a text's passages, of their hashes (n,), that are among the known."""
    if not known or not len(hashes):
        return 0.0
    return float(np.isin(hashes, np.fromiter(known, np.uint64, len(known))).mean())


def _of_text(text: str) -> Iterable[np.ndarray]:
    raw = np.frombuffer("".join(text.split()).encode(), np.uint8)
    if 0 < len(raw) <= PASSAGE:
        yield _mixed(_windows(raw, len(raw)))
        return
    for begin in range(0, len(raw) - PASSAGE + 1, _BLOCK):
        hashes = _mixed(_windows(raw[begin : begin + _BLOCK + PASSAGE - 1], PASSAGE))
        yield hashes[hashes % np.uint64(ONE_OF) == 0]


def _windows(raw: np.ndarray, length: int) -> np.ndarray:
    """sum_j raw[i + j] * base^j modulo 2^64 of every run of `length` bytes, by differences of one running sum."""
    powers = np.cumprod(np.full(len(raw), _BASE))
    total = np.concatenate([[np.uint64(0)], np.cumsum(raw.astype(np.uint64) * powers)])
    back = np.cumprod(np.full(len(raw) - length + 1, _INVERSE))
    return (total[length:] - total[:-length]) * back


def _mixed(hashes: np.ndarray) -> np.ndarray:
    """Every bit of a hash made to depend on all others (the finaliser of splitmix64)."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        hashes = (hashes ^ (hashes >> np.uint64(shift))) * np.uint64(factor)
    return hashes ^ (hashes >> np.uint64(31))
