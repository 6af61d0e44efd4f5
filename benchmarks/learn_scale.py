"""Memory and time of learning masks from 0.5B to 70B weights, from bytes and seconds measured on this machine.

    python -m benchmarks.learn_scale [--models qwen2.5-0.5b ...] [--write]

Bytes a weight are counted on real layers and optimisers of each mode. Seconds are measured on each model's own matrix
shapes (at most 1024 rows of each, 512 tokens): three products, the mask drawn twice, the backward pass with Adam. The
rest of a step (attention, norms, the loss) is the share that it has in a whole measured step of the demo model. A model
takes some seconds; finished ones are kept in benchmarks/results/scale.jsonl. `--write` puts the tables beside it.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from topiarist.core.patterns import NM
from topiarist.masklearn import Annealing, MaskAdamW, MaskedLinear, relaxation_for, resident_bytes, set_draws
from topiarist.pipelines.learning.files import STATE_BYTES

CELLS, PAGE = Path("benchmarks/results/scale.jsonl"), Path("benchmarks/results/scale.md")
TOKENS, ROWS = 512, 1024
DEMO_STEP = 15.5
"""CPU seconds of a step of 2,048 tokens of the demo model, sequences of 512: the median of a run of `quick`."""


@dataclass(frozen=True)
class Shape:
    """A Llama-like model: weights of one block and of the whole."""

    hidden: int
    ffn: int
    kv: int
    """Width of keys and values."""
    blocks: int
    vocab: int
    tied: bool = False

    def matrices(self) -> list[tuple[int, int]]:
        """(out, in) of a block's linears."""
        h, f, kv = self.hidden, self.ffn, self.kv
        return [(h, h), (kv, h), (kv, h), (h, h), (f, h), (f, h), (h, f)]

    @property
    def masked(self) -> int:
        return self.blocks * sum(out * wide for out, wide in self.matrices())

    @property
    def embeddings(self) -> int:
        return self.vocab * self.hidden * (1 if self.tied else 2)


MODELS = {
    "demo (135M)": Shape(576, 1536, 192, 30, 49152, tied=True),
    "qwen2.5-0.5b": Shape(896, 4864, 128, 24, 151936, tied=True),
    "qwen2.5-1.5b": Shape(1536, 8960, 256, 28, 151936, tied=True),
    "qwen2.5-3b": Shape(2048, 11008, 256, 36, 151936, tied=True),
    "llama-2-7b": Shape(4096, 11008, 4096, 32, 32000),
    "llama-2-13b": Shape(5120, 13824, 5120, 40, 32000),
    "llama-2-70b": Shape(8192, 28672, 1024, 80, 32000),
}


def seconds(what: Callable[[], object]) -> float:
    """The least CPU time of three calls."""
    times = []
    for _ in range(3):
        start = time.process_time()
        what()
        times.append(time.process_time() - start)
    return min(times)


def measure_matrix(out: int, wide: int) -> dict[str, float]:
    """Seconds of one layer: products for TOKENS tokens, and the mask's arithmetic; at most ROWS rows, scaled up."""
    rows = min(out, ROWS)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, wide, generator=generator).bfloat16()
    x = torch.randn(TOKENS, wide, generator=generator).bfloat16()
    up = torch.randn(TOKENS, rows, generator=generator).bfloat16()
    pattern = NM(2, 4)
    layer = MaskedLinear(weight, None, relaxation_for(pattern), pattern.mask(weight.float().abs()), index=0).train()
    optimizer = MaskAdamW([layer], lr=1e-3)
    set_draws([layer], Annealing(), 10, 100)
    assert layer.draw is not None and layer.sink is not None
    from topiarist.masklearn.kernels import effective

    draw, sink, G = layer.draw, layer.sink, up.T @ x

    def step() -> None:
        sink(G, draw)
        optimizer.step()

    products = seconds(lambda: x @ weight.T) + seconds(lambda: up @ weight) + seconds(lambda: up.T @ x)
    masks = 2 * seconds(lambda: effective(layer.relaxation, weight, layer.logits, draw)) + seconds(step)
    return {"products": products * out / rows, "masks": masks * out / rows}


def bytes_per_weight() -> dict[str, float]:
    """Resident bytes of a masked bf16 weight after a step, counted on a layer."""
    found = {}
    for mode, dtype, share in (("fp32", torch.float32, "logit"), ("lean", torch.bfloat16, "group")):
        pattern, weight = NM(2, 4), torch.randn(256, 512).bfloat16()
        mask = pattern.mask(weight.float().abs())
        layer = MaskedLinear(weight, None, relaxation_for(pattern), mask, index=0, dtype=dtype).train()
        optimizer = MaskAdamW([layer], lr=1e-3, second_moment=share)
        set_draws([layer], Annealing(), 1, 10)
        layer(torch.randn(8, 512).bfloat16()).float().sum().backward()
        optimizer.step()
        found[mode] = round(resident_bytes([layer], optimizer), 2)
    return found


def run_cell(name: str) -> dict[str, Any]:
    """One model's seconds for a token's products and for a step's masks, one core."""
    shape = MODELS[name]
    unique = {size: measure_matrix(*size) for size in set(shape.matrices())}
    total = {key: shape.blocks * sum(unique[size][key] for size in shape.matrices()) for key in ("products", "masks")}
    head = measure_matrix(shape.vocab // 16, shape.hidden)["products"] * 16 * 2 / 3  # no gradient of the head itself
    return {
        "model": name,
        "token_seconds": (total["products"] + head) / TOKENS,
        "mask_seconds": total["masks"],
        "bytes": bytes_per_weight(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} thread(s), torch {torch.__version__}",
        "date": time.strftime("%Y-%m-%d"),
        "shape": asdict(shape),
    }


def page(cells: dict[str, dict[str, Any]]) -> str:
    """benchmarks/results/scale.md."""
    demo = cells["demo (135M)"]
    rest = DEMO_STEP / (2048 * demo["token_seconds"] + demo["mask_seconds"])
    memory = [
        "| model | masked weights | one process, fp32 | lean | each of 8 shards, fp32 | lean | inputs kept | state on disk |",
        "|---|---|---|---|---|---|---|---|",
    ]
    times = [
        "| model | s a step of 2,048 tokens | of these masks | `quick`, core hours | `standard` |",
        "|---|---|---|---|---|",
    ]
    for name, cell in cells.items():
        shape = MODELS[name]
        weights, other = shape.masked, 2 * shape.embeddings
        one = {mode: (per * weights + other) / 1e9 for mode, per in cell["bytes"].items()}
        # Shards hold W * M beside W: two bytes more.
        eight = {mode: ((per + 2) * weights + other) / 8e9 for mode, per in cell["bytes"].items()}
        kept = shape.blocks * 2048 * shape.hidden * 2 / 1e9
        memory.append(
            f"| {name} | {weights / 1e9:.2f} B | {one['fp32']:.1f} GB | {one['lean']:.1f} | {eight['fp32']:.1f} | "
            f"{eight['lean']:.1f} | {kept:.2f} GB | {STATE_BYTES * weights / 1e9:.1f} GB |"
        )

        def step(tokens: int, cell: dict[str, Any] = cell) -> float:
            return rest * (tokens * cell["token_seconds"] + cell["mask_seconds"])

        times.append(
            f"| {name} | {step(2048):.0f} | {rest * cell['mask_seconds']:.1f} | {80 * step(2048) / 3600:.1f} | "
            f"{220 * step(4096) / 3600:.1f} |"
        )
    return TEXT.format(
        memory="\n".join(memory), times="\n".join(times), rest=rest, date=demo["date"], machine=demo["machine"],
        step=DEMO_STEP, tokens=TOKENS, rows=ROWS, fp32=demo["bytes"]["fp32"], lean=demo["bytes"]["lean"],
        state=STATE_BYTES,
    )  # fmt: skip


TEXT = """# Learned masks from 0.5B to 70B: memory and time

Made by `python -m benchmarks.learn_scale --write` on {date}; {machine}. For a model at hand, `topiarist learn ... --plan`
measures instead of extrapolating. 2:4, bf16 weights.

## Memory
Counted on real layers and optimisers: {fp32} bytes a masked weight (fp32 logits, bf16 moments, the weight itself), {lean} with
`--lean`. Embeddings and head are frozen: 2 bytes. Shards (FSDP2 under `torchrun`) hold W * M beside W, 2 bytes a weight more,
divided by the number of processes. "Inputs kept" is what activation checkpointing keeps of 2,048 tokens. Not in the table: one
block's activations, its gathered weights, and the logits of the loss (14 bytes x vocabulary x tokens of a forward). Every
process of a sharded run first holds the whole model on the host, 2 bytes a weight.

{memory}

## Time on one CPU core
Products of {tokens} tokens and mask arithmetic were measured on each model's own matrix shapes (at most {rows} rows,
scaled to all), with other work on the machine. The rest of a step (attention, norms, loss) is a factor of {rest:.2f}: a whole
step of the demo model, four sequences of 512, took {step} s. From 7B on this says only that a CPU is the wrong machine.

{times}

## Time on GPUs
What a step needs is countable: 6 flops a masked weight and token (three products; the weights
are frozen, but the mask's gradient needs d loss / d(W * M)), 4 for the head, a third more of the first with activation
checkpointing; and two draws of the mask and one backward pass with Adam a step: 10 bytes of memory traffic a weight a draw
and 28 for the backward pass. Divide by what your GPU sustains.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS), metavar="MODEL")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines = CELLS.read_text().splitlines() if CELLS.is_file() else []
    cells = {cell["model"]: cell for cell in map(json.loads, lines)}
    for name in options.models:
        if name not in cells:
            cells[name] = run_cell(name)
            with CELLS.open("a") as file:
                file.write(json.dumps(cells[name]) + "\n")
        cell = cells[name]
        print(
            f"{name}: {cell['token_seconds'] * 1e3:.2f} ms a token, {cell['mask_seconds']:.2f} s masks a step",
            flush=True,
        )
    if options.write:
        PAGE.write_text(page({name: cells[name] for name in MODELS if name in cells}))


if __name__ == "__main__":
    main()
