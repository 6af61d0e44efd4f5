"""Reports of topiarist 0.1, in today's terms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SHARED: Mapping[str, Any] = {
    "settings": {}, "pattern": "?", "calibration": {}, "weights": {}, "layers": [], "warnings": [], "command": [],
    "not_in_command": [],
}  # fmt: skip


def renewed(plain: Mapping[str, Any]) -> dict[str, Any]:
    """Give a report the fields that all reports have today; those that it has stay as they are, but for their names."""
    if "pipeline" in plain:
        return {**SHARED, **plain}
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
    return {**SHARED, **facts, "pipeline": pipeline}
