"""Products of packed weights with many tokens at once, against torch's dense bf16 linear, in turns in one process.

    python -m benchmarks.prefill                    2048 x 2048, 8 to 512 tokens, one thread
    python -m benchmarks.prefill --shape 8192 2048 --threads 2

Weights are random; what a product takes does not depend on them. Layers choose between their two ways (weights expanded in
registers, or a panel at a time into cache) by the limit that `runtime.accelerate` would measure, so here the faster counts.
Of one thread the processor's time counts, of several the time that passed.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from topiarist.core.patterns import parse_pattern
from topiarist.runtime.bench import machine
from topiarist.runtime.build import LEVELS, load_kernels
from topiarist.runtime.linear import PackedLinear, QuantisedLinear

ZEROS = ("2:4", "0.7")
GROUP, ROUNDS = 64, 15


def packed_layers(shape: tuple[int, int]) -> dict[str, PackedLinear]:
    found = {}
    for zeros in ZEROS:
        gone = ~parse_pattern(zeros).mask(torch.rand(shape))
        linear = nn.Linear(shape[1], shape[0], bias=False).bfloat16().requires_grad_(False)
        linear.weight.masked_fill_(gone, 0)
        found[f"{zeros}, bf16"] = PackedLinear(linear)
        for bits in (8, 4):
            codes = torch.randint(-7, 8, shape, dtype=torch.int8).masked_fill_(gone, 0)
            scales = torch.ones(shape[0], shape[1] // GROUP).bfloat16()
            found[f"{zeros}, int{bits}"] = QuantisedLinear(codes, scales, bits)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=2, default=[2048, 2048], metavar=("OUT", "IN"))
    parser.add_argument("--tokens", type=int, nargs="+", default=[8, 16, 64, 128, 256, 512])
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    clock = time.process_time if args.threads == 1 else time.perf_counter
    shape = tuple(args.shape)
    dense = nn.Linear(shape[1], shape[0], bias=False).bfloat16().requires_grad_(False)
    layers = packed_layers(shape)
    print(f"## {shape[0]} x {shape[1]}: {machine()}, kernels {LEVELS[load_kernels().level]}\n")
    print(f"| tokens | torch, dense, ms | {' | '.join(layers)} |\n|---|---|{'---|' * len(layers)}")
    for tokens in args.tokens:
        x = torch.randn(tokens, shape[1]).bfloat16()
        ways: dict[str, list[Callable[[Tensor], Tensor]]] = {"dense": [dense]}
        ways |= {name: [layer.multiply, layer.multiply_by_panels] for name, layer in layers.items()}
        times: dict[tuple[str, int], list[float]] = {}
        with torch.inference_mode():
            for _ in range(ROUNDS):
                for name, calls in ways.items():
                    for i, call in enumerate(calls):
                        begin = clock()
                        call(x)
                        times.setdefault((name, i), []).append(1e3 * (clock() - begin))
        middle = {
            name: min(statistics.median(times[name, i]) for i in range(len(calls))) for name, calls in ways.items()
        }
        gains = [f"{middle['dense'] / middle[name]:.2f}" for name in layers]
        print(f"| {tokens} | {middle['dense']:.2f} | {' | '.join(gains)} |", flush=True)


if __name__ == "__main__":
    main()
