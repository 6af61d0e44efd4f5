"""Text files and datasets into windows of tokens. The choice of windows depends on the seed alone.

A source is .txt (one document), .jsonl or .jsonl.gz (a `text` field per line) or a folder that `datasets` can read.
Documents are joined by a blank line into one stream, tokenised once, cut into windows without overlap.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from topiarist.core.errors import CalibrationError, CheckpointError

SEPARATOR = "\n\n"
MAX_PART = 1 << 22  # characters tokenised at once; the tokenizer needs about a hundred bytes a token
MIN_LINE = 64  # shorter lines are too common to say that two texts share a source
MAX_SHARED = 0.01  # fraction of held-out characters that may stand in calibration text: boilerplate, not leakage


@dataclass(frozen=True)
class TextFiles:
    """Where text lies; nothing is read until it is needed."""

    paths: tuple[Path, ...]


@dataclass(frozen=True)
class Windows:
    """Token windows (num, window), int64, with what identifies them."""

    tokens: Tensor
    digest: str
    """sha256 of the chosen tokens."""
    line_hashes: frozenset[int]
    """64-bit hashes of every long line of the source, to tell calibration from held-out text."""
    overlap: float = 0.0

    @property
    def window(self) -> int:
        return self.tokens.shape[1]

    def record(self) -> str:
        """JSON of what an evaluation needs to tell its text from this one; kept beside the result."""
        lines = [f"{h:016x}" for h in sorted(self.line_hashes)]
        return json.dumps({"digest": self.digest, "line_hashes": lines}) + "\n"


def text_files(paths: str | Path | Iterable[str | Path]) -> TextFiles:
    """Name one or several text sources. Raises CalibrationError if one does not exist."""
    listed = [paths] if isinstance(paths, str | Path) else list(paths)
    if not listed:
        raise CalibrationError("no text files given: name at least one .txt, .jsonl, .jsonl.gz or datasets folder")
    for path in listed:
        if not Path(path).exists():
            raise CalibrationError(f"text file {path} does not exist")
    return TextFiles(tuple(Path(path) for path in listed))


def read_documents(source: TextFiles) -> Iterator[str]:
    """Every document, in file order. Raises CalibrationError for an unreadable or unknown file."""
    for path in source.paths:
        try:
            yield from _read_one(path)
        except (OSError, UnicodeDecodeError, json.JSONDecodeError, EOFError) as error:
            raise CalibrationError(f"cannot read text from {path}: {error}") from error


def _read_one(path: Path) -> Iterator[str]:
    if path.is_dir():
        yield from _read_dataset(path)
    elif path.name.endswith((".jsonl", ".jsonl.gz", ".json.gz")):
        opener = gzip.open if path.suffix == ".gz" else open
        with opener(path, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                row = json.loads(line)
                if not isinstance(row, dict) or not isinstance(row.get("text"), str):
                    raise CalibrationError(f"{path} line {number} has no `text` field of type string")
                yield row["text"]
    else:
        yield path.read_text(encoding="utf-8")


def _read_dataset(path: Path) -> Iterator[str]:
    import datasets

    try:
        if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
            loaded: Any = datasets.load_from_disk(str(path))
        else:
            loaded = datasets.load_dataset(str(path))
    except Exception as error:  # the library raises many types; all mean that the folder is not a dataset
        raise CalibrationError(f"{path} is not a datasets folder: {error}") from error
    for split in loaded.values() if isinstance(loaded, dict) else [loaded]:
        if "text" not in split.column_names:
            raise CalibrationError(f"dataset {path} has no `text` column, only {split.column_names}")
        yield from split["text"]


def tokenize(documents: Iterable[str], tokenizer: Any) -> tuple[Tensor, frozenset[int]]:
    """One stream of token ids without special tokens, and the hashes of its long lines."""
    texts = list(documents)
    hashes = frozenset(h for text in texts for h, _ in _line_hashes(text))
    pieces: list[np.ndarray] = []
    for part in _parts(texts):
        # verbose=False: a text longer than the model's limit is fine, it is cut into windows afterwards.
        pieces.append(np.asarray(tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"], dtype=np.int64))
    stream = np.concatenate(pieces) if pieces else np.empty(0, dtype=np.int64)
    return torch.from_numpy(stream), hashes


def _parts(texts: Sequence[str]) -> Iterator[str]:
    """Documents joined by the separator, cut between documents every few megabytes.

    Joined first, because a tokenizer reads blank lines at the end of a text otherwise than between two: on the demo's
    C4 text that alone is 4 % of perplexity.
    """
    part: list[str] = []
    size = 0
    for text in texts:
        if size > MAX_PART:
            yield SEPARATOR.join([*part, ""])
            part, size = [], 0
        part.append(text)
        size += len(text)
    if part:
        yield SEPARATOR.join(part)


def load_tokenizer(folder: str | Path) -> Any:
    """The tokenizer of a model folder. Raises CheckpointError if there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # missing files, unknown classes, hub errors: all mean the same to the user
        raise CheckpointError(f"no tokenizer in {folder or 'the model'} ({type(error).__name__}); pass one") from error


def calibration_windows(
    source: TextFiles | Tensor | Sequence[str], tokenizer: Any, *, num_samples: int = 128, window: int, seed: int = 0
) -> Windows:
    """Pick `num_samples` windows at random from all windows of the source (a Tensor (num, window) is taken as it is).

    Raises CalibrationError if the text holds fewer windows than asked for.
    """
    if isinstance(source, Tensor):
        if source.ndim != 2 or source.numel() == 0:
            raise CalibrationError(f"calibration tokens must be (num, window), got shape {tuple(source.shape)}")
        return Windows(source.long(), _digest(source.long()), frozenset())
    if num_samples < 1 or window < 2:
        raise CalibrationError(f"need at least 1 sample of 2 tokens, got {num_samples} of {window}")
    documents = read_documents(source) if isinstance(source, TextFiles) else source
    stream, hashes = tokenize(documents, tokenizer)
    available = len(stream) // window
    if available < num_samples:
        raise CalibrationError(
            f"calibration text holds {len(stream):,} tokens = {available} windows of {window}, {num_samples} were asked "
            "for; add text, or ask for fewer samples or a shorter window"
        )
    order = torch.randperm(available, generator=torch.Generator().manual_seed(seed))[:num_samples]
    tokens = stream[: available * window].view(available, window)[order].contiguous()
    return Windows(tokens, _digest(tokens), hashes)


def evaluation_windows(
    source: TextFiles | Sequence[str],
    tokenizer: Any,
    *,
    window: int,
    max_windows: int | None = None,
    calibration_hashes: frozenset[int] = frozenset(),
) -> Windows:
    """The first windows of the source in order, no special tokens; the rest that fills no window is dropped.

    `overlap` of the result is the share of its text that stands in the calibration text too.
    Raises CalibrationError if there is not one whole window.
    """
    texts = list(read_documents(source) if isinstance(source, TextFiles) else source)
    stream, hashes = tokenize(texts, tokenizer)
    available = len(stream) // window
    if available == 0:
        raise CalibrationError(f"text holds {len(stream):,} tokens, less than one window of {window}; shorten --window")
    if max_windows is not None:
        available = min(available, max_windows)
    tokens = stream[: available * window].view(available, window).contiguous()
    return Windows(tokens, _digest(tokens), hashes, overlap=_overlap(texts, calibration_hashes))


def _overlap(texts: Sequence[str], known: frozenset[int]) -> float:
    shared = total = 0
    for text in texts if known else ():
        for line_hash, length in _line_hashes(text):
            total += length
            shared += length if line_hash in known else 0
    return shared / total if total else 0.0


def _line_hashes(text: str) -> Iterator[tuple[int, int]]:
    lines = [line for line in (raw.strip() for raw in text.split("\n")) if len(line) >= MIN_LINE]
    for line in lines or [text.strip()]:
        yield int.from_bytes(hashlib.blake2b(line.encode(), digest_size=8).digest(), "little"), len(line)


def _digest(tokens: Tensor) -> str:
    return hashlib.sha256(tokens.numpy().astype("<i8").tobytes()).hexdigest()
