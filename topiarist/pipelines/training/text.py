"""Training text as sequences of tokens, by the model's own tokenizer and within its limits."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from topiarist.core.errors import CalibrationError
from topiarist.data import TextFiles, Windows, evaluation_windows
from topiarist.models.opened import DEFAULT_WINDOW, OpenedModel


def training_windows(
    model: OpenedModel, data: TextFiles | Tensor | Sequence[str] | None, *, window_tokens: int, tokenizer: Any = None
) -> Windows:
    """All sequences of the text, `window_tokens` each, or the model's limit where that is less.

    data: text, or token ids (num, window) whose windows are taken as they are. Raises CalibrationError if there is no
    text, less than one sequence of it, or if it does not fit the model.
    """
    limit = model.limit or DEFAULT_WINDOW
    if data is None:
        raise CalibrationError("training needs text: name --data FILE")
    if isinstance(data, Tensor):
        if data.ndim != 2 or data.numel() == 0:
            raise CalibrationError(f"training tokens must be (num, window), got shape {tuple(data.shape)}")
        digest = hashlib.sha256(data.long().numpy().tobytes()).hexdigest()
        windows = Windows(data.long(), digest, frozenset())
    else:
        windows = evaluation_windows(
            data, model.tokenizer(tokenizer), window=min(window_tokens, limit), usual=("train",)
        )
    if not 2 <= windows.window <= limit:
        raise CalibrationError(f"sequences of {windows.window} tokens do not fit the model: it takes 2 to {limit}")
    if int(windows.tokens.max()) >= model.vocabulary:
        raise CalibrationError(
            f"training token {int(windows.tokens.max())} is outside the model's vocabulary of {model.vocabulary}: is "
            "this the model's own tokenizer?"
        )
    return windows
