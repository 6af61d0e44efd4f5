"""What `--plan` says of models from 1B to 70B and of a mixture, for one process and eight, and whether a run bears it out.

    python -m benchmarks.plans table --folder DIR [--models Llama-3.2-1B ...] [--windows 128] [--window 2048]
    python -m benchmarks.plans verify --folder DIR [--windows 32] [--window 512]

Weights are random: neither bytes nor seconds depend on them. One block of each model lies on disk, which a plan probes;
times are multiplied by the number of blocks. `verify` writes all 16 blocks of Llama-3.2-1B's shape (1.2B weights), plans,
and then runs what it planned. Tokens of a mixture fall on its experts as random routers send them.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.memory import LLAMA, MIXTURE, make_checkpoint
from topiarist.checkpoints.writing import bytes_to_write
from topiarist.core.meter import duration
from topiarist.pipelines.pruning.options import PruneOptions
from topiarist.pipelines.pruning.plan import Plan, Probe, plan_prune, probe_block
from topiarist.pipelines.quantizing.options import QuantizeOptions
from topiarist.pipelines.quantizing.plan import plan_quantize
from topiarist.pipelines.training.processes import Processes


def llama(hidden: int, channels: int, heads: int, keys: int, **more: Any) -> dict[str, Any]:
    return LLAMA | {
        "hidden_size": hidden,
        "intermediate_size": channels,
        "num_attention_heads": heads,
        "num_key_value_heads": keys,
        "head_dim": 128 if hidden > 2048 else 64,
        **more,
    }


UNTIED = {"tie_word_embeddings": False}
MODELS: dict[str, tuple[int, dict[str, Any]]] = {
    "Llama-3.2-1B": (16, llama(2048, 8192, 32, 8)),
    "Llama-3.1-8B": (32, llama(4096, 14336, 32, 8, **UNTIED)),
    "Qwen2.5-32B": (64, llama(5120, 27648, 40, 8, vocab_size=152064, **UNTIED)),
    "Llama-3.1-70B": (80, llama(8192, 28672, 64, 8, **UNTIED)),
    "Qwen3-30B-A3B": (48, MIXTURE),
}
"""Blocks, and the config of one. Qwen2.5's biases are left out."""
RUNS: dict[str, dict[str, Any]] = {
    "prune, sparsegpt": {"method": "sparsegpt", "pattern": "2:4"},
    "prune, alps": {"method": "alps", "pattern": "2:4"},
    "prune, alps, refine": {"method": "alps", "pattern": "2:4", "refine": True},
    "quantize, 4 bits": {"bits": 4},
}
"""Those of one solver stand together: they share its probe."""


def plan(run: dict[str, Any], base: Path, tokens: torch.Tensor, processes: int) -> Plan:
    """Plan one run as so many processes would; only this one is there."""
    settings = {**run, "data": tokens, "num_windows": len(tokens), "window_tokens": tokens.shape[1], "batch_size": 1}
    alone = patch.object(Processes, "join", classmethod(lambda cls: cls(0, processes)))
    solver = run.get("method", "bits")
    probes = patch("topiarist.pipelines.pruning.plan.probe_block", lambda *given: probed(base, solver, given))
    # Of the processor with one thread: what else runs on the machine does not count.
    clock = patch("topiarist.pipelines.pruning.plan.time.perf_counter", time.process_time)
    with alone, clock, probes:
        return (
            plan_quantize(base, QuantizeOptions(**settings))
            if "bits" in run
            else plan_prune(base, PruneOptions(**settings))
        )


last_probe: dict[tuple[Path, str], Probe] = {}


def probed(base: Path, solver: str, given: tuple[Any, ...]) -> Probe:
    """The probe of a model with a solver, made once: it has nothing of the number of processes or of refinement."""
    if (base, solver) not in last_probe:
        last_probe.clear()  # one holds Grams
        last_probe[base, solver] = probe_block(*given)
    return last_probe[base, solver]


def tokens_of(config: dict[str, Any], windows: int, window: int) -> torch.Tensor:
    return torch.randint(0, config["vocab_size"], (windows, window), generator=torch.Generator().manual_seed(0))


def rows(folder: Path, models: list[str], runs: list[str], windows: int, window: int) -> Iterator[str]:
    """A row of the table a model and run, as soon as it is known."""
    yield "| model | run | GB a process, 1 and 8 | disk, GB | one core | 8 cores |"
    yield "|---|---|---|---|---|---|"
    for name in models:
        blocks, config = MODELS[name]
        base = folder / name
        one_block = make_checkpoint(base, config, 1)
        ends = sum(path.stat().st_size for path in base.glob("model-[eh]*.safetensors"))
        for what in runs:
            run = RUNS[what]
            found = [plan(run, base, tokens_of(config, windows, window), count) for count in (1, 8)]
            disk = bytes_to_write(ends + blocks * (one_block - ends))
            if "bits" in run:  # of what the plan says of a block and the ends
                disk = round(disk * found[0].disk_bytes / bytes_to_write(one_block))
            memory = " and ".join(f"{one.peak_memory_bytes / 1e9:.1f}" for one in found)
            times = " | ".join(duration(blocks * (one.forward_seconds + one.solver_seconds)) for one in found)
            yield f"| {name} | {what} | {memory} | {disk / 1e9:.0f} | {times} |"
        shutil.rmtree(base)


RUN = """
import json, sys, torch, topiarist as tp
folder, out, run, vocabulary, windows, window = sys.argv[1:]
torch.set_num_threads(1)
tokens = torch.randint(0, int(vocabulary), (int(windows), int(window)), generator=torch.Generator().manual_seed(0))
print(json.dumps(tp.prune(folder, out, calibration=tokens, batch_size=1, **json.loads(run)).run))
"""


def verify(folder: Path, what: str, blocks: int, windows: int, window: int) -> None:
    """Plan a run over so many blocks of Llama-3.2-1B's shape, run it, and print both."""
    config, run = MODELS["Llama-3.2-1B"][1], RUNS[what]
    base = folder / f"{blocks}-blocks"
    if not (base / "config.json").exists():
        make_checkpoint(base, config, blocks)
    said = plan(run, base, tokens_of(config, windows, window), 1)
    print("planned:", dict(said.lines()), flush=True)
    shutil.rmtree(folder / "pruned", ignore_errors=True)
    words = [str(base), str(folder / "pruned"), json.dumps(run), str(config["vocab_size"]), str(windows), str(window)]
    done = subprocess.run([sys.executable, "-c", RUN, *words], stdout=subprocess.PIPE, text=True, check=True)
    took = json.loads(done.stdout.splitlines()[-1])
    print("took:", took)
    planned = said.forward_seconds + said.solver_seconds
    print(f"time / planned {took['seconds'] / planned:.2f}")
    print(f"memory / planned {took['peak_memory_bytes'] / said.peak_memory_bytes:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for command, windows, window in (("table", 128, 2048), ("verify", 32, 512)):
        one = commands.add_parser(command)
        one.add_argument("--folder", type=Path, required=True)
        one.add_argument("--windows", type=int, default=windows)
        one.add_argument("--window", type=int, default=window)
        if command == "verify":
            one.add_argument("--blocks", type=int, default=16, help="16 are the whole of it, 1.2B weights")
        if command == "table":
            one.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
            one.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS))
        else:
            one.add_argument(
                "--run", choices=[name for name in RUNS if "bits" not in RUNS[name]], default="prune, sparsegpt"
            )
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.command == "verify":
        verify(options.folder, options.run, options.blocks, options.windows, options.window)
        return
    for row in rows(options.folder, options.models, options.runs, options.windows, options.window):
        print(row, flush=True)


if __name__ == "__main__":
    main()
