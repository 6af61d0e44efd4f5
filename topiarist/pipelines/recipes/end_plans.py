"""What the stages that end a recipe will need, from a short probe of the model that it starts from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from topiarist.core.meter import duration, resident_bytes
from topiarist.core.patterns import NM
from topiarist.models.opened import open_model
from topiarist.pipelines.common.probe import timed, window_seconds
from topiarist.pipelines.recipes.ends import EvalOptions, PackOptions, check_eval
from topiarist.runtime.entries import store
from topiarist.runtime.packed import SHARD_BYTES, rounded
from topiarist.runtime.skeleton import Roles, roles

LOGITS = 2
"""Copies of a batch's logits that are in memory at once."""


def plan_eval(model: str, options: EvalOptions, _: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Draw the windows, take one through the first block, and extrapolate to the result and to its dense model."""
    lines: list[tuple[str, str]] = []
    source = open_model(model, device=options.device, trust_remote_code=options.trust_remote_code)
    found = [windows.tokens for windows in check_eval(source, options)]
    if found:
        num = sum(map(len, found))
        logits = LOGITS * source.dtype.itemsize * source.vocabulary * found[0].shape[1] * options.batch_size
        seconds = 2 * num * window_seconds(source, found[0][:1])
        lines = [
            ("windows x models", f"{num:,} x 2"),
            ("peak memory, about", f"{(resident_bytes() + source.nbytes + logits) / 1e9:.2f} GB"),
            ("forward passes, about", duration(seconds)),
        ]
    if options.tasks:
        lines.append(("zero-shot tasks", "no estimate: how long their items are is known only as they are read"))
    return lines


def plan_pack(model: str, options: PackOptions, _: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Pack the first block with two of every four weights zero, and extrapolate by its share of the bytes."""
    source = open_model(model, device="cpu")
    known = roles(source.config.to_dict()) if options.values or options.head else Roles()
    source.load(0)
    block = source.as_folder().block_on_disk(0)
    source.release(0)
    pattern = NM(2, 4)
    for name, tensor in block.items():
        if tensor.ndim == 2 and tensor.shape[1] % pattern.of == 0:
            block[name] = tensor * pattern.mask(tensor.float().abs())
    sizes: list[int] = []

    def pack() -> None:
        contents = {
            name: rounded(name, tensor, known, options.values, options.group, options.head)
            for name, tensor in block.items()
        }
        stored = [store(name, content)[0] for name, content in contents.items()]
        sizes.append(sum(part.nbytes for parts in stored for part in parts.values()))

    seconds, dense = timed(pack), sum(tensor.nbytes for tensor in block.values())
    blocks = len(source.block_names)
    packed = source.nbytes + blocks * (sizes[-1] - dense)
    return [
        ("size at 2:4, about", f"{packed / 1e9:.2f} GB"),
        ("peak memory, about", f"{(resident_bytes() + 2 * min(packed, SHARD_BYTES)) / 1e9:.2f} GB"),
        ("disk beside OUT, about", f"{packed / 1e9:.2f} GB"),
        ("packing, about", duration(seconds * source.nbytes / dense)),
    ]
