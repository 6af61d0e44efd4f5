"""Policy gradient: which units to keep, learned from the loss of masked forwards alone. The numerics are in policy.py."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar

import torch
from jaxtyping import Int
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor

from topiarist.core.errors import NumericalError, TopiaristError
from topiarist.core.options import options
from topiarist.structured import policy
from topiarist.structured.gates import Masks, gates
from topiarist.structured.methods import HEAD_WEIGHT, Magnitude, Method, Scores, Task
from topiarist.structured.metrics import BlockInfluence, Flap, WandaSP
from topiarist.structured.occlusion import Occlusion
from topiarist.structured.policy_variables import Variables
from topiarist.structured.taylor import Taylor
from topiarist.structured.trial import chosen, gated_loss, short_windows, split
from topiarist.structured.units import Kept

STARTS: dict[str, type[Method] | None] = {
    "occlusion": Occlusion,
    "flap": Flap,
    "wanda-sp": WandaSP,
    "taylor": Taylor,
    "constant": None,
}
"""All but taylor by forward passes alone."""
MEMORY = 0.9
"""Of the running size of the advantages."""


@options
class PolicyGradient(Method):
    """Minimises E[loss of the masked model] over the probability of every unit to stay, under the budget, by REINFORCE.

    Forward passes only: the memory of inference, no gradient of the model. Choose it when the loss itself should decide
    and the model is too large to differentiate. The choice with the lowest loss on held-out calibration windows is
    returned; the start is one of the candidates, so that a short search does not lose to it there.
    Gao et al., ACL 2025, arXiv 2406.10576. Cost: steps * samples * windows * window tokens of forward
    pass, and those of the start.

    Differs from the authors' code in: 1. a leave-one-out baseline; `baseline="ema"` is theirs. 2. `normalise`: steps do
    not depend on the size of the loss. 3. Channels are tied in groups by the rank of their metric. 4. The start is a
    logistic curve over ranks, not over the metric: units far from the cut begin almost decided. 5. Exact
    top-k, where they compare with a threshold. 6. The best choice on held-out calibration text, not the last.
    `PAPER` has their settings, but for the start.
    """

    scope: ClassVar[str] = "parameters"
    steps: PositiveInt = 120
    samples: PositiveInt = 4
    """Masks a step, all on the same windows."""
    windows: PositiveInt = 1
    """Windows a step."""
    window: Annotated[int, Field(ge=2)] = 512
    """Their tokens: short ones do not show what long contexts need."""
    baseline: str = "loo"
    horizon: PositiveFloat = 5.0
    """T of the moving average."""
    normalise: bool = True
    """Divide by the running size of loss - baseline."""
    learning_rate: PositiveFloat = 0.02
    """The largest step of a probability; falls as a cosine to 0."""
    init: str = "occlusion"
    sharpness: NonNegativeFloat = 12.0
    """Of the logistic start: 0 knows nothing but the budget; the larger, the more is decided."""
    init_tokens: PositiveInt = 16384
    """Calibration tokens that a start from activations looks at; occlusion and taylor say themselves."""
    head_weight: PositiveFloat = HEAD_WEIGHT
    """Of the start from occlusion or taylor."""
    channel_group: PositiveInt | None = None
    """Channels that share one probability; by default those that the rounding moves together."""
    held_out: PositiveInt = 24
    """Windows that only choose among masks."""
    evaluations: PositiveInt = 6

    def __post_init__(self) -> None:
        for name, value, table in (
            ("baseline", self.baseline, policy.BASELINES),
            ("init", self.init, STARTS),
        ):
            if value not in table:
                raise TopiaristError(f"unknown {name} {value!r}; choose one of {', '.join(table)}")
        if self.samples < 2 and self.baseline != "none":
            raise TopiaristError(f"{self.samples} samples a step are too few for baseline {self.baseline!r}; use 4")

    def check_windows(self, tokens: Int[Tensor, "num window"]) -> None:
        """Raise CalibrationError for windows too few to hold some out."""
        self.divided(tokens)

    def divided(self, tokens: Int[Tensor, "num window"]) -> tuple[Tensor, Tensor]:
        """(windows that masks are tried on, held-out ones), (num, `window`). Raises CalibrationError for too few."""
        return split(short_windows(tokens, self.window), self.held_out)

    def scores(self, task: Task) -> Scores:
        """Scores of the choice with the lowest held-out loss."""
        return self.search(task).scores

    def search(self, task: Task) -> Found:
        """The scores with the held-out losses that chose them."""
        return _Search(self, task).run()


PAPER = PolicyGradient(
    steps=15000, samples=2, windows=8, window=128, baseline="ema", normalise=False, learning_rate=2e-3, init="wanda-sp",
    init_tokens=128 * 1024, channel_group=1, held_out=32, evaluations=15,
)  # fmt: skip
"""The authors' run on LLaMA-2-7B: 30.7 million tokens of forward pass."""


@dataclass
class Found:
    """What a search found: the scores of its best choice, and the looks at held-out text on the way."""

    scores: Scores
    history: list[dict[str, float]]
    """Of every look: step, held-out loss of the exact choice, mean loss of the sampled masks since the last look, share
    of the units that are still undecided, samples dropped."""

    @property
    def best(self) -> dict[str, float]:
        """The look with the lowest held-out loss."""
        return min(self.history, key=lambda entry: entry["held_out"])


def starting_metric(method: PolicyGradient, task: Task) -> tuple[dict[str, Tensor], dict[str, str]]:
    """({group key: metric}, {kind: what metric it is, if that compares between layers}). Kinds that the metric knows
    nothing about start from block influence (depth) or magnitude (experts).
    """
    few = max(1, -(-method.init_tokens // task.tokens.shape[1]))
    wanted = STARTS[method.init]
    metric: dict[str, Tensor] = {}
    comparable: dict[str, str] = {}
    for kind in dict.fromkeys(group.kind for group in task.groups):
        groups = [group for group in task.groups if group.kind == kind]
        if wanted is None:
            metric |= {group.key: torch.zeros(group.count) for group in groups}
            comparable[kind] = method.init
            continue
        scorer = next(x for x in (wanted, BlockInfluence, Magnitude) if kind in x.kinds)
        comparable[kind] = "" if scorer.scope == "per_layer" else scorer.__name__
        if groups[0].key not in metric:  # one look for all kinds of a scorer
            same = [group for group in task.groups if group.kind in scorer.kinds]
            if issubclass(scorer, (Occlusion, Taylor)):
                found = scorer(head_weight=method.head_weight).scores(replace(task, groups=same))
            else:
                found = scorer().scores(replace(task, groups=same, tokens=task.tokens[:few]))
            metric = {key: value.cpu() for key, value in found.items()} | metric
    return metric, comparable


@dataclass
class _State:
    """All that changes from step to step."""

    s: Tensor
    best: Tensor
    step: int = 0
    average: float | None = None
    size: float | None = None
    history: list[dict[str, float]] = field(default_factory=list)


class _Search:
    def __init__(self, method: PolicyGradient, task: Task) -> None:
        self.method, self.task = method, task
        self.training, self.held_out = method.divided(task.tokens)
        saved = task.state.load()
        if saved is None:
            metric, comparable = starting_metric(method, task)
        else:
            metric = {group.key: saved[0][f"metric {group.key}"] for group in task.groups}
            comparable = json.loads(saved[1]["comparable"])
        self.metric, self.comparable = metric, comparable
        self.variables = Variables.make(task, metric, comparable, method.channel_group)
        if saved is None:
            start = self.variables.start(method.sharpness)
            self.state = _State(start, start)
        else:
            rest: dict[str, Any] = json.loads(saved[1]["policy"])
            self.state = _State(saved[0]["s"], saved[0]["best"], **rest)
        self.losses: list[float] = []
        self.dropped = 0
        self.last: tuple[Kept, float] | None = None

    def run(self) -> Found:
        method, state = self.method, self.state
        every = max(1, -(-method.steps // max(1, method.evaluations)))
        with gates(self.task.model, self.task.groups) as masks:
            if not state.history:
                self._look(masks)
            while state.step < method.steps:
                self._step(masks)
                state.step += 1
                self.task.progress("policy gradient", state.step, method.steps)
                if state.step % every == 0 or state.step == method.steps:
                    self._look(masks)
        return Found(self.variables.scores(state.best), state.history)

    def _step(self, masks: Masks) -> None:
        method, state, task = self.method, self.state, self.task
        rng = torch.Generator().manual_seed((task.seed << 32) + state.step)
        drawn = policy.sample(state.s, method.samples, rng)
        batch = self._batch(state.step)
        found = [gated_loss(task, masks, self.variables.by_group(mask), batch) for mask in drawn]
        losses = torch.tensor(found, dtype=torch.float64)
        finite = losses.isfinite()
        self.dropped += int((~finite).sum())
        losses, drawn = losses[finite], drawn[finite]
        if len(losses) < (2 if method.baseline != "none" else 1):
            return
        self.losses.append(float(losses.mean()))
        if method.baseline == "ema":
            state.average = policy.moving_average(state.average, losses, method.horizon)
            baseline = losses.new_tensor(state.average)
        elif method.baseline == "loo":
            baseline = policy.leave_one_out(losses)
        else:
            baseline = losses.new_zeros(())
        gradient = policy.gradient(losses, drawn, state.s, baseline=baseline, bessel=method.baseline == "ema")
        if method.normalise:
            size = float((losses - baseline).square().mean().sqrt())
            state.size = size if state.size is None else MEMORY * state.size + (1 - MEMORY) * size
            gradient = gradient / max(state.size, 1e-12)
        rate = method.learning_rate * (1 + math.cos(math.pi * state.step / method.steps)) / 2
        state.s = self.variables.project(state.s - rate * gradient)

    def _batch(self, step: int) -> Tensor:
        """Windows of a step: every window once before any comes again, in a new order each time."""
        size = min(self.method.windows, len(self.training))
        a_round = len(self.training) // size
        epoch, place = divmod(step, a_round)
        order = torch.randperm(
            len(self.training), generator=torch.Generator().manual_seed((self.task.seed << 32) + (1 << 31) + epoch)
        )
        return self.training[order[place * size : (place + 1) * size]]

    def _look(self, masks: Masks) -> None:
        """Try the exact choice of the present policy on held-out windows; keep the best; save."""
        state = self.state
        kept = chosen(self.task, self.variables.scores(state.s))
        if self.last is None or any(not torch.equal(kept[key], self.last[0][key]) for key in kept):
            self.last = kept, gated_loss(self.task, masks, kept, self.held_out)
        loss = self.last[1]
        if not math.isfinite(loss):
            loss = math.inf
        if all(loss < entry["held_out"] for entry in state.history):
            state.best = state.s.clone()
        undecided = float(((state.s > 0.05) & (state.s < 0.95)).double().mean())
        sampled = sum(self.losses) / len(self.losses) if self.losses else math.nan
        state.history.append(
            {"step": state.step, "held_out": loss, "sampled": sampled, "undecided": undecided, "dropped": self.dropped}
        )
        if state.step == self.method.steps and not math.isfinite(self.best_loss):
            raise NumericalError(
                "no masked forward gave a finite loss: check the model's weights and dtype, or raise keep"
            )
        self.losses, self.dropped = [], 0
        self.task.progress(f"policy gradient, held-out loss {loss:.3f}", state.step, self.method.steps)
        rest = {key: value for key, value in vars(state).items() if key not in ("s", "best")}
        tensors = {"s": state.s, "best": state.best} | {f"metric {key}": value for key, value in self.metric.items()}
        self.task.state.save(tensors, {"policy": json.dumps(rest), "comparable": json.dumps(self.comparable)})

    @property
    def best_loss(self) -> float:
        return min(entry["held_out"] for entry in self.state.history)
