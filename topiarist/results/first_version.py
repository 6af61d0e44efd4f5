"""Reports of topiarist 0.1, in today's terms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def renewed(plain: Mapping[str, Any]) -> dict[str, Any]:
    """Give a report the fields that all reports have today; one of today stays as it is."""
    if "pipeline" in plain:
        return dict(plain)
    facts: dict[str, Any] = {**plain.get("pruning_config", {}), **plain}
    weights = facts.get("weights", {})
    if facts.get("shrunk"):
        pipeline, before, after = "shrink", weights.get("dense"), weights.get("bytes")
    else:
        pipeline = "learn" if "history" in facts else "prune" if "mean_error" in facts else "apply"
        before = after = weights.get("bytes")
    if before is not None:
        facts["weights"] = {"before": before, "after": after, "dtype": weights.get("dtype", "")}
    facts.setdefault("model", facts.get("base_model", "?"))
    facts.setdefault("base_model", facts["model"])
    facts.setdefault("calibration", facts.get("data", {}))
    facts.setdefault("method", "maskllm" if pipeline == "learn" else "masks")
    shared: dict[str, Any] = {
        "settings": {},
        "pattern": "?",
        "warnings": [],
        "layers": [],
        "command": [],
        "not_in_command": [],
        "weights": {},
    }
    return {**shared, **facts, "pipeline": pipeline}
