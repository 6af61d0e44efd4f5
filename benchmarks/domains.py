"""2:4 for one domain: pruned and recovered on its text alone, against the dense model on that domain and on another.

    python -m benchmarks.domains --data DIR --fiction BOOKS --folder WORK [--tokens 200k] [--domains fiction encyclopaedia]

DIR/train has wikipedia.jsonl.gz, every tenth document held out. BOOKS is a folder of one .txt a book, the last held out;
those measured are Jane Austen's six novels, as Debian's r-cran-janeaustenr has them. ALPS sees 128 x 512 tokens of the
domain, recovery the given number of them, towards the dense model's predictions. Cells are kept in
benchmarks/results/domains.jsonl.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from benchmarks.learn_cells import books, cell, finished, wikipedia, windows
from benchmarks.learn_transfer import DOMAINS, measure
from benchmarks.stages import run_stage
from demo.assets import model_dir

CELLS = Path(__file__).parent / "results" / "domains.jsonl"
STAGES = ("prune method=alps pattern=2:4 window=512", "recover tokens={tokens}")


def table() -> str:
    """Every model's perplexity on both domains, and its ratio to the dense model's."""
    found = {name: one["perplexity"] for name, one in finished(CELLS).items()}
    lines = [f"| model | {' | '.join(DOMAINS)} | of dense |", "|---|---|---|---|"]
    for name, values in found.items():
        ratios = ", ".join(f"{values[d] / found['dense'][d]:.2f}" for d in DOMAINS)
        lines.append(f"| {name} | {' | '.join(f'{values[d]:.1f}' for d in DOMAINS)} | {ratios} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--fiction", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True, help="where results lie")
    parser.add_argument("--tokens", default="200k")
    parser.add_argument("--domains", nargs="+", choices=DOMAINS, default=DOMAINS)
    parser.add_argument("--windows", type=int, default=16, help="of 1,024 tokens of each domain's held-out text")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.folder.mkdir(parents=True, exist_ok=True)
    held_out = {"encyclopaedia": wikipedia(options.data, held_out=True), "fiction": books(options.fiction)[-1:]}
    training = {"encyclopaedia": wikipedia(options.data, held_out=False)[:1000], "fiction": books(options.fiction)[:-1]}
    texts = {name: windows(documents, options.windows) for name, documents in held_out.items()}
    cell(CELLS, "dense", lambda: measure(model_dir(), texts))
    for domain in options.domains:
        file = options.folder / f"{domain}.jsonl"
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in training[domain]))
        source = model_dir()
        for stage in STAGES:
            words = stage.format(tokens=options.tokens)
            source, before = options.folder / f"{domain}-{words.split()[0]}", source
            name = f"{domain}: {words}"
            if name not in finished(CELLS) or not source.is_dir():
                spent = run_stage(words, before, source, {False: file, True: file}, 1)
                spent["stage_cpu_seconds"] = spent.pop("cpu_seconds")  # the evaluation's own are added
                cell(CELLS, name, lambda spent=spent, source=source: {**spent, **measure(source, texts)})
    print(table())


if __name__ == "__main__":
    main()
