"""What each kind of matrix costs alone: the loss on some text when only the matrices of that name come from a changed model.

    python -m benchmarks.kinds DENSE CHANGED [CHANGED ...] --text text.jsonl

Nats a token above the dense model's, one column a changed model (pruned or quantised, of the same shapes), in fp32. The last
row has all kinds at once; losses of kinds alone add up to less or more than that.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor, nn

import topiarist as tp
from topiarist.core.losses import next_token_losses
from topiarist.data import calibration_windows, load_tokenizer
from topiarist.evaluation.perplexity import load_model


@torch.no_grad()
def loss(model: Any, rows: Tensor) -> float:
    return float(torch.stack([next_token_losses(model(row[None]).logits, row[None]).mean() for row in rows]).mean())


def linears(model: Any) -> dict[str, nn.Linear]:
    head = model.get_output_embeddings()
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dense")
    parser.add_argument("changed", nargs="+")
    parser.add_argument("--text", nargs="+", required=True)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--seed", type=int, default=1, help="of the draw: another than the calibration's")
    options = parser.parse_args()
    torch.set_num_threads(1)
    text, tokenizer = tp.text_files(options.text), load_tokenizer(options.dense)
    rows = calibration_windows(text, tokenizer, num_samples=options.windows, window=512, seed=options.seed).tokens
    model = load_model(options.dense).float()
    own = {name: module.weight.data for name, module in linears(model).items()}
    kinds = list(dict.fromkeys(name.rpartition(".")[2] for name in own))
    before, columns = loss(model, rows), []
    for folder in options.changed:
        changed = {name: module.weight.data for name, module in linears(load_model(folder).float()).items()}
        column = []
        for kind in [*kinds, ""]:
            for name, module in linears(model).items():
                module.weight.data = changed[name] if name.endswith(kind) else own[name]
            column.append(loss(model, rows) - before)
        columns.append(column)
    print(f"| | {' | '.join(options.changed)} |\n|---|{'---|' * len(columns)}")
    for kind, *found in zip([*kinds, "all"], *columns, strict=True):
        print(f"| {kind} | {' | '.join(f'{value:+.4f}' for value in found)} |")


if __name__ == "__main__":
    main()
