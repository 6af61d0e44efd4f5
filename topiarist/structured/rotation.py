"""A rotation of the hidden states to their principal axes, merged into the weights: the channels that go then hold least.

An RMS norm without its gain commutes with rotations. So gains are folded into the matrices that read the norms, and every
matrix is turned on its side of the hidden states by one orthogonal matrix Q: the function stays, the channels are other ones.
SliceGPT (Ashkboos et al., arXiv 2401.15024, sections 3.2 and 3.3) takes a Q for every block, and a matrix on every
residual connection that leads from one to the next. A plain model has no such matrices: here Q is one for all blocks.

x  (tokens, d), what a norm reads      Q  (d, d), orthogonal; its columns are the principal axes, the largest first
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from topiarist.core.errors import UnsupportedModel
from topiarist.models.hooks import hooked
from topiarist.models.opened import at_rest
from topiarist.structured.units import UnitGroup
from topiarist.structured.width import norm_of, residual_norms, tied_names


@dataclass(frozen=True)
class Readers:
    """Which parameters read the output of which norm: {norm: names}."""

    of: Mapping[str, list[str]]


def check_rotation(model: Any, group: UnitGroup) -> None:
    """Raise UnsupportedModel where a rotation cannot be merged into the weights. Works on a model without memory."""
    what = f"{model.config.model_type} cannot be rotated"
    if tied_names(model):
        raise UnsupportedModel(
            f"{what}: head and embedding are one matrix, and the last norm's gain fits into one of them alone; leave out "
            "rotate, or untie them"
        )
    norms = residual_norms(model, group.parts)
    for name, module in norms.items():
        if norm_of(module).centres or getattr(module, "bias", None) is not None:
            raise UnsupportedModel(f"{what}: {name} is no RMS norm without a bias; leave out rotate")


@torch.no_grad()
def readers_of(model: Any, group: UnitGroup, tokens: Int[Tensor, "num window"]) -> Readers:
    """Ask a forward which parameters read which norm. Raises UnsupportedModel if one reads the hidden states themselves."""
    norms = residual_norms(model, group.parts)
    embedding = model.get_input_embeddings().weight
    reading: dict[str, list[str]] = {}
    for part in group.parts:
        parameter = model.get_parameter(part.parameter)
        if parameter.ndim > 1 and part.axis == parameter.ndim - 1 and parameter is not embedding:
            reading.setdefault(part.parameter.rpartition(".")[0], []).append(part.parameter)
    outputs: dict[tuple[int, int], str] = {}
    found: dict[str, list[str]] = {name: [] for name in norms}
    unread: list[str] = []
    held: list[Tensor] = []  # so that no two tensors have one address

    def normed(name: str, _: nn.Module, __: Any, output: Tensor) -> None:
        held.append(output)
        outputs[output.data_ptr(), output.numel()] = name

    def enter(name: str, _: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        x = args[0] if args else kwargs["hidden_states"]
        norm = outputs.get((x.data_ptr(), x.numel()))
        unread.extend([name] if norm is None else [])
        found.get(norm or "", unread).extend(reading[name] if norm else [])

    handles = [norms[name].register_forward_hook(partial(normed, name)) for name in norms]
    handles += [
        model.get_submodule(name).register_forward_pre_hook(partial(enter, name), with_kwargs=True) for name in reading
    ]
    with hooked(*handles), at_rest(model):
        model(input_ids=tokens[:1].to(model.device), use_cache=False)
    if unread or not all(found.values()):
        odd = unread[0] if unread else next(name for name, names in found.items() if not names)
        raise UnsupportedModel(
            f"{model.config.model_type} cannot be rotated: {odd} does not stand between a norm and what reads it; leave out "
            "rotate"
        )
    return Readers(found)


@torch.no_grad()
def principal_axes(
    model: Any,
    group: UnitGroup,
    tokens: Int[Tensor, "num window"],
    batch_size: int,
    progress: Callable[[str, int, int], None],
) -> tuple[Float[Tensor, "d d"], Float[Tensor, " d"]]:
    """(Q, energies): of sum over norms and tokens of y y^T, y = x / rms(x), eigenvectors and eigenvalues, the largest first."""
    device = model.device
    total = torch.zeros(group.count, group.count, dtype=torch.float64, device=device)

    def reads(_: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0].reshape(-1, group.count).float()
        y = x * x.square().mean(1, keepdim=True).clamp_min(1e-30).rsqrt()
        total.add_(y.T @ y)

    norms = residual_norms(model, group.parts).values()
    batches = tokens.split(batch_size)
    with hooked(*(norm.register_forward_pre_hook(reads) for norm in norms)):
        for number, batch in enumerate(batches):
            progress("looking for principal axes", number, len(batches))
            model(input_ids=batch.to(device), use_cache=False)
    energies, vectors = torch.linalg.eigh(total)
    Q = vectors.flip(1)
    return Q * torch.where(Q.sum(0) < 0, -1.0, 1.0), energies.flip(0).clamp_min(
        0
    )  # eigenvectors have no sign of their own


@torch.no_grad()
def rotated(model: Any, group: UnitGroup, readers: Readers, Q: Float[Tensor, "d d"]) -> Any:
    """A copy of the model, turned by Q: the same function. Tensors that have no side of hidden channels are shared."""
    norms = residual_norms(model, group.parts)
    gains = {name: norm_of(module).offset + module.weight.double() for name, module in norms.items()}
    by_reader = {parameter: gains[norm] for norm, names in readers.of.items() for parameter in names}
    turned = copy.deepcopy(model, {id(p): p for p in model.parameters()})  # modules anew, parameters the same
    for part in group.parts:
        path, _, leaf = part.parameter.rpartition(".")
        old = model.get_parameter(part.parameter)
        if path in norms:
            new = torch.full_like(old, 1.0 - norm_of(norms[path]).offset)
        else:
            weight = old.double() * by_reader[part.parameter] if part.parameter in by_reader else old.double()
            new = (weight.movedim(part.axis, -1) @ Q.to(weight)).movedim(-1, part.axis).to(old.dtype).contiguous()
        setattr(turned.get_submodule(path), leaf, nn.Parameter(new, requires_grad=old.requires_grad))
    return turned
