"""The search for a split over the axes: each is cut, and its loss on held-out windows decides.

One axis after the other, the best of the earlier ones held; channels fill up to the target. Minitron (arXiv 2407.14679,
section 3.2) tries every combination and trains each; here scores are those of the dense model, taken once.
"""

from __future__ import annotations

import json
import math
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from topiarist.core.losses import next_token_losses
from topiarist.pipelines.shrinking.cuts import Cut, scorer_of
from topiarist.pipelines.shrinking.distill import Distill, distill
from topiarist.pipelines.shrinking.latency import token_milliseconds
from topiarist.pipelines.shrinking.options import Search
from topiarist.pipelines.shrinking.splits import Split, Splits
from topiarist.structured import Scores, Task, choose, plan_layout, shrunk, units_of
from topiarist.structured.trial import split as split_windows
from topiarist.structured.units import HIDDEN


class SplitSearch:
    """One search. run: the model in memory, its text and where states go (a ShrinkRun).

    latency: milliseconds that a token may take; splits that take longer lose. None: no matter.
    """

    def __init__(
        self, run: Any, splits: Splits, settings: Search, round_to: int | None, latency: float | None = None
    ) -> None:
        self.run, self.splits, self.settings, self.round_to = run, splits, settings, round_to
        self.latency = latency
        self.tokens, self.held_out = split_windows(run.tokens, settings.held_out)
        self.tried: list[dict[str, Any]] = []
        self._scores: Scores = {}

    def best(self) -> tuple[list[Cut], float]:
        """(what to cut, its loss): the split of the lowest loss; of equal ones the first. Resumes.

        The loss is infinite if every split takes longer than it may. What was tried is in `tried`.
        """
        best = self.splits.start
        lowest, tried = self._loss(best), {tuple(best.values())}
        for kind, counts in self.splits.axes.items():
            candidates = [best | {kind: count} for count in counts]
            reaching = [c for c in candidates if tuple(c.values()) not in tried and self.splits.cuts(c) is not None]
            for candidate in _spread(reaching, self.settings.values - 1):
                tried.add(tuple(candidate.values()))
                if (loss := self._loss(candidate)) < lowest:
                    best, lowest = candidate, loss
        return self.splits.cuts(best) or [], lowest

    def _loss(self, split: Split) -> float:
        """The loss after the split, in nats; that of an earlier try if it got so far."""
        number, state = len(self.tried), self.run.state(f"split-{len(self.tried):03d}")
        self.run.progress("trying splits", number, number + 1)
        if (found := state.load()) is not None:
            row = json.loads(found[1]["row"])
        else:
            row = self._row(split, self.splits.cuts(split) or [])
            state.save({}, {"row": json.dumps(row)})
        self.tried.append(row)
        return row["loss"] if self.latency is None or row["milliseconds"] <= self.latency else math.inf

    def _row(self, split: Split, cuts: list[Cut]) -> dict[str, Any]:
        model = dense = self.run.source.model
        channels = self.splits.channels
        for cut in cuts:
            scores = {group.key: self._score(group.key) for group in cut.groups}
            kept = choose(cut.groups, scores, cut.keep, scope=cut.scope, round_to=self.round_to, counts=cut.counts)
            plan = plan_layout(model, cut.groups, kept, "uniform")
            channels = next((int(kept[g.key].sum()) for g in cut.groups if g.kind == "channels"), channels)
            model = shrunk(model, cut.groups, kept, plan)
        if self.settings.recover_steps:
            settings = Distill(steps=self.settings.recover_steps)
            distill(model, dense, settings, self.tokens, batch_size=self.run.batch_size, seed=self.run.seed)
        parameters = sum(p.numel() for p in model.parameters())
        loss = mean_loss(model, self.held_out, self.run.batch_size)
        told = {} if self.latency is None else {"milliseconds": token_milliseconds(model)}
        return {**split, "channels": channels, "parameters": parameters, **told, "loss": loss}

    def _score(self, key: str) -> Tensor:
        """The dense model's score of a group, all groups scored at once the first time."""
        if not self._scores:
            self._scores = self._all_scores()
        return self._scores[key]

    def _all_scores(self) -> Scores:
        state = self.run.state("split-scores")
        if (found := state.load()) is not None:
            return found[0]
        scores: Scores = {}
        kinds = self.splits.kinds
        for together in ([HIDDEN], [k for k in kinds if k not in (HIDDEN, "block")], ["block"]):
            if not (wanted := [kind for kind in together if kind in kinds]):
                continue
            task = Task(
                self.run.source.model, units_of(self.run.source.model, wanted), self.tokens, 1.0, "per_layer",
                round_to=self.round_to, batch_size=self.run.batch_size, seed=self.run.seed, progress=self.run.progress,
            )  # fmt: skip
            scores |= scorer_of(self.run.method, wanted[0]).scores(task)
        state.save({key: score.contiguous() for key, score in scores.items()}, {})
        return scores


def _spread(splits: list[Split], number: int) -> list[Split]:
    """So many of the splits, evenly spread, the first and the last among them."""
    if len(splits) <= number:
        return splits
    picks = torch.linspace(0, len(splits) - 1, number).round().int().tolist()
    return [splits[i] for i in dict.fromkeys(picks)]


@torch.inference_mode()
def mean_loss(model: Any, tokens: Int[Tensor, "num window"], batch_size: int) -> float:
    """Mean next-token loss in nats."""
    batches = (batch.to(model.device) for batch in tokens.split(batch_size))
    losses = [next_token_losses(model(input_ids=b, use_cache=False).logits, b).mean(1) for b in batches]
    return float(torch.cat(losses).double().mean())
