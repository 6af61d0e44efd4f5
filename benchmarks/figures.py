"""The pictures of docs/figures that show measurements, drawn from the cells in benchmarks/results.

    python -m benchmarks.figures              # all of them
    python -m benchmarks.figures alps owl     # some

Equal cells give equal bytes: no dates, fixed identifiers.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).parent.parent
CELLS, FIGURES = ROOT / "benchmarks" / "results", ROOT / "docs" / "figures"
SPARSITIES, KEEPS = ("0.5", "0.6", "0.7", "0.8"), ("0.9", "0.8", "0.7", "0.5")
GREY, COLOURS = "#b8b8b8", ("#1f6f8b", "#d1603d", "#5b8c3e", "#7a4f9a")
STANDARD = ["standard", 32, 512, 8, False]


def cells(name: str) -> list[dict[str, Any]]:
    """All cells of one benchmark, the newest last."""
    return [json.loads(line) for line in (CELLS / f"{name}.jsonl").read_text().splitlines()]


@functools.cache
def perplexities(name: str, settings: str) -> dict[str, dict[str, float]]:
    """Cell -> corpus -> perplexity, of cells made with those settings (JSON)."""
    return {c["cell"]: c["perplexity"] for c in cells(name) if c.get("settings") == json.loads(settings)}


def same_bytes() -> None:
    """Make matplotlib write the same file for the same picture."""
    plt.rcParams.update({"svg.hashsalt": "topiarist", "font.size": 9, "svg.fonttype": "none"})


def save(figure: Any, name: str) -> None:
    FIGURES.mkdir(parents=True, exist_ok=True)
    figure.savefig(FIGURES / f"{name}.svg", metadata={"Date": None}, bbox_inches="tight")
    plt.close(figure)


def axes(width: float = 6.0, height: float = 3.2) -> tuple[Any, Any]:
    figure, ax = plt.subplots(figsize=(width, height))
    ax.spines[["top", "right"]].set_visible(False)
    return figure, ax


# ------------------------------------------------------------------------------------------- one-shot methods

ONE_SHOT = {
    "magnitude": "magnitude", "wanda": "Wanda", "wanda:refit=true": "Wanda, refit", "sparsegpt": "SparseGPT",
    "sparsegpt:refit=true": "SparseGPT, refit", "sparsellm:down_refit=false": "SparseLLM, no down_refit",
    "sparsellm": "SparseLLM", "alps": "ALPS fast", "alps:preset=best": "ALPS best",
}  # fmt: skip


def by_pattern() -> dict[str, dict[str, float]]:
    """Cells of the table by pattern; those of a uniform allocation were made by the benchmark of allocations."""
    uniform = {
        f"{method} {sparsity}": allocated(method, "uniform", sparsity)
        for method in ("sparsegpt", "alps")
        for sparsity in SPARSITIES
    }
    return uniform | perplexities("quality", json.dumps(STANDARD))


def one_shot(name: str, shown: Iterable[str]) -> None:
    """C4 perplexity by sparsity: the methods `shown` in colour, the others grey."""
    table, shown = by_pattern(), list(shown)
    figure, ax = axes()
    for method, label in ONE_SHOT.items():
        values = [table[f"{method} {s}"]["c4"] for s in SPARSITIES]
        front = method in shown
        ax.plot(
            [float(s) for s in SPARSITIES], values, marker="o" if front else "", lw=2 if front else 1,
            color=COLOURS[shown.index(method)] if front else GREY, label=label if front else None, zorder=2 + front,
        )  # fmt: skip
    ax.axhline(table["dense -"]["c4"], color="black", lw=1, ls=":")
    ax.text(0.5, table["dense -"]["c4"] * 1.06, "dense", fontsize=8)
    ax.set(
        yscale="log", ylim=(20, 3000), xlabel="fraction of zeros", ylabel="perplexity, C4", xticks=[0.5, 0.6, 0.7, 0.8]
    )
    ax.legend(frameon=False, title="grey: the other methods", title_fontsize=8, fontsize=8)
    save(figure, name)


def correction() -> None:
    table, corpora = perplexities("quality", '["standard", 128, 512, 16, false]'), ("wikitext2", "c4", "wikipedia")
    rows = {"ALPS": "alps", "--correct": "alps+correct", "--refine": "alps+refine:epochs=3"}
    figure, panels = plt.subplots(1, 2, figsize=(7, 3))
    for ax, pattern in zip(panels, ("2:4", "0.7"), strict=True):
        for number, (label, method) in enumerate(rows.items()):
            values = [table[f"{method} {pattern}"][c] for c in corpora]
            ax.bar([i + 0.27 * number for i in range(3)], values, 0.25, color=COLOURS[number], label=label)
        ax.set(title=pattern, xticks=[i + 0.27 for i in range(3)], ylabel="perplexity")
        ax.set_xticklabels(["WikiText-2", "C4", "Wikipedia"], fontsize=8)
        for i, corpus in enumerate(corpora):
            ax.hlines(table["dense -"][corpus], i - 0.15, i + 0.7, color="black", lw=1, ls=":")
        ax.spines[["top", "right"]].set_visible(False)
    figure.legend(
        *panels[0].get_legend_handles_labels(),
        frameon=False,
        fontsize=8,
        ncols=3,
        loc="lower center",
        bbox_to_anchor=(0.5, -0.08),
    )
    save(figure, "correction")


def refinement() -> None:
    """How much of the logarithmic gap to dense a refinement closes after each solver, on C4."""
    table, patterns = by_pattern(), (*SPARSITIES, "2:4", "4:8")
    dense = table["dense -"]["c4"]
    figure, ax = axes(7)
    for number, (method, label) in enumerate(
        {"magnitude": "magnitude", "wanda": "Wanda", "sparsegpt": "SparseGPT", "alps": "ALPS"}.items()
    ):
        pairs = [(table[f"{method} {p}"]["c4"], table[f"{method}+refine:epochs=3 {p}"]["c4"]) for p in patterns]
        closed = [100 * math.log(before / after) / math.log(before / dense) for before, after in pairs]
        ax.bar([i + 0.2 * number for i in range(len(patterns))], closed, 0.18, color=COLOURS[number], label=label)
    ax.set(
        ylabel="gap to dense closed, %",
        xticks=[i + 0.3 for i in range(len(patterns))],
        xticklabels=patterns,
        ylim=(0, 100),
    )
    ax.legend(frameon=False, fontsize=8, ncols=4)
    save(figure, "refinement")


# ------------------------------------------------------------------------------------------------- allocation

RULES = {
    "linear": "linear", "owl": "owl", "sensitivity:estimate=hutchinson": "sensitivity (Hutchinson)",
    "sensitivity:estimate=fisher": "sensitivity (Fisher)", "search": "search",
}  # fmt: skip


def allocation(name: str, shown: Iterable[str]) -> None:
    """Perplexity of ALPS on C4 relative to the uniform allocation, by sparsity."""
    shown = list(shown)
    figure, ax = axes()
    for rule, label in RULES.items():
        values = [
            100 * (allocated("alps", rule, s)["c4"] / allocated("alps", "uniform", s)["c4"] - 1) for s in SPARSITIES
        ]
        front = rule in shown
        ax.plot(
            [float(s) for s in SPARSITIES], values, marker="o" if front else "", lw=2 if front else 1,
            color=COLOURS[shown.index(rule)] if front else GREY, label=label if front else None, zorder=2 + front,
        )  # fmt: skip
    ax.axhline(0, color="black", lw=1, ls=":")
    ax.set(xlabel="fraction of zeros", ylabel="perplexity against uniform, %", xticks=[0.5, 0.6, 0.7, 0.8])
    ax.legend(frameon=False, fontsize=8, title="ALPS, C4; grey: the other rules", title_fontsize=8)
    save(figure, name)


def allocated(method: str, rule: str, sparsity: str) -> dict[str, float]:
    """Perplexities of the cell whose rule begins with `rule`."""
    prefix = f"{sparsity} {method} {rule}"
    return next(c["perplexity"] for c in cells("allocation") if c["cell"].startswith(prefix))


# ---------------------------------------------------------------------------------------------- learned masks


def maskllm() -> None:
    """Perplexity on C4 of the hard mask by tokens seen, 4,096 a step of `standard`."""
    table = {c["name"]: c["perplexity"] for c in cells("learn-curve")}
    standard = [(4096 * step, table[f"standard, step {step}, c4"]) for step in (0, 75, 125, 200, 220)]
    # The run of `quick` wrote no cells; its numbers are those of docs/results/learned-masks.md.
    curves = {"standard": standard, "quick": [(65536, 114.1), (98304, 86.6), (163840, 84.1)]}
    figure, ax = axes()
    for number, (label, points) in enumerate(curves.items()):
        ax.plot([t / 1e3 for t, _ in points], [p for _, p in points], marker="o", color=COLOURS[number], label=label)
    for value, label in ((136.6, "SparseGPT, weights updated"), (99.2, "ALPS, weights updated"), (37.4, "dense")):
        ax.axhline(value, color="black", lw=1, ls=":")
        ax.text(905, value + 1.5, label, fontsize=8, ha="right")
    ax.set(xlabel="thousand tokens seen", ylabel="perplexity, C4", ylim=(30, 205))
    ax.legend(frameon=False, fontsize=8, loc="upper right")
    save(figure, "maskllm")


# ------------------------------------------------------------------------------------------ structural pruning

STRUCTURAL = {
    "taylor": "taylor", "policy-gradient": "policy-gradient", "flap": "flap", "wanda-sp": "wanda-sp",
    "block-influence": "block-influence",
}  # fmt: skip


def cut_cells() -> dict[str, tuple[float, float]]:
    """Cell -> (perplexity on C4 in windows of 1,024, that of the dense model on the same text)."""
    found: dict[str, tuple[float, float]] = {}
    for protocol in (["openwebtext", "hetero", 64, 512, 8, 50, []], ["openwebtext", "hetero", 32, 512, 4, 50, []]):
        table = perplexities("structured", json.dumps(protocol))
        found |= {cell: (p["c4@1024"], table["dense 1.0 -"]["c4@1024"]) for cell, p in table.items()}
    return found


def structural(name: str, shown: str) -> None:
    """C4 perplexity after the refit over the dense one, by keep rate; dropped blocks have no refit."""
    table = cut_cells()
    figure, ax = axes()
    for method, label in STRUCTURAL.items():
        variant = "cut" if method == "block-influence" else "refit"
        values = [table[f"{method} {keep} {variant}"] for keep in KEEPS]
        front = method == shown
        ax.plot(
            [float(k) for k in KEEPS], [p / dense for p, dense in values], marker="o" if front else "",
            lw=2 if front else 1, color=COLOURS[0] if front else GREY, zorder=2 + front,
            label=f"{label}, {'cut' if variant == 'cut' else 'refitted'}" if front else None,
        )  # fmt: skip
    ax.set(
        yscale="log", xlabel="share of the units' parameters that stays", ylabel="perplexity / dense, C4", ylim=(1, 30)
    )
    ax.set_yticks([1, 1.5, 2, 4, 8, 16], labels=["1", "1.5", "2", "4", "8", "16"])
    ax.invert_xaxis()
    ax.legend(frameon=False, fontsize=8, title="grey: the other methods", title_fontsize=8)
    save(figure, name)


def recovery() -> None:
    table = cut_cells()
    figure, ax = axes(7)
    for number, variant in enumerate(("cut", "refit", "recover")):
        values = [table.get(f"{method} 0.8 {variant}") for method in STRUCTURAL]
        places = [i + 0.27 * number for i, v in enumerate(values) if v]
        label = {"cut": "cut", "refit": "refitted", "recover": "and 50 steps of recovery"}[variant]
        ax.bar(places, [v[0] for v in values if v], 0.25, color=COLOURS[number], label=label)
    ax.axhline(39.9, color="black", lw=1, ls=":")
    ax.set(ylabel="perplexity, C4, keep 0.8", ylim=(0, 115), xticks=[i + 0.27 for i in range(len(STRUCTURAL))])
    ax.set_xticklabels(STRUCTURAL.values(), fontsize=8)
    ax.legend(frameon=False, fontsize=8, ncols=3)
    save(figure, "recovery")


def summary() -> None:
    """What methods and repairs leave at 2:4, on C4."""
    table = perplexities("quality", '["standard", 128, 512, 16, false]')
    learned = {c["name"]: c["perplexity"] for c in cells("learn-curve")}["standard, step 220, standard c4"]
    bars = {
        "Wanda": table["wanda 2:4"]["c4"], "SparseGPT": table["sparsegpt 2:4"]["c4"], "ALPS": table["alps 2:4"]["c4"],
        "MaskLLM, weights frozen": learned, "ALPS --correct": table["alps+correct 2:4"]["c4"],
        "ALPS --refine": table["alps+refine:epochs=3 2:4"]["c4"], "dense": table["dense -"]["c4"],
    }  # fmt: skip
    figure, ax = axes(7, 2.6)
    ax.barh(list(bars), list(bars.values()), color=[*[COLOURS[0]] * (len(bars) - 1), GREY])
    for place, value in enumerate(bars.values()):
        ax.text(value + 2, place, f"{value:.0f}", va="center", fontsize=8)
    ax.invert_yaxis()
    ax.set(xlabel="perplexity on held-out C4, SmolLM2-135M with 2:4 zeros")
    save(figure, "summary")


ALL: dict[str, Callable[[], None]] = {
    "wanda": lambda: one_shot("wanda", ["wanda", "wanda:refit=true"]),
    "sparsegpt": lambda: one_shot("sparsegpt", ["sparsegpt", "sparsegpt:refit=true"]),
    "alps": lambda: one_shot("alps", ["alps", "alps:preset=best"]),
    "sparsellm": lambda: one_shot("sparsellm", ["sparsellm", "sparsellm:down_refit=false"]),
    "correction": correction,
    "refinement": refinement,
    "linear": lambda: allocation("linear", ["linear"]),
    "owl": lambda: allocation("owl", ["owl"]),
    "sensitivity": lambda: allocation(
        "sensitivity", ["sensitivity:estimate=hutchinson", "sensitivity:estimate=fisher"]
    ),
    "search": lambda: allocation("search", ["search"]),
    "maskllm": maskllm,
    "policy-gradient": lambda: structural("policy-gradient", "policy-gradient"),
    "taylor": lambda: structural("taylor", "taylor"),
    "flap": lambda: structural("flap", "flap"),
    "wanda-sp": lambda: structural("wanda-sp", "wanda-sp"),
    "block-influence": lambda: structural("block-influence", "block-influence"),
    "recovery": recovery,
    "summary": summary,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(ALL)}; default all")
    names = parser.parse_args().names or list(ALL)
    same_bytes()
    for name in names:
        ALL[name]()
        print(FIGURES / f"{name}.svg")


if __name__ == "__main__":
    main()
