"""What a structural run is asked for, as one value."""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import Annotated, Any, Literal

from jaxtyping import Int
from pydantic import BeforeValidator, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from topiarist.core.errors import CalibrationError, TopiaristError
from topiarist.core.options import About, Registered, Settings, options
from topiarist.core.registry import name_of
from topiarist.pipelines.common.options import TextOptions, count
from topiarist.pipelines.shrinking.distill import Distill
from topiarist.structured import METHODS, Method
from topiarist.structured.layout import MAX_WASTE
from topiarist.structured.reap import Reap
from topiarist.structured.taylor import Taylor
from topiarist.structured.trial import split
from topiarist.structured.units import check_kinds, check_names, cut_order

KEEP = 0.8


def _kinds(given: Any) -> Any:
    """Kinds of units, each by itself or several with commas."""
    words = [given] if isinstance(given, str) else given
    if not isinstance(words, Sequence | Set):  # refused as what it is
        return words
    return [kind.strip() for word in words for kind in str(word).split(",") if kind.strip()]


@options
class Search:
    """How the splits are compared."""

    values: Annotated[int, Field(ge=2)] = 5
    """Counts tried on each axis, from the whole one down."""
    held_out: Annotated[int, Field(gt=0)] = 4
    """Calibration windows that measure the loss and score nothing; at most a quarter."""
    recover_steps: NonNegativeInt = 0
    """Steps of low-rank training towards the dense model before a split is measured."""


@options
class ShrinkOptions(TextOptions):
    """Everything that `shrink` takes beside the model, the output folder and the progress bar."""

    method: Annotated[Method | None, Registered(METHODS, base=(Method,), other=lambda given: given is None)] = None
    """What scores the units; default reap for experts, taylor for all else; `topiarist methods` lists all;
    policy-gradient:steps=500 sets a field."""
    keep: Annotated[float | None, Field(gt=0, le=1)] = None
    """Share of the units' parameters that stays, never exceeded; default 0.8."""
    target_params: Annotated[PositiveInt | None, BeforeValidator(count), About(metavar="N")] = None
    """Instead of keep: parameters of the whole smaller model, such as 100M. Splits over hidden, kv_groups, channels (and
    block, where units name it) are tried, and the one of the lowest loss on held-out windows is taken."""
    target_latency: Annotated[PositiveFloat | None, About(metavar="MS")] = None
    """Instead of keep: milliseconds that a decoded token of one sequence may take, as measured here in transformers' own loop.
    Splits are tried as for target_params, of as many parameters as meet it."""
    search: Annotated[Search | None, Settings(Search)] = None
    """How splits are tried: values=4,recover_steps=20 sets fields."""
    layout: Literal["uniform", "padded", "hetero", "masked"] = "uniform"
    """uniform (opens everywhere), padded (filled up with zeros), hetero (layers differ in size) or masked (zeros)."""
    units: Annotated[Sequence[str] | None, BeforeValidator(_kinds)] = None
    """kv_groups, heads, channels, hidden (the width of the residual stream), experts, attention, ffn, block; default
    kv_groups,channels as the method scores."""
    scope: Literal["global", "parameters", "per_layer"] | None = None
    """Over what units compete; default: what layout and method want. uniform knows per_layer alone."""
    round_to: PositiveInt | None = None
    """Channels go in multiples of it; default 64, less if narrow."""
    rotate: bool = False
    """Of hidden: rotate the hidden states to their principal axes first, where norms and an untied head allow it."""
    refit: bool = True
    """Least squares for the matrices that consumed the units."""
    recover: Annotated[Distill | None, Settings(Distill)] = None
    """Afterwards, train towards the dense model's predictions: lora or full (lora:steps=200 sets a field)."""
    batch_size: PositiveInt = 8
    """Windows a forward pass."""
    max_waste: NonNegativeFloat = MAX_WASTE
    """Of layout padded: zeros that only fill up, per kept parameter."""

    @property
    def chosen_method(self) -> Method:
        """The method that was given, or the one for these units."""
        return self.method or (Reap() if list(self.units or ()) == ["experts"] else Taylor())

    @property
    def chosen_keep(self) -> float:
        """The share that was given, or the default one."""
        return KEEP if self.keep is None else self.keep

    def __post_init__(self) -> None:
        super().__post_init__()
        named = [name for name in ("keep", "target_params", "target_latency") if getattr(self, name) is not None]
        if len(named) > 1:
            raise TopiaristError(f"{named[0]} and {named[1]} both say how much stays: name one of them")
        if self.search is not None and not self.searches:
            raise TopiaristError(
                "search says how splits are tried, and there is no target_params or target_latency: name one, or leave "
                "search out"
            )
        if self.units:
            check_names(self.units)
            # Of a search what is cut together: it tries the width and the depth one after the other.
            for together in cut_order(self.units) if self.searches else [self.units]:
                check_kinds(together)
        if self.rotate and self.searches:
            raise TopiaristError("splits are tried on the model as it is: leave rotate out, or name keep")

    @property
    def searches(self) -> bool:
        """Whether splits over the axes are tried."""
        return self.target_params is not None or self.target_latency is not None

    def check_text(self, *, refits: bool) -> None:
        """Raise CalibrationError if there is no text and something needs it. refits: whether a refit has anything to do."""
        if self.data is not None:
            return
        if self.recover is not None:
            what, cure = "recovery", ""
        elif self.searches:
            what, cure = "the search for a split", ""
        elif self.rotate:
            what, cure = "rotate", ""
        elif self.chosen_method.needs_data:
            what, cure = f"method {name_of(METHODS, self.chosen_method)}", ""
        elif refits:
            what, cure = "the refit", ", or --no-refit"
        else:
            return
        raise CalibrationError(f"{what} needs text: name --data FILE{cure}")

    def check_windows(self, tokens: Int[Tensor, "num window"]) -> None:
        """Raise CalibrationError for windows too few for a step of the recovery, or to hold some out where that is done."""
        if self.recover is not None and len(tokens) < self.recover.sequences:
            raise CalibrationError(
                f"a step of the recovery takes {self.recover.sequences} windows of text, and there are {len(tokens)}: lower "
                "its sequences, or add calibration samples"
            )
        if self.searches:
            tokens, _ = split(tokens, (self.search or Search()).held_out)
        self.chosen_method.check_windows(tokens)
