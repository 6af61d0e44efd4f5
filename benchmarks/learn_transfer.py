"""One base, many masks: a general 2:4 mask, then one for an encyclopaedia and one for fiction, each measured on both.

    python -m benchmarks.learn_transfer --data DIR --fiction BOOKS [--general 80 | --from DIR] [--domain 32] [--windows 8]

DIR/train has wikipedia, openwebtext and c4 (.jsonl.gz, every tenth document held out). BOOKS is a folder of one .txt a
book, the last of them held out; those measured are Jane Austen's six novels, as Debian's r-cran-janeaustenr has them.
General: preset `quick` on web text from Wanda. Transfer: `--domain` steps on the domain from the general mask; scratch: as
many from a mask of Wanda on the domain. About 16 CPU seconds a step of 2,048 tokens: 5 masks, (80 + 4 x 32) steps and 3
priors by default. Killed, it goes on where it was; finished numbers are kept in benchmarks/results/learn-transfer.jsonl.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

import topiarist as tp
from benchmarks.learn_cells import books, cell, finished, web, wikipedia, windows
from demo.assets import assets_dir, model_dir
from topiarist.data import Windows
from topiarist.evaluation.perplexity import load_model

CELLS, PAGE = Path("benchmarks/results/learn-transfer.jsonl"), Path("benchmarks/results/learn-transfer.md")
DOMAINS = ("encyclopaedia", "fiction")


def measure(folder: Path, texts: dict[str, Windows]) -> dict[str, Any]:
    model = load_model(folder)
    return {"perplexity": {name: tp.perplexity(model, w).value for name, w in texts.items()}}


def page() -> str:
    lines = [
        "# Masks for domains\n\nDemo model, 2:4, `python -m benchmarks.learn_transfer`; perplexity on held-out text.\n",
        "| mask | steps | encyclopaedia | fiction |",
        "|---|---|---|---|",
    ]
    for found in finished(CELLS).values():
        value = found["perplexity"]
        name, _, steps = found["name"].partition(" @")
        lines.append(f"| {name} | {steps} | {value['encyclopaedia']:.1f} | {value['fiction']:.1f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--fiction", type=Path, required=True)
    parser.add_argument("--general", type=int, default=80)
    parser.add_argument("--from", dest="given", type=Path, help="a finished run of `learn` as the general mask")
    parser.add_argument("--domain", type=int, default=32)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    from transformers.utils import logging

    logging.disable_progress_bar()
    root = assets_dir() / "learn-transfer"
    held_out = {"encyclopaedia": wikipedia(options.data, held_out=True), "fiction": books(options.fiction)[-1:]}
    texts = {name: windows(documents, options.windows) for name, documents in held_out.items()}
    training = {
        "encyclopaedia": wikipedia(options.data, held_out=False)[:400],
        "fiction": books(options.fiction)[:-1],
        "general": web(options.data)[:400],
    }
    # What is measured: name -> where the masked model lies, and how it is made.
    general = options.given or root / f"general-{options.general}"
    cell(CELLS, "dense @", lambda: measure(model_dir(), texts))
    PAGE.write_text(page())

    def learned(name: str, out: Path, text: str, prior: Any, steps: int) -> None:
        def make() -> dict[str, Any]:
            report = tp.learn(model_dir(), out, data=training[text], prior=prior, preset="quick", steps=steps)
            return {**measure(out, texts), "flips": report.flips, "losses": [report.prior_loss, report.loss]}

        cell(CELLS, f"{name} @{steps}", make)
        PAGE.write_text(page())

    if options.given:
        steps = tp.LearnReport.from_folder(general).settings["steps"]
        cell(CELLS, f"general @{steps}", lambda: measure(general, texts))
    else:
        learned("general", general, "general", "wanda", options.general)
    for domain in DOMAINS:
        short = f"{domain}-{options.domain}"
        learned(f"{domain}, from the general mask", root / short, domain, general / "masks.safetensors", options.domain)
        learned(f"{domain}, from Wanda on it", root / f"{short}-scratch", domain, "wanda", options.domain)
    print(page())


if __name__ == "__main__":
    main()
