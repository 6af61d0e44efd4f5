"""Settings that several commands share: their text, and how they work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, Field, PositiveInt, SkipValidation
from torch import Tensor

from topiarist.core.errors import CalibrationError
from topiarist.core.options import About, OptionError, changed, options
from topiarist.core.patterns import Pattern, parse_pattern
from topiarist.data import Bos, TextFiles, check_heeded, text_files

Progress = Callable[[str, int, int], None]
"""(what is going on, steps done, steps in all)"""

MAX_THREADS = 1024
HOW = About(result=False)


def _texts(given: Any) -> Any:
    """Paths become TextFiles; what is in memory stays: documents, or token windows (num, window)."""
    if isinstance(given, str | Path) or (
        isinstance(given, Sequence) and given and all(isinstance(entry, Path) for entry in given)
    ):
        return text_files(given)
    if given is None or isinstance(given, TextFiles | Tensor | Sequence):
        return given
    raise OptionError(f"a {type(given).__name__} is no text: give files, documents or token windows (num, window)")


def _pattern(given: Any) -> Any:
    return given if given is None or isinstance(given, Pattern) else parse_pattern(given)


def _number(given: Any) -> Any:
    return int(given) if isinstance(given, str) and given.isdigit() else given


def count(given: Any) -> Any:
    """A number from text such as 300k, 1.5M or 2B. Raises ValueError for other text, and for a part of one."""
    if not isinstance(given, str):
        return given
    factor = {"k": 10**3, "m": 10**6, "b": 10**9}.get(given[-1:].lower(), 1)
    try:
        found = float(given[:-1] if factor > 1 else given) * factor
        if factor == 1 and not found.is_integer():
            raise ValueError
        return round(found)  # 1.001M is a trifle below in floats
    except (ValueError, OverflowError):
        raise ValueError("should be a whole number such as 5000, 300k, 1.5M or 2B") from None


Texts = Annotated[TextFiles | Tensor | Sequence[str] | None, SkipValidation, BeforeValidator(_texts)]
OnePattern = Annotated[Pattern | None, SkipValidation, BeforeValidator(_pattern)]
Bits = Annotated[Literal[8, 4], BeforeValidator(_number), About(metavar="8|4")]
Group = Annotated[Literal["auto", "channel"] | PositiveInt, BeforeValidator(_number), About(metavar="N|auto|channel")]
"""Consecutive weights of a row that share a scale."""


@options
class RunOptions:
    """How a command works; no result depends on it."""

    device: Annotated[str | None, BeforeValidator(lambda given: None if given is None else str(given)), HOW] = None
    """cpu, cuda, cuda:1; default: a GPU if there is one."""
    threads: Annotated[int | None, Field(ge=1, le=MAX_THREADS), HOW] = None
    """CPU threads; default: torch's choice."""
    trust_remote_code: Annotated[bool, HOW] = False
    """Run Python code that the model folder brings."""
    stands_for: Annotated[str | None, About(cli=False, result=False)] = None
    """The model that reports name in its place, where it is what an earlier stage of a recipe gave."""

    def use_threads(self) -> None:
        """Tell torch."""
        if self.threads is not None:
            torch.set_num_threads(self.threads)


@options
class DataOptions(RunOptions):
    """What text a command looks at."""

    data: Annotated[Texts, About(metavar="FILE")] = None
    """Text: files or folders of any kind that is read, hub:NAME, documents, or token windows (num, window)."""
    text_field: str | None = None
    """Of rows: the field that holds the text or the chat messages; default text."""
    split: str | None = None
    """Of datasets; default train."""
    tokenizer: Annotated[Any, About(metavar="DIR", result=False)] = None
    """A tokenizer, or the folder of one; default the model's own."""
    bos: Bos = "never"
    """Whether a window begins with the model's start token: auto (as its tokenizer does), always or never."""
    seed: Annotated[int, Field(ge=0, lt=1 << 32)] = 0
    """Chooses the text, and all noise."""

    def __post_init__(self) -> None:
        if isinstance(self.data, Tensor):
            self._check_agrees(self.data)
        if isinstance(self.data, TextFiles):  # what TextFiles say is said here too, so that a command can say it
            field = self.text_field or (None if self.data.field == TextFiles.field else self.data.field)
            split = self.split or self.data.split
            object.__setattr__(self, "text_field", field)
            object.__setattr__(self, "split", split)
            object.__setattr__(self, "data", replace(self.data, field=field or TextFiles.field, split=split))
            check_heeded(self.data)

    def _check_agrees(self, tokens: Tensor) -> None:
        """Raise CalibrationError for a setting that token windows contradict: it would be ignored without a word."""
        if self.bos != "never":
            raise CalibrationError(f"bos {self.bos} is for text, and token windows are taken as they are: leave it out")
        if tokens.ndim != 2:  # refused where the windows are made
            return
        said = changed(self)
        for field, size in zip(("num_windows", "window_tokens"), tokens.shape, strict=True):
            if (asked := said.get(field, size)) != size:
                raise CalibrationError(
                    f"{field} {asked} contradicts the tokens given, {len(tokens)} windows of {tokens.shape[1]}, which are "
                    "taken as they are: leave it out, or cut the tensor"
                )


@options
class TextOptions(DataOptions):
    """What text a command looks at, in windows of tokens."""

    num_windows: Annotated[PositiveInt, About(flag="samples")] = 128
    """Windows of text."""
    window_tokens: Annotated[int | None, Field(ge=2), About(flag="window")] = None
    """Tokens a window; default min(2048, the model's limit)."""
