"""The tokenizer of a model, and how it begins a text."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any, Literal

from topiarist.core.errors import CalibrationError, CheckpointError

Bos = Literal["auto", "always", "never"]
"""Whether a window begins with the model's start token: as its tokenizer does, always, never."""


def load_tokenizer(folder: str | Path, trust_remote_code: bool = False, tokenizer: str | Path | Any = None) -> Any:
    """The tokenizer of a model folder, or the one that is given: another folder, or an object, which is returned.

    trust_remote_code: run Python code that the folder brings; without it such code is refused, and nothing is asked.
    Raises CheckpointError, with the cause, if there is none.
    """
    from transformers import AutoTokenizer

    if tokenizer is not None and not isinstance(tokenizer, str | Path):
        if not callable(tokenizer):
            raise CheckpointError(
                f"an object of type {type(tokenizer).__name__} is no tokenizer: give one of transformers, or a folder"
            )
        return tokenizer
    where = folder if tokenizer is None else tokenizer
    if not str(where):
        raise CheckpointError("the model has no folder to take a tokenizer from: pass one with tokenizer=")
    try:
        found: Any = AutoTokenizer.from_pretrained(where, trust_remote_code=trust_remote_code)
    except Exception as error:  # missing files, unknown classes, hub errors: all mean the same to the user
        reason = " ".join(str(error).split()) or _place(error)
        if "trust_remote_code" in reason:
            cure = "its tokenizer is Python code that comes with it; read it, then pass --trust-remote-code"
            raise CheckpointError(f"no tokenizer from {where}: {cure}") from error
        raise CheckpointError(f"no tokenizer in {where} ({reason[:300]}); name a folder with --tokenizer") from error
    if not len(found):  # transformers makes an empty one of a folder without tokenizer files
        raise CheckpointError(f"no tokenizer in {where} (its vocabulary is empty); name a folder with --tokenizer")
    return found


def _place(error: Exception) -> str:
    """What an error without words says: its kind, and the function that raised it."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} in {frame.name}() of {Path(frame.filename).name}, line {frame.lineno}"


def start_tokens(tokenizer: Any, bos: Bos) -> list[int]:
    """The ids that every window begins with. `auto`: those that the tokenizer itself puts before a text.

    Raises CalibrationError for `always` if the tokenizer has no start token.
    """
    if bos == "never":
        return []
    text = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    added = len(whole) - len(text)
    start = next((list(whole[:at]) for at in range(added + 1) if whole[at : at + len(text)] == text), [])
    if start or bos == "auto":
        return start
    if tokenizer.bos_token_id is None:
        raise CalibrationError("--bos always, and the tokenizer has no start token")
    return [int(tokenizer.bos_token_id)]
