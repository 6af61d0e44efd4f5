"""Training text as sequences of tokens, by the model's own tokenizer and within its limits, some of them held out."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from topiarist.core.errors import CalibrationError
from topiarist.data import (
    Bos,
    TextFiles,
    calibration_windows,
    check_vocabulary,
    evaluation_windows,
    start_tokens,
)
from topiarist.data.draw import is_long
from topiarist.data.record import record
from topiarist.data.text import CALIBRATION, readers
from topiarist.data.windows import given_windows, text_room
from topiarist.models.interface import OpenedModel
from topiarist.pipelines.training.batches import split_held_out
from topiarist.pipelines.training.loop import Progress
from topiarist.pipelines.training.processes import Processes
from topiarist.pipelines.training.token_table import TokenTable, tokenised


@dataclass(frozen=True)
class TrainingText:
    """Token sequences in memory or in a file, with what identifies them."""

    table: Int[Tensor, "num window"] | TokenTable
    window: int
    """Tokens a sequence."""
    digest: str
    """sha256 of all tokens."""
    passages: frozenset[int] = frozenset()
    """Hashes of a sample of the text's passages, to tell it from held-out text."""
    start: tuple[int, ...] = ()
    """Tokens that every sequence begins with, before those of the table."""

    def split(self, held_out: int) -> tuple[Sequences, Int[Tensor, "held window"]]:
        """Return (training sequences, at most `held_out` others). Raises CalibrationError if there are too few."""
        trained, others = (
            Sequences(self.table, mask.nonzero()[:, 0], self.start)
            for mask in split_held_out(len(self.table), held_out)
        )
        return trained, others[torch.arange(len(others))]

    def record(self, earlier: frozenset[int] = frozenset()) -> str:
        """JSON of what an evaluation needs to tell its text from this one; see `Windows.record`."""
        return record(self.digest, self.passages | earlier)


@dataclass(frozen=True)
class Sequences:
    """Some rows of a table of token sequences."""

    table: Int[Tensor, "num window"] | TokenTable
    rows: Int[Tensor, " some"]
    start: tuple[int, ...] = ()
    """Tokens that stand before those of a row."""

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, wanted: Sequence[int] | Tensor) -> Int[Tensor, "wanted window"]:
        """Read some of the sequences, int64."""
        found = self.table[self.rows[wanted]].long()
        return torch.cat([torch.tensor(self.start).expand(len(found), -1), found], 1) if self.start else found


@contextmanager
def training_text(
    model: OpenedModel,
    data: TextFiles | Shaped[Tensor, "..."] | Sequence[str] | None,
    *,
    window_tokens: int,
    num_windows: int,
    seed: int,
    tokenizer: Any = None,
    bos: Bos = "never",
    out: Path | None = None,
    processes: Processes | None = None,
    progress: Progress = lambda *_: None,
) -> Iterator[TrainingText]:
    """All sequences of the text, or of text far longer than `num_windows` of them as many, drawn by the seed.

    data: text, or token ids (num, window) whose windows are taken as they are. window_tokens: tokens a sequence, or the
    model's limit where that is less, the start token among them where `bos` asks for one. num_windows: sequences that the
    run will look at, those held out included. out: the folder of the run's result; the tokens of text files then stand
    beside it, in OUT.tokens, until the run ends. Without it they are in memory.
    Raises CalibrationError if there is no text, less than one sequence of it, or if it does not fit the model; ProcessError
    if processes see other text.
    """
    limit = model.limit
    window = min(window_tokens, limit or window_tokens)
    if data is None:
        raise CalibrationError("training needs text: name --data FILE")
    processes = processes or Processes()
    long = isinstance(data, TextFiles) and is_long(readers(data, CALIBRATION), num_windows * window)
    processes.check_agreement({"text much longer than the run takes": long})
    if isinstance(data, TextFiles) and out is not None and not long:
        own = model.tokenizer(tokenizer)
        start = start_tokens(own, bos)
        room = text_room(window, start)
        with tokenised(data, own, out, window=room, processes=processes, progress=progress) as text:
            check_vocabulary(torch.tensor([[text.highest, *start]]), model.vocabulary, "training")
            digest = hashlib.sha256(f"{text.digest} {start}".encode()).hexdigest() if start else text.digest
            yield TrainingText(text.table, window, digest, text.passages, tuple(start))
        return
    if isinstance(data, Tensor):
        tokens, passages = given_windows(data, "training"), frozenset()
        digest = hashlib.sha256(tokens.numpy().tobytes()).hexdigest()
    else:
        own = model.tokenizer(tokenizer)
        if long:
            windows = calibration_windows(data, own, num_samples=num_windows, window=window, seed=seed, bos=bos)
        else:
            windows = evaluation_windows(data, own, window=window, bos=bos, usual=CALIBRATION)
        tokens, digest, passages = windows.tokens, windows.digest, windows.passages
    if not 2 <= tokens.shape[1] <= (limit or tokens.shape[1]):
        takes = f"2 to {limit}" if limit else "2 and more"
        raise CalibrationError(f"sequences of {tokens.shape[1]} tokens do not fit the model: it takes {takes}")
    check_vocabulary(tokens, model.vocabulary, "training")
    yield TrainingText(tokens, tokens.shape[1], digest, passages)
