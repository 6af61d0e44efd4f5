"""What cutting units will need, from a short probe of one block: passes are what scoring and the refit are made of."""

from __future__ import annotations

from pathlib import Path

from jaxtyping import Int
from torch import Tensor

from topiarist.core.meter import duration, resident_bytes
from topiarist.core.registry import name_of
from topiarist.models.opened import OpenedModel, at_rest
from topiarist.pipelines.common.probe import timed, window_seconds
from topiarist.pipelines.common.setup import open_for, windows_of
from topiarist.pipelines.common.stream import BlockStream
from topiarist.pipelines.shrinking.decide import decide
from topiarist.pipelines.shrinking.distill import Distill, bytes_due
from topiarist.pipelines.shrinking.options import Search, ShrinkOptions
from topiarist.structured import METHODS
from topiarist.structured.metrics import Flap
from topiarist.structured.taylor import Taylor

PASSES = {
    "taylor": 3,
    "activation": 1,
    "flap": 1,
    "wanda-sp": 1,
    "block-influence": 1,
    "reap": 1,
    "magnitude": 0,
    "random": 0,
}
"""Forwards that a calibration window costs a method; a backward pass counts for two."""
STEP = 4
"""Forwards that a sequence of a recovery costs: the teacher's, the student's, and the student's backward pass."""


def plan_shrink(model: str | Path, options: ShrinkOptions) -> list[tuple[str, str]]:
    """Take a window through the first block, and its Grams, and extrapolate. Writes nothing.

    Raises what the run itself would raise of the model's shapes and of the text.
    """
    source = open_for(options, model)
    decided = decide(source, options, [])
    name = name_of(METHODS, options.chosen_method)
    lines = [("peak memory, about", f"{(resident_bytes() + 2 * source.nbytes) / 1e9:.2f} GB")]
    lines.append(("disk, at most", f"{bytes_due(source, options.recover) / 1e9:.2f} GB"))
    if options.data is None:
        return [*lines, ("passes", "none: no text is looked at")]
    tokens = windows_of(options, source).tokens
    options.check_windows(tokens)
    num, forward = len(tokens), window_seconds(source, tokens[:1])
    passes = PASSES.get(name)
    if passes is None:
        lines.append((f"scores, {name}", "no estimate: how many forwards it takes depends on the units"))
    else:
        method, looked = options.chosen_method, tokens
        if isinstance(method, Flap) and not decided.refit:
            passes += 1  # for the biases of what was chosen
        if isinstance(method, Taylor):  # whose windows are its own, and may be fewer tokens
            looked = method.windows_of(tokens)
        lines.append((f"scores, {name}, about", duration(passes * looked.numel() / tokens.shape[1] * forward)))
    if decided.refit:
        lines.append(("refit, about", duration(num * _refit_seconds(source, tokens[:1]))))
    if options.searches:
        settings = options.search or Search()
        recovery = settings.recover_steps * Distill().sequences * STEP
        lines.append(("trying a split, at most about", duration((min(settings.held_out, num) + recovery) * forward)))
    if options.target_latency is not None:
        lines.append(("latency", "measured in the run alone, which refuses a target that no split meets"))
    if (asked := options.recover) is not None:
        lines.append(("recovery, about", duration(asked.steps * asked.sequences * STEP * forward)))
    return lines


def _refit_seconds(source: OpenedModel, window: Int[Tensor, "1 window"]) -> float:
    """Of a window: its Grams in every block, and the block run once more behind them."""
    with at_rest(source.model):
        stream = BlockStream.of(source, window, batch_size=1)
        block, matrices = source.load(0), source.matrices(0)
        consumers = [m for m in matrices if m.shape[0] == source.text_config.hidden_size]
        seconds = timed(lambda: (stream.grams(0, block, consumers), stream.run_batch(0, block, 0)))
        stream.close()
        source.release(0)
    return len(source.block_names) * seconds
