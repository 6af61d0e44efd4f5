"""Names of topiarist 0.1 and what they are called today: for refusals, and for reading files of that version."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

METHODS: Mapping[str, str] = {"hybrid": "taylor"}
UNITS: Mapping[str, str] = {"heads": "kv_groups", "query_heads": "heads"}
"""Kinds of units. `heads` was a key-value head with its query heads; today it is one query head."""


def calibration(text: Mapping[str, Any]) -> dict[str, Any]:
    """Give the facts of a calibration text, as a report or a config has them, under today's names."""
    names = {"samples": "num_windows", "window": "window_tokens"}
    return {names.get(field, field): entry for field, entry in text.items()}


def unit_key(key: str) -> str:
    """Give the key of a group of units, which ends with their kind, as it is written today."""
    name, colon, kind = key.rpartition(":")
    return f"{name}{colon}{UNITS.get(kind, kind)}"
