"""A target of milliseconds a token: the number of parameters that meets it on this machine, found by trying splits."""

from __future__ import annotations

import json
import math
import statistics
from typing import Any

import torch

from topiarist.core.errors import PatternError
from topiarist.pipelines.shrinking.cuts import Cut
from topiarist.pipelines.shrinking.splits import Splits
from topiarist.runtime.bench import PROMPT, ROUNDS, generation_seconds

TOKENS = 16
"""Decoded in a measurement."""
TRIES = 4
"""Numbers of parameters that are tried."""
NEAR, SHY = 0.9, 0.95
"""Share of the target that is near enough; how far below it the next number of parameters aims when none met it."""
MOST = 0.98
"""Share of the dense parameters that is tried at most."""


@torch.inference_mode()
def token_milliseconds(model: Any) -> float:
    """Milliseconds a decoded token of one sequence takes in transformers' own loop: the median of three measurements."""
    ids = torch.randint(model.config.vocab_size, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    taken = [generation_seconds(model, ids.to(model.device), TOKENS)["decode"] for _ in range(ROUNDS)]
    return 1000 * statistics.median(taken) / TOKENS


def best_within(search: Any, target: float) -> tuple[list[Cut], Splits]:
    """(what to cut, the splits it is among) so that a token takes at most `target` milliseconds, at the lowest loss tried.

    search: a SplitSearch that was told the target.
    A token takes about as long as its parameters are many, which says how many to begin with; what the splits then take
    says how many to try next. Measured times go into saved states, so a resumed search goes on as it began; another
    run may measure others. Raises PatternError if the model is fast enough, or no split is.
    """
    dense = _of_dense(search)
    if dense <= target:
        raise PatternError(
            f"a token takes {dense:.2f} ms here, which meets the target of {target:g} ms already: lower it"
        )
    best: tuple[list[Cut], Splits] | None = None
    whole, lowest = search.splits.dense, math.inf
    parameters = whole * target / dense
    for _ in range(TRIES):
        try:
            search.splits = search.splits.of(int(min(parameters, MOST * whole)))
        except PatternError as error:
            if not search.tried:
                raise PatternError(
                    f"no split takes {target:g} ms a token here, where the dense model takes {dense:.2f}: raise the target, "
                    "or add units"
                ) from error
            break
        before = len(search.tried)
        cuts, loss = search.best()
        if loss < lowest:
            best, lowest = (cuts, search.splits), loss
        rows = search.tried[before:]
        met = [row for row in rows if row["milliseconds"] <= target]
        if not met:
            parameters *= SHY * target / min(row["milliseconds"] for row in rows)
            continue
        chosen = min(met, key=lambda row: row["loss"])
        if chosen["milliseconds"] >= NEAR * target or parameters >= MOST * whole:
            break
        parameters *= target / chosen["milliseconds"]
    if best is None:
        fastest = min(row["milliseconds"] for row in search.tried)
        raise PatternError(
            f"no split takes {target:g} ms a token here, the fastest took {fastest:.2f}: raise the target, or add units"
        )
    return best


def _of_dense(search: Any) -> float:
    state = search.run.state("split-latency")
    if (found := state.load()) is not None:
        return json.loads(found[1]["milliseconds"])
    search.run.progress("measuring the dense model", 0, 1)
    taken = token_milliseconds(search.run.source.model)
    state.save({}, {"milliseconds": json.dumps(taken)})
    return taken
