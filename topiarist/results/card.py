"""README.md of a result: the hub's model card. Its scores are in the metadata; its measured part is all that changes later."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from topiarist.core.errors import CheckpointError, first_line
from topiarist.results.formats import code, code_block, command_text, error_text, escaped, percent, short, size_text
from topiarist.results.result import Result

BEGIN, END = "<!-- measured by topiarist -->", "<!-- end of what is measured -->"
_WORST = 5
_OPENS = {
    "uniform": "Every layer has the same, smaller shape: `AutoModelForCausalLM.from_pretrained` and servers open it.",
    "padded": "Narrower layers are filled up with zeros: `AutoModelForCausalLM.from_pretrained` opens it.",
    "masked": "What went is zeros: the files are as large and as fast as the dense model's.",
    "hetero": (
        "Layers differ in shape: open it with `topiarist.load_pruned(path)`, or with `trust_remote_code=True`, which runs "
        "`modeling_pruned.py` of this folder. With `block_configs` in config.json, vLLM can open it."
    ),
}


_DENSE = "The files are ordinary dense tensors: any loader opens them, and they are neither smaller nor faster by themselves."
_INTEGERS = (
    "The matrices are integers of {} bits in compressed-tensors' `pack-quantized`: transformers (with the package "
    "compressed-tensors) and vLLM open them."
)
_PACKED = (
    "The weights are stored without their zeros, in `packed-*.safetensors`: `topiarist.runtime.from_packed(path)` opens them, "
    "and `topiarist unpack PACKED OUT` writes the ordinary files that other loaders open."
)
_KNOWN = re.compile(
    "|".join(
        re.escape(sentence).replace(r"\ ", r"\s+").replace(r"\{\}", r"\d+")
        for sentence in (*_OPENS.values(), _DENSE, _INTEGERS, _PACKED)
    )
)
"""Any of those sentences, as a card has it: packing and unpacking put another in its place."""


def model_card(result: Result) -> str:
    """Return the card as a run writes it."""
    report = result.report
    data = ModelCardData(
        library_name="transformers",
        base_model=None if report["base_model"].startswith(".") else report["base_model"] or None,
        tags=[*_kinds(result), result.method],
        model_name=f"{result.name}, {result.title}",
        eval_results=eval_results(result),
    )
    text = (
        _environment()
        .get_template("card.md")
        .render(
            result=result,
            report=report,
            stored=_stored(result),
            measured=measured(result),
            facts=list(_facts(result)),
            command=code_block(command_text(report["command"])) if report["command"] else None,
            recovery_command=code_block(command_text(result.recovery["command"])) if result.recovery else None,
            worst=sorted((x for x in result.layers if "error" in x), key=lambda x: -x["error"])[:_WORST],
        )
    )
    return f"---\n{data.to_yaml()}\n---\n{text}"


def _kinds(result: Result) -> list[str]:
    """How the hub finds what was pruned, and does not find what was only trained or quantised."""
    if result.trained_dense:
        return []
    if result.dense_quantised:
        return ["quantized", result.pattern]
    return ["pruned", "structured" if result.shrunk else "sparse", result.pattern]


def _stored(result: Result) -> str:
    """How the weights are stored, and what opens them."""
    if result.packed:
        return _PACKED
    if result.shrunk:
        return _OPENS.get(str(result.report.get("layout")), "")
    return _INTEGERS.format(result.bits) if result.bits else _DENSE


def _facts(result: Result) -> Iterator[tuple[str, str]]:
    """The rows of the card's table."""
    report, text = result.report, result.calibration
    settings = ", ".join(
        f"{key} {value}" for key, value in report["settings"].items() if isinstance(value, str | int | float)
    )
    yield "base model", result.name if report["base_model"].startswith(".") else report["base_model"] or report["model"]
    yield "method", result.method + (": " + settings if settings else "")
    yield "pattern", result.pattern
    yield (
        "text",
        (
            f"{text['num_windows']} windows of {text['window_tokens']} tokens, sha256 {text['digest'][:16]}"
            if text
            else "none: by the weights alone"
        ),
    )
    if result.shrunk:
        whole = "the model's parameters"  # a search over splits is given a share of those
        share_of = whole if report.get("splits") else f"the parameters of all {', '.join(report['units'])}"
        yield "budget", f"{report['keep']:g} of {share_of}"
        yield "refit", f"{len(report['layers'])} matrices by least squares" if report["layers"] else "no"
        yield "recovery", f"{report['recovered'][-1]['step']:.0f} steps" if report["recovered"] else "no"
    elif report.get("mean_error") is not None:
        yield "mean relative reconstruction error", error_text(report["mean_error"])
    if companion := report.get("companion"):
        about = f"rank {companion['rank']}, {companion['weights']:,} weights"
        yield "low-rank companion, in `adapter`", f"{about}; error with it {error_text(companion['mean_error'])}"
    if "flips" in report:
        yield "changed against the prior", f"{percent(report['flips'])} of the weights"


def with_measurements(card: str, result: Result) -> str:
    """Return the card with its measured part, and the scores in its metadata, as of now; all else stays as it is.

    Raises CheckpointError if its metadata cannot be read.
    """
    try:
        parsed = ModelCard(card)
    except Exception as error:  # YAML's own errors, and those of the hub's checks
        raise CheckpointError(
            f"the metadata of README.md cannot be read ({first_line(error)}): mend it, or delete the file"
        ) from error
    data: Any = parsed.data
    data.eval_results = eval_results(result)
    data.model_name = data.model_name or f"{result.name}, {result.title}"
    text = _KNOWN.sub(lambda _: _stored(result), parsed.text.lstrip("\n"), count=1)
    if BEGIN in text and END in text:
        text = re.sub(f"{BEGIN}.*?{END}", lambda _: measured(result), text, count=1, flags=re.DOTALL)
    else:
        text = f"{text.rstrip()}\n\n{measured(result)}\n"
    return f"---\n{parsed.data.to_yaml()}\n---\n{text}"


def eval_results(result: Result) -> list[EvalResult] | None:
    """Return what was measured in the hub's terms; None if nothing was."""
    found = [
        EvalResult(
            task_type="text-generation",
            dataset_type=entry["text"],
            dataset_name=entry["text"],
            metric_type="perplexity",
            metric_name=f"perplexity, windows of {entry['window']} tokens",
            metric_value=entry["value"],
        )
        for entry in result.perplexities
        if math.isfinite(entry["value"])
    ] + [
        EvalResult(
            task_type="text-generation",
            dataset_type=entry["task"],
            dataset_name=entry["task"],
            metric_type=entry["metric"],
            metric_name=f"{entry['metric']}, zero-shot",
            metric_value=entry["value"],
        )
        for entry in result.tasks
        if math.isfinite(entry["value"])
    ]
    return found or None


def measured(result: Result) -> str:
    """Return what was measured as Markdown: perplexity, tasks, speed, size."""
    lines: list[str] = []
    if result.perplexities:
        lines += ["| perplexity | tokens | window | dense | pruned |", "|---|---|---|---|---|"]
        for e in result.perplexities:
            dense = short(e["dense"]["value"]) if e.get("dense") else "-"
            lines.append(f"| {escaped(e['text'])} | {e['tokens']:,} | {e['window']} | {dense} | {short(e['value'])} |")
    if result.tasks:
        lines += ["", "| task | metric | items | dense | pruned |", "|---|---|---|---|---|"]
        for e in result.tasks:
            dense = _with_error(e["dense"]) if e.get("dense") else "-"
            names = f"{escaped(e['task'])} | {escaped(e['metric'])}"
            lines.append(f"| {names} | {e['num_items']:,} | {dense} | {_with_error(e)} |")
    if not lines:
        lines.append(
            "Not measured yet: `topiarist eval OUT --text heldout.txt --save` writes the price in quality here."
        )
    if result.benchmark:
        lines += ["", escaped(f"{result.benchmark['verdict']} ({result.benchmark['machine']})")]
    if (size := result.size) and (result.packed or not result.shrunk):
        share = percent(size["packed"] / size["dense"])
        what = "Packed it is" if result.packed else "`topiarist pack` makes it"
        lines += ["", f"{what} {size_text(size['packed'])}, {share} of the dense {size_text(size['dense'])}."]
    return "\n".join([BEGIN, *lines, END])


def _with_error(entry) -> str:
    return short(entry["value"]) + (f" ± {entry['stderr']:.3f}" if entry.get("stderr") is not None else "")


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
        keep_trailing_newline=True,
    )
    environment.filters |= {"escaped": escaped, "code": code, "percent": percent, "error": error_text, "short": short}
    environment.filters["perplexity"] = lambda loss: f"{math.exp(min(loss, 700.0)):.2f}"
    return environment
