"""README.md of a pruned checkpoint. Its measured part stands between two marks, and is all that changes later."""

from __future__ import annotations

import re

from topiarist.results.pages.render import command_text, error_text, percent, short, size_text
from topiarist.results.pages.result import Result

BEGIN, END = "<!-- measured by topiarist -->", "<!-- end of what is measured -->"


def model_card(result: Result) -> str:
    """The card as a run writes it, in the hub's own terms (library_name, base_model, tags)."""
    report, calibration = result.report, result.calibration
    settings = ", ".join(f"{key} {value}" for key, value in report.get("settings", {}).items())
    worst = sorted(result.layers, key=lambda layer: -layer.get("error", 0.0))[:5]
    rows = [
        f"| `{w['name']}` | {w['shape'][0]} x {w['shape'][1]} | {percent(w['sparsity'])} | {error_text(w['error'])} |"
        for w in worst
    ]
    text = "none: by the weights alone"
    if calibration:
        text = (
            f"{calibration['samples']} windows of {calibration['window']} tokens, sha256 {calibration['digest'][:16]}"
        )
    command = command_text(report.get("command", []))
    return f"""---
library_name: transformers
base_model: {report["model"]}
tags: [pruned, sparse, "{report["pattern"]}", {result.method}]
---
# {result.name}, pruned {report["pattern"]} with {result.method}

{percent(result.sparsity)} of the weights of {len(result.layers)} matrices are zero. The files are ordinary dense tensors: any
loader opens them, and they are neither smaller nor faster by themselves. `pruning_report.html` shows every layer.

{measured(result)}

| | |
|---|---|
| method | {result.method}{": " * bool(settings)}{settings} |
| pattern | {report["pattern"]} |
| calibration | {text} |
| mean relative reconstruction error | {error_text(report["mean_error"])} |

```
{command}
```

Layers with the largest error:

| layer | shape | zeros | error |
|---|---|---|---|
{chr(10).join(rows)}

Made by topiarist {result.version}.
"""


def with_measurements(card: str, result: Result) -> str:
    """The card with its measured part as of now; a card without one gets it at its end."""
    if BEGIN in card and END in card:
        return re.sub(f"{BEGIN}.*?{END}", lambda _: measured(result), card, count=1, flags=re.DOTALL)
    return f"{card.rstrip()}\n\n{measured(result)}\n"


def measured(result: Result) -> str:
    """What was measured: perplexity, tasks, speed, size."""
    lines: list[str] = []
    if result.perplexities:
        lines += ["| perplexity | tokens | window | dense | pruned |", "|---|---|---|---|---|"]
        for e in result.perplexities:
            dense = short(e["dense"]["value"]) if e.get("dense") else "-"
            lines.append(f"| {e['text']} | {e['tokens']:,} | {e['window']} | {dense} | {short(e['value'])} |")
    if result.tasks:
        lines += ["", "| task | metric | items | dense | pruned |", "|---|---|---|---|---|"]
        for e in result.tasks:
            dense = _with_error(e["dense"]) if e.get("dense") else "-"
            lines.append(f"| {e['task']} | {e['metric']} | {e['num_items']:,} | {dense} | {_with_error(e)} |")
    if not lines:
        lines.append(
            "Not measured yet: `topiarist eval OUT --text heldout.txt --save` writes the price in quality here."
        )
    if result.benchmark:
        lines += ["", f"{result.benchmark['verdict']} ({result.benchmark['machine']})"]
    if (size := result.size) and not result.shrunk:
        share = percent(size["packed"] / size["dense"])
        lines += [
            "",
            f"`topiarist pack` makes it {size_text(size['packed'])}, {share} of the dense {size_text(size['dense'])}.",
        ]
    return "\n".join([BEGIN, *lines, END])


def _with_error(entry) -> str:
    return short(entry["value"]) + (f" ± {entry['stderr']:.3f}" if entry.get("stderr") is not None else "")
