"""After channels of the hidden states went, what reads them learns to do without: least squares against the dense model.

Dense and narrower model walk side by side. Whatever reads one input x shares one linear map T: W x of the dense model is
what W T y is asked for, y being what the narrower model has in the place of x.

x  (tokens, d)      y  (tokens, k)      S  (d, k), the channels that stay
C = sum x^T y (d, k)      H = sum y^T y (k, k)      D = sum x^T x (d, d)
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from topiarist.core.errors import CalibrationWarning
from topiarist.core.linalg import cholesky
from topiarist.models.hooks import EndForward, hooked
from topiarist.models.opened import ObjectModel, at_rest
from topiarist.pipelines.common.stream import BlockStream
from topiarist.pipelines.shrinking.refit_consumers import Saved, loaded_or_made
from topiarist.pipelines.shrinking.report import Refitted
from topiarist.structured import UnitGroup
from topiarist.structured.width import residual_norms, tied_names

DAMPING = 1e-2


@dataclass
class Pairs:
    """Sums over tokens of what one place reads in both models."""

    C: Tensor
    H: Tensor
    D: Tensor
    tokens: int = 0

    @classmethod
    def of(cls, width: int, channels: int, device: torch.device) -> Pairs:
        """Nothing summed yet."""
        C, H, D = (torch.zeros(shape, device=device) for shape in ((width, channels), (channels,) * 2, (width,) * 2))
        return cls(C, H, D)

    def add(self, x: Float[Tensor, "tokens d"], y: Float[Tensor, "tokens k"]) -> None:
        """Count the same tokens of both models."""
        x, y = x.float(), y.float()
        self.C.addmm_(x.T, y)
        self.H.addmm_(y.T, y)
        self.D.addmm_(x.T, x)
        self.tokens += len(x)

    def best_map(self, S: Float[Tensor, "d k"], damping: float = DAMPING) -> Float[Tensor, "d k"]:
        """T that minimises sum ||x - T y||^2 + damping sum_j H_jj ||T_j - S_j||^2: S + (C - S H) (H + damping diag H)^-1."""
        scale = self.H.diagonal().clamp_min(0).sqrt()
        scale = torch.where(scale > 0, scale, 1.0)
        A = self.H / scale / scale[:, None]
        A.diagonal().copy_(torch.full_like(scale, 1 + damping))
        right = (self.C - S @ self.H) / scale
        return S + torch.cholesky_solve(right.T, cholesky(A)).T / scale

    def error(self, W: Float[Tensor, "out d"], X: Float[Tensor, "out k"]) -> float:
        """sum ||W x - X y||^2 / sum ||W x||^2."""
        energy = ((W @ self.D) * W).sum(dtype=torch.float64)
        lost = energy - 2 * ((W @ self.C) * X).sum(dtype=torch.float64) + ((X @ self.H) * X).sum(dtype=torch.float64)
        return float((lost / energy).clamp_min(0)) if float(energy) > 0 else 0.0


def refit_readers(
    dense: ObjectModel,
    narrow: ObjectModel,
    group: UnitGroup,
    kept: Bool[Tensor, " d"],
    tokens: Int[Tensor, "num window"],
    *,
    batch_size: int,
    load: Callable[[int], Saved | None],
    save: Callable[[int, Saved], None],
    progress: Callable[[str, int, int], None],
) -> tuple[list[Refitted], list[str]]:
    """Overwrite the weights of `narrow` that read its hidden states, block by block; the head last, if it is not tied.

    dense: stays as it is. load, save: what an earlier try finished, block by block. Returns what was done, and warnings.
    """
    S = torch.eye(len(kept), device=narrow.device)[:, kept.to(narrow.device)]
    names = dense.block_names
    reports: list[Refitted] = []

    def finish(index: int, make: Callable[[], Saved]) -> None:
        weights, rows = loaded_or_made(index, load, save, make)
        for name, weight in weights.items():
            narrow.model.get_parameter(name).data = weight.to(narrow.device)
        reports.extend(rows)

    with at_rest(dense.model), at_rest(narrow.model), torch.no_grad():
        streams = [BlockStream.of(m, tokens, batch_size=batch_size, needs_states="the refit") for m in (dense, narrow)]
        for index, path in enumerate(names):
            progress("refitting what reads the hidden states", index, len(names) + 1)
            readers = _readers(dense.model, group, path)
            finish(index, partial(_block, dense, narrow, streams, index, readers, S))
            for stream, model in zip(streams, (dense, narrow), strict=True):
                stream.advance(index, model.load(index))
        finish(len(names), partial(_head, dense, narrow, streams, group, S))
    progress("refitting what reads the hidden states", len(names) + 1, len(names) + 1)
    few = next((report for report in reports if report.tokens < len(kept)), None)
    if few is None:
        return reports, []
    note = f"{few.tokens} calibration tokens for {len(kept)} hidden channels: the refit is uncertain; add calibration samples"
    warnings.warn(note, CalibrationWarning, stacklevel=2)
    return reports, [note]


def _readers(model: Any, group: UnitGroup, path: str) -> dict[str, list[str]]:
    """{module in the block: its parameters that read the hidden states}: their last axis is of the hidden channels."""
    found: dict[str, list[str]] = {}
    for part in group.parts:
        parameter = model.get_parameter(part.parameter)
        if part.parameter.startswith(f"{path}.") and parameter.ndim > 1 and part.axis == parameter.ndim - 1:
            found.setdefault(part.parameter.rpartition(".")[0], []).append(part.parameter)
    return found


def _block(
    dense: ObjectModel,
    narrow: ObjectModel,
    streams: Sequence[BlockStream],
    index: int,
    readers: Mapping[str, Sequence[str]],
    S: Float[Tensor, "d k"],
) -> Saved:
    """New weights of one block: those that read one input together, and the later ones on what these then give."""
    weights: dict[str, Tensor] = {}
    rows: list[dict[str, Any]] = []
    for together in _stages(dense, streams[0], index, readers):
        pairs = Pairs.of(S.shape[0], S.shape[1], narrow.device)
        for batch in range(streams[0].num_batches):
            x, y = (
                _seen(model, stream, index, batch, together[0])
                for model, stream in zip((dense, narrow), streams, strict=True)
            )
            pairs.add(x, y)
        for name in (name for module in together for name in readers[module]):
            weights[name], row = _refit(name, dense.model.get_parameter(name), S, pairs)
            narrow.model.get_parameter(name).data = weights[name]
            rows.append(row)
    return weights, rows


def _refit(name: str, weight: Tensor, S: Float[Tensor, "d k"], pairs: Pairs) -> tuple[Tensor, dict[str, Any]]:
    """W T in the weight's dtype, or W S where that is no worse."""
    W = weight.detach().float().reshape(-1, weight.shape[-1])
    plain, new = W @ S, (W @ pairs.best_map(S)).to(weight.dtype).float()
    before, after = pairs.error(W, plain), pairs.error(W, new)
    if after > before:
        new, after = plain, before
    kept, of = S.shape[1], S.shape[0]
    row = Refitted(
        name.removesuffix(".weight"), (len(W), of), f"{kept} of {of}", 1 - kept / of, after, before, pairs.tokens
    )
    return new.to(weight.dtype).reshape(*weight.shape[:-1], kept).contiguous(), asdict(row)


def _head(
    dense: ObjectModel, narrow: ObjectModel, streams: Sequence[BlockStream], group: UnitGroup, S: Float[Tensor, "d k"]
) -> Saved:
    """The head on what the last norm gives; nothing where it is the embedding's own matrix."""
    head = next((n for n, p in dense.model.named_parameters() if p is dense.model.get_output_embeddings().weight), "")
    outside = [name for name in residual_norms(dense.model, group.parts) if not name.startswith(dense.family.blocks)]
    if tied_names(dense.model) or not head or len(outside) != 1:
        return {}, []
    pairs = Pairs.of(S.shape[0], S.shape[1], narrow.device)
    norms = [model.model.get_submodule(outside[0]) for model in (dense, narrow)]
    for batch in range(streams[0].num_batches):
        x, y = (_rows(norm(s.batch_of(s.hidden, batch))) for norm, s in zip(norms, streams, strict=True))
        pairs.add(x, y)
    weight, row = _refit(head, dense.model.get_parameter(head), S, pairs)
    return {head: weight}, [row]


def _stages(
    dense: ObjectModel, stream: BlockStream, index: int, readers: Mapping[str, Sequence[str]]
) -> list[list[str]]:
    """The modules that read one input, in the order in which a forward reaches them."""
    seen: dict[tuple[int, int], list[str]] = {}
    held: list[Tensor] = []  # so that no two inputs have one address

    def note(name: str, x: Tensor) -> None:
        held.append(x)
        seen.setdefault((x.data_ptr(), x.numel()), []).append(name)

    with _watched(dense.model, readers, note):
        stream.run_batch(index, dense.load(index), 0)
    return list(seen.values())


def _seen(model: ObjectModel, stream: BlockStream, index: int, batch: int, name: str) -> Float[Tensor, "tokens width"]:
    """What a module reads in one batch; the forward ends there."""
    found: list[Tensor] = []

    def note(_: str, x: Tensor) -> None:
        found.append(_rows(x))
        raise EndForward

    with _watched(model.model, [name], note), suppress(EndForward):
        stream.run_batch(index, model.load(index), batch)
    return found[0]


@contextmanager
def _watched(model: Any, names: Any, note: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Call note(name, input) whenever one of the named modules is about to run."""

    def enter(name: str, _: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        note(name, args[0] if args else kwargs["hidden_states"])

    with hooked(
        *(model.get_submodule(name).register_forward_pre_hook(partial(enter, name), with_kwargs=True) for name in names)
    ):
        yield


def _rows(x: Tensor) -> Float[Tensor, "tokens width"]:
    return x.reshape(-1, x.shape[-1])
