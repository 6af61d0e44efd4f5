"""What sparsity buys: packed against dense linears by shape and batch, then decoding a whole model.

    python -m benchmarks.runtime                          CPU, 4096 x 4096 and 4096 x 14336 and a small model's shapes
    python -m benchmarks.runtime --model DIR              also tokens/s of that model, pruned in memory by magnitude
    python -m benchmarks.runtime --device cuda            2:4 on the GPU, shapes of Llama-3-8B, batch 1 to 4096

Every time is a median over rounds in which the candidates take turns, so that noise of the machine falls on all alike;
the ratios are what to read. On the CPU each candidate rotates over copies of its weights of at least --rotate MB, for
a weight that stays in L3 would hide that decoding is bound by memory. With one thread, processor time is measured.

The CPU table has three ratios. "x torch" is against torch's own dense linear, which is what a user gains; it mixes the
gain of reading fewer bytes with that of another kernel. "x no zeros" is against our kernel on a weight without zeros,
which is what sparsity alone gains. "x bytes" is the limit from bytes, dense over packed.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import functools
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from topiarist.core.patterns import Pattern, parse_pattern
from topiarist.runtime import cpu, cuda
from topiarist.runtime.bench import bench_model, machine
from topiarist.runtime.build import LEVELS, load_kernels
from topiarist.runtime.linear import PackedLinear

LARGE = [(4096, 4096), (14336, 4096), (4096, 14336)]
SMALL = [(576, 576), (1536, 576), (576, 1536)]
LLAMA_3_8B = {"q, o": (4096, 4096), "k, v": (1024, 4096), "gate, up": (14336, 4096), "down": (4096, 14336)}
IN_A_BLOCK = {"q, o": 2, "k, v": 2, "gate, up": 2, "down": 1}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
CPU_HEAD = ["out x in", "dtype", "zeros", "batch", "torch ms", "no zeros ms", "packed ms", "x torch", "x no zeros",
            "x bytes", "GB/s"]  # fmt: skip


def main() -> None:
    args = parse()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    now = datetime.datetime.now(datetime.UTC)
    sections = cuda_sections(args) if args.device == "cuda" else cpu_sections(args)
    where = machine("cuda") if args.device == "cuda" else f"{machine()}, kernels {LEVELS[load_kernels().level]}"
    load = f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
    text = f"## {now:%Y-%m-%d %H:%M} UTC, {where}, {load}\n\n" + "\n".join(sections)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with args.out.open("a") as file:
            file.write("\n" + text)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bf16"])
    parser.add_argument("--patterns", nargs="+", default=["2:4", "0.7"])
    parser.add_argument("--batches", nargs="+", type=int, help="default 1 4 (CPU), 1 16 256 4096 (CUDA)")
    parser.add_argument("--shapes", choices=["all", "large", "small", "none"], default="all")
    parser.add_argument("--rotate", type=int, default=96, help="MB of weights to rotate over; 0 lets caches help")
    parser.add_argument("--seconds", type=float, default=1.5, help="timing per row of the table")
    parser.add_argument("--model", type=Path, help="a checkpoint folder to decode with, pruned in memory")
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/runtime.md"))
    args = parser.parse_args()
    args.batches = args.batches or ([1, 4] if args.device == "cpu" else [1, 16, 256, 4096])
    return args


# ---------------------------------------------------------------------------------------------------------- CPU


def cpu_sections(args: argparse.Namespace) -> list[str]:
    shapes = {"all": LARGE + SMALL, "large": LARGE, "small": SMALL, "none": []}[args.shapes]
    held = f"weights rotate over {args.rotate} MB" if args.rotate else "the same weight every time: caches help"
    sections = []
    if shapes:
        sections.append(table(f"Linears, {held}", CPU_HEAD, cpu_rows(shapes, args)))
    if args.model:
        sections += [decode_section(args, pattern) for pattern in args.patterns]
    return sections


def cpu_rows(shapes: Sequence[tuple[int, int]], args: argparse.Namespace) -> Iterator[list[str]]:
    for shape, name, text in itertools.product(shapes, args.dtypes, args.patterns):
        linear, full = (pruned_linear(shape, parse_pattern(pattern), DTYPES[name]) for pattern in (text, "0"))
        dense_bytes, packed_bytes = linear.weight.nbytes, PackedLinear(linear).packed_bytes
        rivals = [
            copies(lambda linear=linear: copy.deepcopy(linear), dense_bytes, args.rotate),
            copies(lambda full=full: PackedLinear(full), dense_bytes, args.rotate),
            copies(lambda linear=linear: PackedLinear(linear), packed_bytes, args.rotate),
        ]
        for batch in args.batches:
            x = torch.randn(batch, shape[1]).to(DTYPES[name])
            torch_ms, full_ms, packed_ms = race_cpu(rivals, x, args.seconds)
            yield [
                f"{shape[0]} x {shape[1]}", name, text, str(batch),
                f"{torch_ms:.3g}", f"{full_ms:.3g}", f"{packed_ms:.3g}",
                f"{torch_ms / packed_ms:.2f}", f"{full_ms / packed_ms:.2f}", f"{dense_bytes / packed_bytes:.2f}",
                f"{packed_bytes / packed_ms / 1e6:.1f}",
            ]  # fmt: skip


def pruned_linear(shape: tuple[int, int], pattern: Pattern, dtype: torch.dtype) -> nn.Linear:
    """(out, in), no bias; masks from random scores, which no kernel here can tell from real ones."""
    linear = nn.Linear(shape[1], shape[0], bias=False).requires_grad_(False)
    linear.weight.masked_fill_(~pattern.mask(torch.rand(shape)), 0.0)
    return linear.to(dtype)


def copies(make: Callable[[], nn.Module], size: int, rotate: int) -> list[nn.Module]:
    """Equal modules of `size` bytes each, enough to fill `rotate` MB; one if that is 0."""
    return [make() for _ in range(max(1, -(-(rotate << 20) // size)))]


@torch.inference_mode()
def race_cpu(rivals: list[list[nn.Module]], x: Tensor, seconds: float) -> list[float]:
    """Median milliseconds of each rival; every call takes that rival's next copy."""
    rows = [
        [functools.partial(getattr(row[i % len(row)], "multiply", row[i % len(row)]), x) for row in rivals]
        for i in range(max(len(row) for row in rivals))
    ]
    return cpu.race(rows, seconds=seconds)


def decode_section(args: argparse.Namespace, pattern: str) -> str:
    """Prefill and decode of a whole model, its blocks' linears pruned by magnitude."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16)
    head = model.get_output_embeddings()
    with torch.no_grad():
        for module in model.modules():
            if type(module) is nn.Linear and module is not head:
                module.weight.masked_fill_(~parse_pattern(pattern).mask(module.weight.abs().float()), 0.0)
    report = bench_model(model, tokens=args.tokens, batches=args.batches)
    rows = (
        [speed.phase, str(speed.batch), f"{speed.dense:.1f}", f"{speed.sparse:.1f}", f"{speed.gain:.2f}"]
        for speed in report.speeds
    )
    title = f"{args.model.name}, bf16, {pattern}, {report.acceleration.num_packed} linears packed"
    note = f"\n{report.verdict} {report.dense_bytes / 1e6:.0f} MB dense, {report.sparse_bytes / 1e6:.0f} MB packed.\n"
    print(note)
    return table(title, ["phase", "batch", "dense tok/s", "packed tok/s", "gain"], rows) + note


# --------------------------------------------------------------------------------------------------------- CUDA


def cuda_sections(args: argparse.Namespace) -> list[str]:
    """2:4 by shape, then what a block of Llama-3-8B gains with its MLP alone and with all its linears in 2:4."""
    times: dict[tuple[str, int], tuple[float, float]] = {}

    def rows() -> Iterator[list[str]]:
        for (name, shape), batch in itertools.product(LLAMA_3_8B.items(), args.batches):
            times[name, batch] = race_cuda(shape, batch)
            dense_ms, sparse_ms = times[name, batch]
            yield [name, f"{shape[0]} x {shape[1]}", str(batch), f"{dense_ms:.4f}", f"{sparse_ms:.4f}",
                   f"{dense_ms / sparse_ms:.2f}"]  # fmt: skip

    def blocks() -> Iterator[list[str]]:
        for batch in args.batches:
            dense = sum(IN_A_BLOCK[name] * times[name, batch][0] for name in LLAMA_3_8B)
            mlp = sum(IN_A_BLOCK[name] * times[name, batch][name in ("gate, up", "down")] for name in LLAMA_3_8B)
            both = sum(IN_A_BLOCK[name] * times[name, batch][1] for name in LLAMA_3_8B)
            best = sum(IN_A_BLOCK[name] * min(times[name, batch]) for name in LLAMA_3_8B)
            yield [str(batch), *(f"{dense / other:.2f}" for other in (mlp, both, best))]

    head = ["layer", "out x in", "tokens", "dense ms", "2:4 ms", "gain"]
    return [
        table(f"Linears of Llama-3-8B in bf16, {cuda.backend()}", head, rows()),
        table("All linears of a block, gain", ["tokens", "MLP 2:4", "all 2:4", "chosen by shape"], blocks()),
    ]


@torch.inference_mode()
def race_cuda(shape: tuple[int, int], tokens: int) -> tuple[float, float]:
    linear = pruned_linear(shape, parse_pattern("2:4"), torch.bfloat16).cuda()
    sparse = cuda.SemiStructuredLinear(linear)
    x = torch.randn(tokens, shape[1], device="cuda").bfloat16()
    return cuda.race([functools.partial(linear, x), functools.partial(sparse, x)], x.device)


# ---------------------------------------------------------------------------------------------------------------


def table(title: str, head: list[str], rows: Iterable[list[str]]) -> str:
    """A Markdown table, each row printed as soon as it is measured."""
    lines = [f"### {title}\n", "| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    print("\n".join(lines), flush=True)
    for row in rows:
        lines.append("| " + " | ".join(row) + " |")
        print(lines[-1], flush=True)
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
