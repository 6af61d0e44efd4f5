"""Host memory of a process that learns masks or recovers: alone, and as one of several that divide the weights (FSDP2).

    python -m benchmarks.shards --folder /tmp/shards [--commands recover learn] [--processes 1 2] [--blocks 4 16]

Llama-shaped models of so many blocks with random weights in bf16 are made in the folder, pruned to 2:4 by magnitude, and
trained for a few steps of short sequences, so that weights and what is kept beside them are nearly all of the memory. Every
number of processes is a run of its own; the peak is the resident size of the process at its largest, program included. What
a further block adds (the last column) is what decides for a large model; the rest is the program and one block on its way.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import topiarist as tp
from topiarist.core.meter import peak_memory_bytes
from topiarist.masklearn import Preset, Schedule

WINDOW, VOCABULARY = 64, 4096
RECIPE = Preset(
    steps=4, sequences=4, length=WINDOW, lr=Schedule(2e-2, 0.0, "cosine"), tau=Schedule(1.0, 0.05, "exponential"),
    lam=Schedule(1e-5, 0.0), max_norm=1.0, gap=0.02, prior_samples=2,
)  # fmt: skip


def make(folder: Path, blocks: int) -> None:
    """A dense model and the same with 2:4 zeros."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=640, intermediate_size=2560, num_hidden_layers=blocks, num_attention_heads=10, vocab_size=VOCABULARY,
        num_key_value_heads=10, tie_word_embeddings=True, max_position_embeddings=1024,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder / "dense")
    tp.prune(folder / "dense", folder / "pruned", method="magnitude", pattern="2:4")


def work(command: str, folder: Path, processes: int) -> None:
    """Train as one of so many processes, and write down the peak."""
    torch.set_num_threads(1)
    tokens = torch.randint(VOCABULARY, (64, WINDOW), generator=torch.Generator().manual_seed(0))
    shard, out = processes > 1, folder / f"{command}-{processes}"
    if command == "recover":
        tp.recover(
            folder / "pruned", out, teacher=folder / "dense", data=tokens, tokens=16 * WINDOW, sequences=4, batch_size=1,
            window_tokens=WINDOW, held_out=2, shard=shard,
        )  # fmt: skip
    else:
        tp.learn(
            folder / "dense", out, data=tokens, preset=RECIPE, prior="magnitude", batch_size=1, shard=shard, held_out=2
        )
    rank = os.environ.get("RANK", "0")
    place = folder / f"{command}-{processes}.{rank}.json"
    place.write_text(json.dumps({"peak": peak_memory_bytes()}))


def main() -> None:
    """Print a row for every process of every run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--commands", nargs="+", default=["recover", "learn"], choices=["recover", "learn"])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--blocks", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--work", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work:
        work(given.work[0], given.folder, int(given.work[1]))
        return
    print("| command | processes | process | blocks | peak, GB | of one process | MB a further block |")
    print("|---|---|---|---|---|---|---|")
    for command in given.commands:
        peaks: dict[tuple[int, int, int], int] = {}
        for blocks in given.blocks:
            folder = given.folder / str(blocks)
            if not (folder / "pruned").is_dir():
                make(folder, blocks)
            for processes in given.processes:
                start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
                words = [sys.executable, *(start if processes > 1 else []), "-m", "benchmarks.shards"]
                words += ["--folder", str(folder), "--work", command, str(processes)]
                subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
                for rank in range(processes):
                    found: dict[str, Any] = json.loads((folder / f"{command}-{processes}.{rank}.json").read_text())
                    peak = peaks[processes, rank, blocks] = found["peak"]
                    first = given.blocks[0]
                    share = f"{peak / peaks[given.processes[0], 0, blocks]:.2f}"
                    grown = (peak - peaks[processes, rank, first]) / max(blocks - first, 1) / 1e6
                    more = f"{grown:.0f}" if blocks > first else ""
                    print(
                        f"| {command} | {processes} | {rank} | {blocks} | {peak / 1e9:.2f} | {share} | {more} |",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
