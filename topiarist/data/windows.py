"""Windows of tokens for calibration and for evaluation. The choice depends on the text, the tokenizer and the seed alone."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from topiarist.core.errors import CalibrationError
from topiarist.data.draw import draw_windows, is_long
from topiarist.data.overlap import passage_hashes, shared
from topiarist.data.record import record
from topiarist.data.text import CALIBRATION, HELD_OUT, Rows, TextFiles, pieces, readers
from topiarist.data.tokenizer import Bos, start_tokens
from topiarist.data.tokens import token_parts


@dataclass(frozen=True)
class Windows:
    """Token windows (num, window), int64, with what identifies them."""

    tokens: Int[Tensor, "num window"]
    digest: str
    """sha256 of the chosen tokens."""
    passages: frozenset[int]
    """64-bit hashes of a sample of the source's passages, to tell calibration from held-out text."""
    overlap: float = 0.0
    """The share of the text that stands in the calibration text too."""
    start: int = 0
    """Start tokens before the text of every window; the model is not asked to predict them."""

    @property
    def window(self) -> int:
        """Tokens of a window."""
        return self.tokens.shape[1]

    def record(self, earlier: frozenset[int] = frozenset()) -> str:
        """JSON of what an evaluation needs to tell its text from this one; kept beside the result.

        earlier: passages of the texts that made the model before.
        """
        return record(self.digest, self.passages | earlier)


def calibration_windows(
    source: TextFiles | Shaped[Tensor, "..."] | Sequence[Any],
    tokenizer: Any,
    *,
    num_samples: int = 128,
    window: int,
    seed: int = 0,
    bos: Bos = "never",
) -> Windows:
    """Pick `num_samples` windows at random from all windows of the source (a Tensor (num, window) is taken as it is).

    Text of up to 8 MiB without compression, or 64 bytes a token asked for, is tokenised whole. Of longer text only the
    windows are, and only their text is told from held-out text later (see draw.py).
    bos: whether every window begins with the tokenizer's start token, in place of its last token.
    Raises CalibrationError if the text holds fewer windows than asked for.
    """
    if isinstance(source, Tensor):
        tokens = given_windows(source)
        return Windows(tokens, _digest(tokens), frozenset())
    if num_samples < 1 or window < 2:
        raise CalibrationError(f"need at least 1 sample of 2 tokens, got {num_samples} of {window}")
    start = start_tokens(tokenizer, bos)
    length = text_room(window, start)
    files = readers(source, CALIBRATION) if isinstance(source, TextFiles) else []
    if files and is_long(files, num_samples * window):
        rows = Rows(tokenizer)
        drawn, texts = draw_windows(files, rows, tokenizer, num=num_samples, length=length, seed=seed)
        rows.warn()
        return _windows(drawn, start, passage_hashes(texts))
    stream, hashes = _tokenize(pieces(source, tokenizer=tokenizer, usual=CALIBRATION), tokenizer)
    available = len(stream) // length
    check_any(len(stream))
    if available < num_samples:
        raise CalibrationError(
            f"calibration text holds {len(stream):,} tokens = {available} windows of {window}, {num_samples} were asked "
            "for; add text, or ask for fewer samples or a shorter window"
        )
    order = torch.randperm(available, generator=torch.Generator().manual_seed(seed))[:num_samples]
    return _windows(stream[: available * length].reshape(available, length)[order.numpy()], start, hashes)


def evaluation_windows(
    source: TextFiles | Sequence[Any],
    tokenizer: Any,
    *,
    window: int,
    max_windows: int | None = None,
    calibration: frozenset[int] = frozenset(),
    bos: Bos = "never",
    usual: Sequence[str] = HELD_OUT,
) -> Windows:
    """The first windows of the source in order; the rest that fills no window is dropped.

    calibration: passages of calibration text, to state the `overlap` with it. bos: as for calibration. usual: splits of a
    dataset that are read when the source names none.
    Raises CalibrationError if there is not one whole window, and for a window below 2 tokens.
    """
    if window < 2:
        raise CalibrationError(f"a window of {window} tokens predicts nothing: 2 is the least")
    if max_windows is not None and max_windows < 1:
        raise CalibrationError(f"{max_windows} windows is nothing to evaluate on: 1 is the least")
    start = start_tokens(tokenizer, bos)
    length = text_room(window, start)
    texts = pieces(source, tokenizer=tokenizer, usual=usual)
    stream, hashes = _tokenize(texts, tokenizer, None if max_windows is None else max_windows * length)
    available = len(stream) // length
    check_any(len(stream))
    if available == 0:
        raise CalibrationError(f"text holds {len(stream):,} tokens, less than one window of {window}; shorten --window")
    available = min(available, max_windows or available)
    tokens = stream[: available * length].reshape(available, length)
    return _windows(tokens, start, hashes, overlap=shared(hashes, calibration))


def given_windows(tokens: Shaped[Tensor, "..."], what: str = "calibration") -> Int[Tensor, "num window"]:
    """Token windows that were given as a tensor, as int64 on the CPU, where text would have them.

    Raises CalibrationError for a tensor of another shape, an empty one, and one of anything but whole numbers.
    """
    if tokens.ndim != 2 or tokens.numel() == 0:
        raise CalibrationError(f"{what} tokens must be (num, window), got shape {tuple(tokens.shape)}")
    if tokens.is_floating_point() or tokens.is_complex():
        raise CalibrationError(f"{what} tokens must be whole numbers, got {tokens.dtype}: give token ids")
    return tokens.long().cpu()


def check_vocabulary(tokens: Int[Tensor, "num window"], size: int, what: str = "calibration") -> None:
    """Raise CalibrationError if a token is outside the model's vocabulary of that size."""
    lowest, highest = int(tokens.min()), int(tokens.max())
    if lowest < 0 or highest >= size:
        raise CalibrationError(
            f"{what} token {lowest if lowest < 0 else highest} is outside the model's vocabulary of {size}: is this the "
            "model's own tokenizer?"
        )


def check_any(num_tokens: int) -> None:
    """Raise CalibrationError for a text without tokens, which no shorter window helps."""
    if not num_tokens:
        raise CalibrationError("the text is empty: its documents hold no tokens; name another file, field or split")


def _tokenize(
    texts: Iterable[tuple[str, bool]], tokenizer: Any, enough: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(ids (n,), hashes of the passages) of the text, or of as much of it as `enough` tokens take."""
    ids: list[np.ndarray] = [np.empty(0, np.int64)]
    hashes: list[np.ndarray] = [np.empty(0, np.uint64)]
    total = 0
    for text, part in token_parts(texts, tokenizer):
        ids.append(part)
        hashes.append(passage_hashes([text]))
        total += len(part)
        if enough is not None and total >= enough:
            break
    return np.concatenate(ids), np.concatenate(hashes)


def text_room(window: int, start: Sequence[int]) -> int:
    """Tokens of text in a window, beside its start tokens. Raises CalibrationError if there are none."""
    if window <= len(start):
        raise CalibrationError(f"a window of {window} tokens has no room for text beside {len(start)} start tokens")
    return window - len(start)


def _windows(ids: np.ndarray, start: Sequence[int], hashes: np.ndarray, overlap: float = 0.0) -> Windows:
    whole = np.concatenate([np.tile(np.asarray(start, dtype=np.int64), (len(ids), 1)), ids], axis=1)
    tokens = torch.from_numpy(np.ascontiguousarray(whole))
    return Windows(tokens, _digest(tokens), frozenset(np.unique(hashes).tolist()), overlap, len(start))


def _digest(tokens: Tensor) -> str:
    return hashlib.sha256(tokens.numpy().astype("<i8").tobytes()).hexdigest()
