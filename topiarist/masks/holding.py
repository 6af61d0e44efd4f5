"""Keeping a pruned model's zeros through anyone's training loop."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from topiarist.core.errors import PatternError


class Hold:
    """Zeros held in place until `release()`, or the end of a `with` block."""

    def __init__(self, masks: dict[nn.Parameter, Tensor]) -> None:
        self._masks = masks
        self.apply()  # what cannot be held is refused before a hook stands
        self._handles = [
            parameter.register_hook(lambda grad, parameter=parameter: self._cut(parameter, grad))
            for parameter in masks
            if parameter.requires_grad
        ]
        self._handles.append(register_optimizer_step_post_hook(self._after_step))

    @property
    def sparsity(self) -> float:
        """Fraction of zeros in the held parameters."""
        kept = sum(int(mask.sum()) for mask in self._masks.values())
        return 1.0 - kept / sum(mask.numel() for mask in self._masks.values())

    def _mask(self, parameter: nn.Parameter) -> Tensor:
        """The mask on the parameter's device: a model may have been moved since."""
        mask = self._masks[parameter]
        if mask.device != parameter.device:
            mask = self._masks[parameter] = mask.to(parameter.device)
        return mask

    def _cut(self, parameter: nn.Parameter, grad: Tensor) -> Tensor:
        return grad.masked_fill(~self._mask(parameter), 0.0)

    @torch.no_grad()
    def _after_step(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter in self._masks:
                    parameter.masked_fill_(~self._mask(parameter), 0.0)

    @torch.no_grad()
    def apply(self) -> None:
        """Set the zeros again now, for code that writes to weights without an optimiser (averaging, merging)."""
        for parameter in self._masks:
            parameter.masked_fill_(~self._mask(parameter), 0.0)

    def release(self) -> None:
        """Let go: weights may grow back from here on."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __enter__(self) -> Hold:
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()


def hold(model: nn.Module, masks: Mapping[str, Bool[Tensor, "..."]] | None = None, *, least: float = 0.01) -> Hold:
    """Keep the zeros of a pruned model through any training loop that uses torch optimisers.

    masks: parameter name -> bool mask in the parameter's shape (True = kept). By default the zeros that stand now in the
    matrices that the model's `pruning_config` names; if it has none (a model pruned in memory), in every parameter of
    two or more axes in which at least a fraction `least` is zero, but for embeddings, adapters, and matrices that are
    zero as a whole: a pruned matrix keeps something, a fresh adapter does not.

    Two guards: a gradient hook cuts gradients at the zeros, so no optimiser state builds up there; and a hook after
    every optimiser step writes the zeros again, whatever the optimiser added. So it holds under Trainer and TRL (full
    fine-tuning), Accelerate, gradient accumulation, clipping, weight decay and moved models, and with peft's adapters
    wrapped before or after. It does not see parameters that a wrapper replaces by its own (FSDP's flat parameters,
    DeepSpeed): hold after wrapping, or call `apply()`. Merging adapters fills the zeros, so call `apply()` after a merge.

    Raises PatternError if there is nothing to hold, or a mask fits no parameter.
    """
    parameters = dict(model.named_parameters())
    if masks is None:
        chosen = {parameters[name]: mask for name, mask in zeros_of(model, least=least).items()}
    else:
        chosen = {}
        for name, mask in masks.items():
            if name not in parameters or parameters[name].shape != mask.shape:
                found = tuple(parameters[name].shape) if name in parameters else "no such parameter"
                raise PatternError(f"cannot hold {name}: mask of shape {tuple(mask.shape)}, model has {found}")
            if mask.dtype != torch.bool:
                raise PatternError(
                    f"cannot hold {name}: its mask is {mask.dtype}, and True means kept: give a bool mask"
                )
            chosen[parameters[name]] = mask.to(parameters[name].device)
    if not chosen:
        raise PatternError("nothing to hold: no weight of the model has zeros; prune it first, or pass masks")
    return Hold(chosen)


def zeros_of(model: nn.Module, *, least: float = 0.01) -> dict[str, Bool[Tensor, "..."]]:
    """Masks (True = kept) of the zeros that stand in a pruned model's weights, by parameter name, as `hold` finds them."""
    parameters = dict(model.named_parameters())
    claimed = _claimed(model, parameters)
    names = _with_zeros(model, parameters, least) if claimed is None else claimed
    return {name: (parameters[name] != 0).detach() for name in names}


def _claimed(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> list[str] | None:
    """Names of the parameters that hold the matrices which the model's `pruning_config` names; None if it names none."""
    provenance = getattr(getattr(model, "config", None), "pruning_config", None) or {}
    # A matrix is a module's weight, or (of fused experts) a parameter and the expert's number.
    claimed = {
        name
        for matrix in provenance.get("modules", {})
        for name in (f".{matrix}.weight", "." + matrix.rpartition(".")[0])
    }
    # Wrappers put names before a parameter's own, and peft one into it; a base model lacks the first.
    own = {name: "." + name.replace(".base_layer.", ".") for name in parameters}
    suffixes = {path[at:] for path in claimed for at in range(len(path)) if path[at] == "."}
    found = [
        name
        for name, path in own.items()
        if parameters[name].ndim >= 2
        and (path in suffixes or any(path[at:] in claimed for at in range(len(path)) if path[at] == "."))
    ]
    return found or None


def _with_zeros(model: nn.Module, parameters: Mapping[str, nn.Parameter], least: float) -> list[str]:
    """Names of the parameters whose zeros look pruned."""
    excluded = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for module in model.modules():
        for name in getattr(module, "adapter_layer_names", ()):  # how peft's layers list their own parts
            part = getattr(module, name, None)
            parts = part.parameters() if isinstance(part, nn.Module) else ()
            excluded.update(id(parameter) for parameter in parts)
    found = []
    for name, parameter in parameters.items():
        if parameter.ndim >= 2 and id(parameter) not in excluded:
            zeros = float((parameter == 0).float().mean())
            if least <= zeros < 1.0:
                found.append(name)
    return found
