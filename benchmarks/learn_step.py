"""One masked training step against one full training step of the dense model: same process, model and batch.

    python benchmarks/learn_step.py [--model FOLDER] [--repeat 5] [--threads N] [--lean] [--clip] [--relaxation topn]

Prints one table and writes it, dated and with the machine named, to benchmarks/results/learn_step.md. Both steps run in
bf16 on 2,048 tokens: forward, backward, optimiser (AdamW on all weights; on the logits of every linear in the blocks).
Steps alternate, and the least CPU time of each is compared, so that other work on the machine counts for little; wall
time stands beside it.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from topiarist.core.patterns import NM
from topiarist.masklearn.layer import Annealing, MaskedLinear, learned_masks, set_draws
from topiarist.masklearn.optim import MaskAdamW, resident_bytes
from topiarist.masklearn.relax import relaxation_for

RESULTS = Path(__file__).parent / "results" / "learn_step.md"


def demo_model(folder: str | None) -> nn.Module:
    """The model in `folder`, or a random one of the demo model's shape (135 M parameters)."""
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    if folder:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    config = LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
        vocab_size=49152, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(torch.bfloat16)


def masked_copy(model: nn.Module, pattern: NM, dtype: torch.dtype, relaxation: str) -> nn.Module:
    """A copy that shares the frozen weights, with a learned mask on every linear in the blocks."""
    import copy

    memo = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()}
    masked = copy.deepcopy(model, memo)
    linears = [(name, m) for name, m in masked.named_modules() if isinstance(m, nn.Linear) and ".layers." in name]
    for index, (name, linear) in enumerate(linears):
        prior = pattern.mask(linear.weight.float().abs())
        layer = MaskedLinear.from_module(linear, relaxation_for(pattern, relaxation), prior, index=index, dtype=dtype)
        masked.set_submodule(name, layer)
    return masked.train()


def timed(what: Callable[[], object]) -> tuple[float, float]:
    """(CPU seconds of all threads, wall seconds)."""
    cpu, wall = time.process_time(), time.perf_counter()
    what()
    return time.process_time() - cpu, time.perf_counter() - wall


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--lean", action="store_true", help="bf16 logits, one second moment per group")
    parser.add_argument("--relaxation", default="categorical", choices=["categorical", "topn"])
    parser.add_argument("--clip", action="store_true", help="clip the gradient's norm: one more pass over the masks")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)

    dense = demo_model(args.model).train()
    masked = masked_copy(dense, NM(2, 4), torch.bfloat16 if args.lean else torch.float32, args.relaxation)
    layers = learned_masks(masked)
    tokens = torch.randint(0, dense.config.vocab_size, (2, 1024))
    dense_optimizer = torch.optim.AdamW(dense.parameters(), lr=0.0)  # rate zero: the shared weights must not move
    optimizer = MaskAdamW(
        layers, lr=1e-3, second_moment="group" if args.lean else "logit", max_norm=1.0 if args.clip else None
    )
    annealing = Annealing()
    phases: dict[str, list[tuple[float, float]]] = {
        "dense": [],
        "masked": [],
        "dense optimiser": [],
        "mask optimiser": [],
    }

    def dense_step() -> None:
        dense(input_ids=tokens, labels=tokens).loss.backward()
        phases["dense optimiser"].append(timed(dense_optimizer.step))
        dense_optimizer.zero_grad()

    def masked_step() -> None:
        set_draws(layers, annealing, step=10, total=100)
        masked(input_ids=tokens, labels=tokens).loss.backward()
        phases["mask optimiser"].append(timed(optimizer.step))

    for _ in range(args.repeat + 1):
        phases["dense"].append(timed(dense_step))
        phases["masked"].append(timed(masked_step))
    best = {name: min(times[1:]) for name, times in phases.items()}
    weights = sum(layer.weight.numel() for layer in layers)
    name = f"{weights / 1e6:.1f} M{' lean' if args.lean else ''}{' clipped' if args.clip else ''}"
    name += "" if args.relaxation == "categorical" else f" {args.relaxation}"
    seconds = " | ".join(f"{cpu:.2f} ({wall:.2f})" for cpu, wall in best.values())
    lines = [
        f"| masked weights | {' | '.join(best)} | ratio | bytes per weight |",
        "|---" * (len(best) + 3) + "|",
        f"| {name} | {seconds} | {best['masked'][0] / best['dense'][0]:.2f} | {resident_bytes(layers, optimizer):.2f} |",
    ]
    where = f"{platform.machine()}, {args.threads} thread(s), torch {torch.__version__}"
    text = "\n".join([f"2,048 tokens, 2:4, CPU (wall) seconds, {datetime.date.today()}, {where}", "", *lines, ""])
    print(text)
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a") as file:
        file.write(text + "\n")


if __name__ == "__main__":
    main()
