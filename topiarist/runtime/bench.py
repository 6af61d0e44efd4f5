"""What a pruned model gains on this machine: prefill and decode, dense against accelerated, in one process, in turns.

Both variants are the same model with the same weights; only its linears are exchanged between timings, so noise of the
machine falls on both alike and nothing else differs. Plain data comes out; the caller prints it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import nn

from topiarist.core.compiled import NoKernels
from topiarist.core.errors import CheckpointError, UnsupportedModel
from topiarist.core.grammar import OptionError
from topiarist.models.opened import ObjectModel, evaluated
from topiarist.runtime import cpu, cuda
from topiarist.runtime.cpu import MARGIN, Acceleration
from topiarist.runtime.decoder import Decoder
from topiarist.runtime.generate import cache_word
from topiarist.runtime.linear import PackedLinear, QuantisedEmbedding, QuantisedLinear
from topiarist.runtime.loading import load_model

ROUNDS = 3
PROMPT = 64
PHASES = ("prefill", "decode", "generate")
"""The prompt, tokens after it in transformers' loop, and the same in our own."""


@dataclass(frozen=True)
class Speed:
    """Median tokens per second of the whole batch, both variants doing the same work."""

    phase: str
    batch: int
    dense: float
    sparse: float

    @property
    def gain(self) -> float:
        """How many times as fast the sparse variant is."""
        return self.sparse / self.dense


@dataclass(frozen=True)
class BenchReport:
    """Speeds, what each layer ran as, and the weights' bytes in memory (all parameters, not only linears).

    tokens, prompt: how many were decoded, after how many; speeds of other numbers say nothing of each other.
    """

    speeds: tuple[Speed, ...]
    acceleration: Acceleration
    dense_bytes: int
    sparse_bytes: int
    machine: str
    tokens: int
    prompt: int

    @property
    def verdict(self) -> str:
        """One plain sentence. A gain within the noise is called none."""
        decode = [speed for speed in self.speeds if speed.phase == "decode"]
        gains = [speed for speed in decode if speed.gain > MARGIN]
        saved = 1 - self.sparse_bytes / self.dense_bytes
        memory = f"Weights take {saved:.0%} less memory." if saved > 0.01 else "Weights take no less memory."
        if not self.acceleration.num_packed:
            reasons = sorted({layer.reason for layer in self.acceleration.layers if layer.sparsity >= cpu.MIN_SPARSITY})
            return f"No gain on this machine: no layer runs sparse ({'; '.join(reasons)}). {memory}"
        if not gains:
            return f"No gain on this machine: decoding is as fast dense. {memory}"
        best = max(gains, key=lambda speed: speed.gain)
        lost = [f"{speed.phase} at batch {speed.batch}" for speed in self.speeds if speed.gain < 1 / MARGIN]
        slower = f" Slower: {', '.join(lost)}." if lost else ""
        return f"Decoding is up to {best.gain:.2f} x as fast (batch {best.batch}).{slower} {memory}"


def bench_folder(
    folder: Path | str,
    *,
    tokens: int = 32,
    batches: Sequence[int] = (1, 4, 8, 32),
    prompt: int = PROMPT,
    device: str = "cpu",
) -> BenchReport:
    """Load a pruned model folder, ordinary or packed, and measure it.

    Raises OptionError for numbers below 1, CalibrationError for more tokens than learned positions, CheckpointError if the
    folder cannot be read, or if the model in it has no sparse linear.
    """
    if not batches or min(tokens, prompt, *batches) < 1:
        raise OptionError(
            f"tokens is {tokens}, prompt {prompt}, batches {list(batches)}: nothing can be timed with less than 1 of each"
        )
    model = load_model(folder, device=device)
    loaded = ObjectModel(model)
    loaded.name = str(folder)
    asked = f"a prompt of {prompt} tokens with {tokens} more"
    loaded.check_length(prompt + tokens, asked, "a shorter --prompt or fewer --tokens")
    try:
        return bench_model(model, tokens=tokens, batches=batches, prompt=prompt)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from None


@torch.inference_mode()
def bench_model(
    model: Any, *, tokens: int = 32, batches: Sequence[int] = (1, 4, 8, 32), prompt: int = PROMPT
) -> BenchReport:
    """As `bench_folder`, for a causal LM in memory, which comes back as it was. Needs room for dense and packed weights."""
    linears = [
        (name, module) for name, module in model.named_modules() if isinstance(module, (nn.Linear, PackedLinear))
    ]
    original = dict(linears)
    dense = {name: module.to_linear() if isinstance(module, PackedLinear) else module for name, module in linears}
    _exchange(model, dense)
    # Embeddings of integers have no parameters; where they are tied, their table is the head, which is a linear.
    embeddings = (module for module in model.modules() if isinstance(module, QuantisedEmbedding))
    tables = [module.table for module in embeddings if module.table not in original.values()]
    dense_tables = sum(table.out_features * table.in_features * table.dtype.itemsize for table in tables)
    dense_bytes = sum(weight.nbytes for weight in model.parameters()) + dense_tables
    # Integers run packed as they are; floats that are packed already are judged anew, as those of a folder are.
    _exchange(model, {name: linear for name, linear in linears if isinstance(linear, QuantisedLinear)})
    if model.device.type == "cuda":
        acceleration = cuda.accelerate(model, tokens=[*batches, max(batches) * prompt])
    else:
        acceleration = cpu.accelerate(model)
    sparse = {layer.name: model.get_submodule(layer.name) for layer in acceleration.layers}
    speeds = []
    try:
        if all(layer.sparsity < cpu.MIN_SPARSITY and not layer.packed for layer in acceleration.layers):
            raise CheckpointError("no linear has zeros to skip, so there is nothing to measure; prune the model first")
        for batch in batches:
            times: dict[tuple[str, str], list[float]] = {}
            ids = torch.randint(model.config.vocab_size, (batch, prompt), generator=torch.Generator().manual_seed(0))
            for _ in range(ROUNDS):
                for variant, modules in (("dense", dense), ("sparse", sparse)):
                    _exchange(model, modules)
                    seconds = generation_seconds(model, ids.to(model.device), tokens)
                    for phase, taken in seconds.items():
                        times.setdefault((phase, variant), []).append(taken)
            for phase in PHASES:
                if (phase, "dense") in times:
                    count = batch * (prompt if phase == "prefill" else tokens)
                    rates = (count / statistics.median(times[phase, variant]) for variant in ("dense", "sparse"))
                    speeds.append(Speed(phase, batch, *rates))
    finally:
        _exchange(model, original)
    packed_tables = sum(table.packed_bytes for table in tables)
    sparse_bytes = dense_bytes - acceleration.bytes_before + acceleration.bytes_after - dense_tables + packed_tables
    return BenchReport(
        tuple(speeds), acceleration, dense_bytes, sparse_bytes, machine(model.device.type), tokens=tokens, prompt=prompt
    )


def machine(device: str = "cpu") -> str:
    """Processor, threads and torch, for the head of every table."""
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    return f"{cpu.processor()}, {torch.get_num_threads()} thread(s), torch {torch.__version__}"


def generation_seconds(model: Any, ids: Int[torch.Tensor, "batch tokens"], tokens: int) -> dict[str, float]:
    """Seconds of the prompt, and of `tokens` greedy steps after it, by phase; our own loop only where it takes the model."""
    word = cache_word(model)
    with evaluated(model):
        start = _now(model)
        out = model(ids, use_cache=True)
        filled = _now(model)
        for _ in range(tokens):
            out = model(out.logits[:, -1:].argmax(-1), **{word: getattr(out, word)}, use_cache=True)
        seconds = {"prefill": filled - start, "decode": _now(model) - filled}
    try:
        decoder = Decoder(model, batch=len(ids), max_tokens=ids.shape[1] + tokens)
    except (UnsupportedModel, NoKernels):
        return seconds
    start = _now(model)
    for position in range(ids.shape[1], ids.shape[1] + tokens):  # over a cache of zeros, which takes as long
        decoder.step(ids[:, 0], position)
    return seconds | {"generate": _now(model) - start}


def _now(model: Any) -> float:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
        return time.perf_counter()
    return cpu.clock()


def _exchange(model: nn.Module, linears: Mapping[str, nn.Module]) -> None:
    for name, module in linears.items():
        model.set_submodule(name, module)
