"""Hooks on a running model: what flows into a matrix is seen or changed, and no modelling code is touched."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from topiarist.core.errors import UnsupportedModel

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    from topiarist.models.families import Matrix

Handler = Callable[[Tensor, Tensor, Callable[[Tensor], Tensor]], Tensor]
"""(input, weight as (..., out, in), function that multiplies an input by it) -> the product."""


class EndForward(Exception):
    """Ends a forward that has gone as far as is needed."""


@contextmanager
def hooked(*handles: RemovableHandle) -> Iterator[None]:
    """Remove the hooks on leaving, whatever happens inside."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class StandIn(nn.Module):
    """Runs `forward` in a block's place; looks like the block otherwise."""

    def __init__(self, block: nn.Module, forward: Callable[..., Any]) -> None:
        super().__init__()
        self.__dict__.update(_block=block, _forward=forward)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_block"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the given function returns for the block's arguments."""
        return self._forward(*args, **kwargs)


class ProductMode(torch.overrides.TorchFunctionMode):
    """Hands every product of an input and a weight to `handle`: experts and routers call no module that could be hooked."""

    PRODUCTS = frozenset(
        {F.linear, torch.matmul, torch.mm, torch.bmm, Tensor.matmul, Tensor.__matmul__, Tensor.mm, Tensor.bmm}
    )

    def __init__(self, handle: Handler) -> None:
        super().__init__()
        self._handle = handle

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in self.PRODUCTS and len(args) > 1 and isinstance(args[1], Tensor):
            weight = args[1] if func is F.linear or args[1].ndim < 2 else args[1].mT
            return self._handle(args[0], weight, lambda x: func(x, *args[1:], **kwargs))
        return func(*args, **kwargs)


@contextmanager
def products_inside(module: nn.Module, handle: Handler) -> Iterator[None]:
    """Every product inside `module`'s forward, and there only, goes through `handle`."""
    modes: list[ProductMode] = []

    def enter(*_: Any) -> None:
        modes.append(ProductMode(handle))
        modes[-1].__enter__()

    def leave(*_: Any) -> None:
        modes.pop().__exit__(None, None, None)

    with hooked(module.register_forward_pre_hook(enter), module.register_forward_hook(leave, always_call=True)):
        yield


@contextmanager
def watch_inputs(matrices: Sequence[Matrix], on_input: Callable[[Matrix, Tensor], None]) -> Iterator[None]:
    """Call `on_input(matrix, x)` whenever a matrix is about to be applied to x (..., in)."""
    with ExitStack() as stack:
        modules = [m for m in matrices if m.expert is None]
        stack.enter_context(
            hooked(*(m.module.register_forward_pre_hook(partial(_first_argument, on_input, m)) for m in modules))
        )
        if experts := [m for m in matrices if m.expert is not None]:
            stack.enter_context(ProductMode(_expert_inputs(experts, on_input)))
        yield


def _first_argument(on_input: Callable[[Matrix, Tensor], None], matrix: Matrix, _: nn.Module, args: Any) -> None:
    on_input(matrix, args[0])


def _expert_inputs(experts: Sequence[Matrix], on_input: Callable[[Matrix, Tensor], None]) -> Handler:
    """Experts are told apart by where their slices of the fused parameter lie in memory: a product takes one of them, or
    all at once with the inputs of each (expert, tokens, in).
    """
    slices = {m.tensor.data_ptr(): m for m in experts}
    whole: dict[int, list[Matrix]] = {}
    for matrix in experts:
        whole.setdefault(getattr(matrix.module, matrix.parameter).data_ptr(), []).append(matrix)

    def handle(x: Tensor, weight: Tensor, multiply: Callable[[Tensor], Tensor]) -> Tensor:
        if weight.ndim == 2 and (matrix := slices.get(weight.data_ptr())) is not None:
            _check_layout(matrix, weight)
            on_input(matrix, x)
        elif weight.ndim == 3 and x.ndim == 3:
            for matrix in whole.get(weight.data_ptr(), ()):
                _check_layout(matrix, weight)
                on_input(matrix, x[matrix.expert])
        return multiply(x)

    return handle


def _check_layout(matrix: Matrix, weight: Tensor) -> None:
    """Raise UnsupportedModel if the product reads an expert's rows as columns: of square ones no shape would tell."""
    if weight.stride()[-2:] != matrix.weight.stride():
        orders = ("(expert, out, in)", "(expert, in, out)")
        raise UnsupportedModel(
            f"{matrix.path} is multiplied as {orders[not matrix.transposed]}, and taken to be {orders[matrix.transposed]}: say "
            f"so in a row of topiarist.models.FAMILIES (Family(experts={{{matrix.path!r}: {not matrix.transposed}}}))"
        )
