"""Perplexity of one model on stated text."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from topiarist.core.errors import CalibrationError, NumericalError
from topiarist.core.losses import next_token_losses
from topiarist.data import Windows, check_vocabulary
from topiarist.models.opened import ObjectModel, evaluated, open_model


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean next-token loss inside windows without overlap, with all that is needed to repeat it."""

    value: float
    window: int
    tokens: int
    """Predicted."""
    text_digest: str
    dtype: str
    start_tokens: int = 0
    """Of every window, before its text: as the tokenizer begins a text, or none."""


@torch.no_grad()
def perplexity(
    model: nn.Module,
    windows: Windows | Int[Tensor, "num window"],
    *,
    batch_size: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """Perplexity of a loaded causal LM on token windows (num, window).

    Every window predicts its tokens from the second on, start tokens excepted.
    Raises CalibrationError for windows of less than 2 tokens, none at all, more tokens than the model has learned positions, a
    token outside the vocabulary or a batch size below 1, NumericalError if the loss is not finite.
    """
    tokens = windows.tokens if isinstance(windows, Windows) else windows
    start = windows.start if isinstance(windows, Windows) else 0
    check_batch_size(batch_size)
    if not isinstance(model, nn.Module):
        raise CalibrationError(f"{model!r} is no loaded model: give tp.load_pruned({model!r})")
    if not isinstance(tokens, Tensor) or tokens.ndim != 2 or tokens.is_floating_point():
        raise CalibrationError(
            "the windows must be a tensor (num, window) of token ids; `topiarist eval` takes text files"
        )
    if len(tokens) < 1 or tokens.shape[1] < 2:
        raise CalibrationError(
            f"{len(tokens)} windows of {tokens.shape[1]} tokens predict nothing: 1 of 2 is the least"
        )
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    if isinstance(embeddings, nn.Embedding):
        check_vocabulary(tokens, embeddings.num_embeddings, "text")
    if getattr(model, "config", None) is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # more than rotary positions were made for is no error
            ObjectModel(model).check_length(tokens.shape[1], f"a window of {tokens.shape[1]} tokens", "shorter windows")
    device = next(model.parameters()).device
    total, predicted = 0.0, 0
    with evaluated(model):
        for begin in range(0, len(tokens), batch_size):
            batch = tokens[begin : begin + batch_size].to(device)
            logits = model(input_ids=batch, use_cache=False).logits
            losses = next_token_losses(logits, batch)[:, max(start - 1, 0) :]
            total += float(losses.double().sum())
            predicted += losses.numel()
            if progress is not None:
                progress(min(begin + batch_size, len(tokens)), len(tokens))
    mean = total / predicted
    if not math.isfinite(mean):
        raise NumericalError("the model's loss is not finite on this text")
    digest = windows.digest if isinstance(windows, Windows) else ""
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    value = math.exp(mean) if mean < 700 else math.inf
    return Perplexity(value, tokens.shape[1], predicted, digest, dtype, start)


def check_batch_size(batch_size: int) -> None:
    """Raise CalibrationError for a batch size below 1."""
    if batch_size < 1:
        raise CalibrationError(f"batch size {batch_size}: 1 is the least")


def load_model(folder: str | Path, *, device: str | torch.device = "cpu", trust_remote_code: bool = False) -> Any:
    """A checkpoint through plain transformers, in its own dtype, ready to run. Raises as `open_model` does."""
    return open_model(folder, device=device, trust_remote_code=trust_remote_code).whole().model
