"""How a model calls its blocks: found by running its own forward over stubs, and what that says of how they can be run."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from topiarist.core.errors import UnsupportedModel, first_line
from topiarist.models.derive import base_model, has_encoder, text_inputs
from topiarist.models.families import Family
from topiarist.models.hooks import EndForward, StandIn

Stub = Callable[[int, Tensor], Any]
"""(block, hidden states) -> what it returns in the block's place."""


@dataclass
class BlockCall:
    """How the model calls one block: everything but the hidden states is replayed as it was."""

    hidden: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    keyword: str | None = None
    """The name of the hidden states, if they are no positional argument."""

    @classmethod
    def of(cls, args: Sequence[Any], kwargs: dict[str, Any]) -> BlockCall:
        """The call that a hook saw: the hidden states come first, or are the first floating tensor among the named."""
        if args:
            return cls(args[0], tuple(args[1:]), dict(kwargs))
        named = next((k for k, v in kwargs.items() if isinstance(v, Tensor) and v.is_floating_point()), "hidden_states")
        return cls(kwargs[named], (), {k: v for k, v in kwargs.items() if k != named}, named)

    def run(
        self, block: Callable[..., Any], hidden: Float[Tensor, "batch tokens width"]
    ) -> Float[Tensor, "batch tokens width"]:
        """The block's output for these hidden states."""
        if self.keyword is None:
            return first_of(block(hidden, *self.args, **self.kwargs))
        return first_of(block(*self.args, **{self.keyword: hidden}, **self.kwargs))


def first_of(output: Any) -> Any:
    """What a block returns of the hidden states: itself, or the first of a tuple or list."""
    return output[0] if isinstance(output, tuple | list) else output


@torch.no_grad()
def run_over_stubs(
    model: nn.Module, family: Family, tokens: Int[Tensor, "batch window"], stub: Stub, *, to_the_end: bool = False
) -> list[tuple[int, BlockCall]]:
    """Run the model's own forward with stubs in place of blocks: (block, call) in order. Only what stands around the blocks
    is computed, and unless `to_the_end` only what stands before the last.
    """
    blocks: nn.ModuleList = model.get_submodule(family.blocks)  # pyright: ignore[reportAssignmentType]
    originals = list(blocks)
    record: list[tuple[int, BlockCall]] = []

    def note(index: int, *args: Any, **kwargs: Any) -> Any:
        call = BlockCall.of(args, kwargs)
        record.append((index, call))
        if len(record) == len(originals) and not to_the_end:
            raise EndForward
        return stub(index, call.hidden)

    try:
        for i, block in enumerate(originals):
            blocks[i] = StandIn(block, lambda *args, _i=i, **kwargs: note(_i, *args, **kwargs))
        base_model(model)(**text_inputs(model, tokens))
    except EndForward:
        pass
    finally:
        for i, block in enumerate(originals):
            blocks[i] = block
    return record


def capture_calls(
    model: nn.Module, family: Family, tokens: Int[Tensor, "batch window"], *, returns_tuple: bool = False
) -> list[BlockCall]:
    """How each block is called for these tokens."""
    calls = run_over_stubs(model, family, tokens, lambda _, hidden: (hidden,) if returns_tuple else hidden)
    return [call for _, call in calls]


@dataclass(frozen=True)
class Flow:
    """How hidden states go through the blocks of a model."""

    replays: bool
    """Every block takes one tensor, returns one, and its other arguments do not depend on other blocks: so it can be run by
    itself. Otherwise the model's own forward has to run, paused at every block."""
    returns_tuple: bool
    why: str = ""
    """What keeps blocks from being replayed."""
    uncalled: frozenset[int] = frozenset()
    """Blocks that the forward goes past, for they are for other inputs than text."""


def probe_flow(
    model: nn.Module, family: Family, tokens: Int[Tensor, "1 window"], real: Callable[[int, BlockCall], Any]
) -> Flow:
    """Look at how blocks are called.

    real: runs a block on a call, for its real output. Raises UnsupportedModel for a block that is called twice a forward.
    """
    blocks = list(model.get_submodule(family.blocks).children())
    try:
        first = run_over_stubs(model, family, tokens, _ended)[0][1]
    except IndexError:
        raise UnsupportedModel(
            f"{family.blocks} is not what the model's forward runs: its blocks are never called"
        ) from None
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        raise UnsupportedModel(
            f"the model cannot run on text alone ({_why_not(model, error)}): {_instead(model)}"
        ) from error
    kinds = {type(block): index for index, block in reversed(list(enumerate(blocks)))}
    output = real(0, first)
    as_tuple = isinstance(output, tuple)
    if not _one_tensor(output):
        return Flow(False, as_tuple, "blocks return more than hidden states")
    if first.hidden.ndim != 3:
        return Flow(False, as_tuple, f"hidden states have {first.hidden.ndim} axes")
    returned: list[Any] = []
    fits = True

    def stub(scale: float) -> Stub:
        def run(_: int, hidden: Tensor) -> Any:
            nonlocal fits
            fits &= not returned or hidden is returned[-1]
            returned.append(hidden * scale)
            return (returned[-1],) if as_tuple else returned[-1]

        return run

    try:
        calls = run_over_stubs(model, family, tokens, stub(1.0), to_the_end=True)
        returned.clear()
        other = run_over_stubs(model, family, tokens, stub(0.5), to_the_end=True)
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError) as error:
        return Flow(False, as_tuple, f"the model takes no plain tensor between blocks ({type(error).__name__})")
    order = [index for index, _ in calls]
    if len(set(order)) < len(order):
        twice = next(index for index in order if order.count(index) > 1)
        raise UnsupportedModel(
            f"{family.blocks}.{twice} is called more than once a forward: what a block reads is then no one distribution; "
            "prune its modules with prune_module"
        )
    if order != list(range(len(blocks))):
        uncalled = frozenset(range(len(blocks))) - set(order)
        return Flow(False, as_tuple, "not every block is called for text", uncalled)
    if not fits:
        return Flow(False, as_tuple, "something stands between blocks")
    for (index, call), (_, changed) in zip(calls, other, strict=True):
        if not _plain((call.args, call.kwargs)):
            return Flow(False, as_tuple, f"{family.blocks}.{index} takes arguments that blocks may change")
        if not equal((call.args, call.kwargs), (changed.args, changed.kwargs)):
            return Flow(False, as_tuple, f"arguments of {family.blocks}.{index} depend on other blocks")
    for index in kinds.values():
        if index and not _one_tensor(real(index, calls[index][1])):
            return Flow(False, as_tuple, f"{family.blocks}.{index} returns more than hidden states")
    return Flow(True, as_tuple)


def _why_not(model: Any, error: Exception) -> str:
    """What a model needs beside token ids."""
    reason = first_line(error)
    if has_encoder(model):
        return "its encoder takes other inputs than token ids"
    if re.search(r"\bmeta\b", reason):  # what text does not pass is not loaded
        return "its forward runs parts that are for other inputs"
    return reason


def _instead(model: Any) -> str:
    """What can be pruned of a model that needs more than token ids."""
    from transformers import GenerationMixin

    if has_encoder(model) and isinstance(
        getattr(model, "decoder", None), GenerationMixin
    ):  # a language model by itself
        return "save its decoder alone (model.decoder.save_pretrained(DIR)) and prune that, or its modules with prune_module"
    return "prune its modules with prune_module"


def _ended(*_: Any) -> Any:
    raise EndForward


def _one_tensor(output: Any) -> bool:
    """Whether hidden states are all that a block gives on."""
    rest = output[1:] if isinstance(output, tuple) else ()
    return isinstance(output, tuple | Tensor) and all(value is None for value in rest)


def _plain(value: Any) -> bool:
    """Whether nothing in an argument can be changed by a block so that a later one sees it."""
    if isinstance(value, dict):
        return all(map(_constant, value.values()))
    return all(_plain(v) if isinstance(v, dict) else _constant(v) for v in value)


def _constant(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_constant, value))
    return value is None or isinstance(value, Tensor | bool | int | float | str | torch.dtype | torch.device)


def equal(a: Any, b: Any) -> bool:
    """Whether two arguments are the same, tensors by their values."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or (a.shape == b.shape and a.dtype == b.dtype and bool(torch.equal(a, b)))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a is b or (type(a) is type(b) and a == b)
