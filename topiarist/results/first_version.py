"""Reports of earlier versions, in today's terms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from topiarist.core import former

REPORT_VERSION = 2
"""How its fields are called. Those of topiarist 0.1 do not say it."""

SHARED: Mapping[str, Any] = {
    "settings": {}, "pattern": "?", "calibration": {}, "weights": {}, "layers": [], "warnings": [], "command": [],
    "not_in_command": [],
}  # fmt: skip


def renewed(plain: Mapping[str, Any]) -> dict[str, Any]:
    """Give a report the fields that all reports have today; those that it has stay as they are, but for their names."""
    if plain.get("report_version", 1) >= REPORT_VERSION:
        return {**SHARED, **plain}
    if "pipeline" in plain:
        return {**SHARED, **_renamed(plain)}
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
    return {**SHARED, **_renamed({**facts, "pipeline": pipeline})}


def _renamed(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The report with today's names of methods, of units, and of the fields of the calibration text."""
    found = {**facts, "report_version": REPORT_VERSION}
    if facts["pipeline"] == "shrink":
        found["method"] = former.METHODS.get(facts["method"], facts["method"])
        found["units"] = [former.UNITS.get(kind, kind) for kind in facts.get("units", [])]
        found["blocks"] = [
            {**row, "kind": former.UNITS.get(row["kind"], row["kind"])} for row in facts.get("blocks", [])
        ]
    found["calibration"] = former.calibration(facts.get("calibration", {}))
    return found
