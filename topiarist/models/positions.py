"""How long a text a model takes: what its config states, and whether anything in the model ends there."""

from __future__ import annotations

from typing import Any

_STATED = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length", "max_seq_len")
_ROTARY = ("rope_parameters", "rope_theta", "rope_scaling", "rotary_pct")
"""What the config of a model has that computes its rotary positions anew for every length."""
_UNBOUND = frozenset({"bloom", "jamba", "kimi_linear", "nemotron_h", "xglm", "zamba"})
"""Types with relative biases, positions computed for any length, or none at all."""


def stated_length(config: Any) -> int | None:
    """Tokens that the config says the model was made for; None if it does not say."""
    found = (getattr(config, key, None) for key in _STATED)
    return next((value for value in found if isinstance(value, int) and value > 0), None)


def limit_of(config: Any) -> int | None:
    """Tokens that a text may have at most; None where the config names no limit, or nothing ends there."""
    return stated_length(config) if _ends_there(config) else None


def _ends_there(config: Any) -> bool:
    """Whether longer text is other text to the model than what it was made for, or none at all."""
    return getattr(config, "model_type", None) not in _UNBOUND and getattr(config, "alibi", None) is not True


def has_table(config: Any) -> bool:
    """Whether positions stand in a table, learned or computed, that has no more of them.

    A type of which nothing is known counts as one: MPT's biases and the rotary positions of GPT-J are tables too.
    """
    return _ends_there(config) and not any(getattr(config, key, None) for key in _ROTARY)
