"""The pages: one result, or several side by side. Self-contained HTML, the same bytes for the same result."""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from topiarist.results.formats import command_text, error_text, percent, short, size_text, start_text
from topiarist.results.frontier import comparable, rival_of, sentences_of
from topiarist.results.pages.figures import Panel, by_place, curve, heat_map, panel, place_of, rounds
from topiarist.results.result import PAGE, Result, labels_of

MARK = '<meta name="generator" content="topiarist">'
"""In the head of every page."""
LISTED = 400
"""Matrices in the page's table; a mixture of experts has thousands, and the JSON has them all."""


def report_page(result: Result, others: Sequence[Result] = ()) -> str:
    """The page of one result. others: results beside it; a dense model that was only quantised is named on the page."""
    layers = result.layers
    spread = [layer["sparsity"] for layer in layers]
    score = "error" if any("error" in layer for layer in layers) else "flips"
    ranked = sorted((x for x in layers if score in x), key=lambda x: -_number(x[score]))
    evaluations = result.report.get("history", [])
    history = [(float(e["step"]), math.exp(min(e["hard_loss"], 700.0))) for e in evaluations]
    recovery = [(float(e["step"]), float(e["loss"])) for e in result.recovery.get("evaluations", [])]
    return (
        _environment()
        .get_template("report.html")
        .render(
            result=result,
            report=result.report,
            rival=rival_of(result, others),
            starts=start_text(e.get("start_tokens", 0) for e in result.perplexities),
            errors=heat_map(layers, "error", error_text, logarithmic=True),
            flips=heat_map(layers, "flips", percent, logarithmic=True),
            density=heat_map(layers, "sparsity", percent, logarithmic=False)
            if spread and max(spread) - min(spread) > 0.005
            else None,
            blocks=_blocks(layers),
            **_allocation(result.report.get("allocation", {})),
            kept=heat_map(_kept_shares(result), "kept", percent, logarithmic=False),
            kinds=_kinds(layers, score),
            score=score,
            ranked=ranked[:LISTED],
            num_ranked=len(ranked),
            refined=_refined(result.report.get("refined", [])),
            joined=rounds(result.report.get("joint", [])),
            kept_steps=Counter(block["best"] for block in result.report.get("joint", [])).most_common(),
            learning=curve(history),
            learned=_first_and_best(history),
            recovering=curve(recovery),
            recovered=_first_and_best(recovery),
            warnings=[*result.report["warnings"], *result.recovery.get("warnings", [])],
            command=command_text(result.report["command"]),
            settings={k: v for k, v in result.report["settings"].items() if not isinstance(v, dict | list)},
            linears=Counter(layer["reason"] for layer in _bench_layers(result)).most_common(),
        )
    )


def _first_and_best(history: Sequence[tuple[float, float]]) -> list[float]:
    """Of (step, loss): what a training began with, and the least, whose state the files hold; less if there was no more."""
    known = [value for _, value in history if math.isfinite(value)]
    return [known[0], min(known)] if known else []


def _kept_shares(result: Result) -> list[dict[str, Any]]:
    """Of a structural run, the share of every group of units that stays, by the matrix that reads them."""
    rows = result.report.get("blocks", [])
    return [{"name": f"{row['name']}.{row['kind']}", "kept": row["kept"] / row["of"]} for row in rows]


def compare_page(results: Sequence[Result], *, links_from: Path | None = None) -> str:
    """Several results: quality against size and against speed in one picture, and a table.

    links_from: the folder that the page will lie in; links lead from there to each result's own page.
    """
    chosen, label = comparable(results)
    quality = [None if entry is None else float(entry["value"]) for entry in chosen]
    if not any(quality):
        quality, label = [_mean_error(result) for result in results], "mean reconstruction error"
    links = [_link(result, links_from) for result in results]
    bases = sorted({result.origin for result in results})
    stated = (e["dense"]["value"] for e in chosen if e and e.get("dense"))
    dense = next(stated, None) if len(bases) == 1 else None  # of several none is the dense model
    texts = sorted({_column(e) for r in results for e in r.perplexities})
    tasks = sorted({_task(e) for r in results for e in r.tasks})
    return (
        _environment()
        .get_template("compare.html")
        .render(
            results=list(zip(results, labels_of(results), links, strict=True)),
            panels=_panels(results, quality, dense),
            label=label,
            dense=dense,
            texts=texts,
            tasks=tasks,
            score_of=lambda result, task: next((e for e in result.tasks if _task(e) == task), None),
            dense_row=_dense_row(results, texts, tasks) if len(bases) == 1 else None,
            bases=bases,
            said=sentences_of(results),
        )
    )


def _column(entry: Mapping[str, Any]) -> tuple[str, int, str, int]:
    """What perplexities must share to stand in one column. An entry from before there were start tokens has none."""
    return entry["text"], entry["window"], entry["digest"], entry.get("start_tokens", 0)


def _task(entry: Mapping[str, Any]) -> tuple[str, str, int, str]:
    """What scores must share to stand in one column: scores of other items say nothing of each other."""
    return entry["task"], entry["metric"], entry["num_items"], entry["digest"]


def _dense_row(results: Sequence[Result], texts: Sequence[tuple], tasks: Sequence[tuple]) -> dict[str, list] | None:
    """The dense model's figures, as any of its results states them; None if none does."""

    def stated(entries: Iterable[Mapping[str, Any]]) -> float | None:
        return next((entry["dense"]["value"] for entry in entries if entry.get("dense")), None)

    by_text = [stated(e for r in results for e in r.perplexities if _column(e) == text) for text in texts]
    by_task = [stated(e for r in results for e in r.tasks if _task(e) == task) for task in tasks]
    return {"texts": by_text, "tasks": by_task} if any(by_text + by_task) else None


def _panels(results: Sequence[Result], quality: Sequence[float | None], dense: float | None) -> list[Panel]:
    """Quality against size, and against decoding speed if that was measured anywhere."""
    known = [q for q in quality if q is not None and math.isfinite(q)] + ([dense] if dense else [])
    if not known:
        return []
    y_range = (min(known), max(known))
    sizes: list[tuple[int, float, float, str]] = [(0, 1.0, dense, "dense")] if dense else []
    speeds = list(sizes)
    for number, (result, value) in enumerate(zip(results, quality, strict=True), 1):
        if value is None or not math.isfinite(value):
            continue
        title = f"{number}: {result.method} {result.pattern}, {value:.4g}"
        if size := result.size:
            sizes.append((number, size["packed"] / size["dense"], value, title))
        if gain := result.decode_gain():
            speeds.append((number, gain["sparse"] / gain["dense"], value, title))
    panels = []
    if any(number for number, *_ in sizes):
        panels.append(panel("size when packed, share of the dense model", sizes, y_range, percent, short))
    if any(number for number, *_ in speeds):
        panels.append(panel("decoding speed, dense model = 1", speeds, y_range, lambda x: f"{x:g}×", short))
    return panels


def _kinds(layers: Sequence[Mapping[str, Any]], score: str) -> list[dict[str, Any]]:
    """One line for every kind of matrix."""
    stated = [layer for layer in layers if score in layer]
    scores, sparsities = by_place(stated, score), by_place(stated, "sparsity")
    lines = []
    for kind, row in scores.items():
        values = [v for block in row.values() for v in block]
        zeros = [v for block in sparsities[kind].values() for v in block]
        worst = max(row, key=lambda block, row=row: max(row[block]))
        lines.append(
            {
                "kind": kind,
                "count": len(values),
                "sparsity": sum(zeros) / len(zeros),
                "mean": sum(values) / len(values),
                "worst": max(values),
                "block": worst,
            }
        )
    return lines


def _blocks(layers: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Share kept of every block's pruned matrices, and their mean error if it is stated."""
    found: dict[int, list[Mapping[str, Any]]] = {}
    for layer in layers:
        found.setdefault(place_of(layer["name"])[0], []).append(layer)
    rows = []
    for number, own in sorted(found.items()):
        sizes = [math.prod(layer["shape"]) for layer in own]
        zeros = sum(size * layer["sparsity"] for size, layer in zip(sizes, own, strict=True))
        errors = [layer["error"] for layer in own if layer.get("error") is not None]
        error = sum(errors) / len(errors) if errors else None
        rows.append({"number": number, "kept": 1 - zeros / sum(sizes), "error": error})
    return rows


def _allocation(facts: Mapping[str, Any]) -> dict[str, Any]:
    """A map of the scores that a rule went by, and how uncertain they are: standard error over score, in the median."""
    scores, errors = facts.get("scores", {}), facts.get("standard_errors", {})
    shares = sorted(abs(errors[name] / scores[name]) for name in errors if scores.get(name))
    # The densities that a search chose are shown already.
    shown = [] if facts.get("rule", {}).get("name") == "search" else scores.items()
    layers = [{"name": name, "score": value} for name, value in shown]
    return {
        "scores": heat_map(layers, "score", error_text, logarithmic=True),
        "uncertain": shares[len(shares) // 2] if shares else None,
    }


def _refined(blocks: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Errors before and after refinement, the largest of them, and the gain in the median block."""
    if not blocks:
        return None
    top = max(block["before"] for block in blocks) or 1.0
    gains = sorted(1 - b["after"] / b["before"] for b in blocks if b["before"] > 0)
    return {
        "bars": blocks,
        "top": top,
        "median": gains[len(gains) // 2] if gains else 0.0,
        "kept": sum(block["best_epoch"] == 0 for block in blocks),
    }


def _bench_layers(result: Result) -> Sequence[Mapping[str, Any]]:
    return result.benchmark.get("acceleration", {}).get("layers", [])


def _mean_error(result: Result) -> float | None:
    value = result.report.get("mean_error")
    return float(value) if value else None


def _number(value: Any) -> float:
    """For sorting: what is not finite comes first."""
    return float(value) if value is not None and math.isfinite(value) else math.inf


def _link(result: Result, start: Path | None) -> str | None:
    """The way from the comparison to a result's own page, if there is one."""
    if result.folder is None or start is None or not (result.folder / PAGE).is_file():
        return None
    way = Path(os.path.relpath((result.folder / PAGE).resolve(), start.resolve())).as_posix()
    return quote(way)  # no name can be a scheme, a query or a fragment


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parents[1] / "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters |= {"percent": percent, "short": short, "error": error_text, "bytes": size_text}
    # File names are one long word; they may be broken after what separates their parts.
    environment.filters["breaks"] = lambda name: Markup(re.sub(r"([_.\-/])", r"\1<wbr>", str(escape(name))))
    environment.filters["at"] = lambda share: f"{100 * share:.2f}%"
    environment.globals |= {"percent_text": percent, "error_text": error_text}
    return environment
