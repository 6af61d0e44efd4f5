"""What must hold before a model is opened. Each check raises one line: the cause, then the cure."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor, nn

from topiarist.checkpoints.reading import Checkpoint
from topiarist.core.errors import CheckpointError, DamagedWeights, DeviceError, UnsupportedModel

ADAPTER = "adapter_config.json"
_WRAPPERS = {
    "_orig_mod.": "was saved from a compiled model: save the model that torch.compile was given",
    "base_model.model.": "was saved inside an adapter's wrapper: save it after merge_and_unload()",
    "module.": "was saved inside a DistributedDataParallel wrapper: save its .module",
}
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def device_or_default(device: str | torch.device | None) -> torch.device:
    """The device that was asked for; otherwise a GPU if there is one. Raises DeviceError if it is not here."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        raise DeviceError(f"{str(device)!r} is no device: choose cpu, cuda, cuda:N or mps") from None
    here = f"here (torch {torch.__version__})"
    if found.type == "cuda" and not torch.cuda.is_available():
        raise DeviceError(f"no CUDA {here}: choose device cpu")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise DeviceError(f"no {found} {here}: there are {torch.cuda.device_count()} CUDA devices, cuda:0 is the first")
    if found.type == "mps" and not torch.backends.mps.is_available():
        raise DeviceError(f"no MPS {here}: choose device cpu")
    if found.type not in ("cpu", "cuda", "mps", "xpu"):
        raise DeviceError(f"device {found} cannot run a model {here}: choose cpu, cuda or mps")
    return found


def check_object(model: nn.Module) -> None:
    """Refuse an object whose parameters are not plain, finite tensors in one memory."""
    layers = (type(module).__module__ for module in model.modules())
    if hasattr(model, "peft_config") or any(name.partition(".")[0] == "peft" for name in layers):
        raise UnsupportedModel("the model carries an adapter: merge the adapter first (model.merge_and_unload())")
    config = getattr(model, "config", None)
    if getattr(config, "quantization_config", None) is not None:
        raise UnsupportedModel("the model is quantised: prune the original weights, then quantise")
    parameters = list(model.parameters())
    if not parameters:
        raise UnsupportedModel(f"{type(model).__name__} has no parameters: nothing to prune")
    devices = {parameter.device for parameter in parameters}
    if any(device.type == "meta" for device in devices):
        raise UnsupportedModel(
            "the model's parameters are offloaded: give its folder instead, it is read block by block"
        )
    if len(devices) > 1:
        names = ", ".join(sorted(map(str, devices)))
        raise UnsupportedModel(f"the model is spread over {names}: give its folder instead, it is read block by block")
    check_finite(model)


def check_finite(module: nn.Module, path: str = "") -> None:
    """Raise DamagedWeights, naming the first parameter below `path` that holds NaN or Inf."""
    for name, parameter in module.named_parameters():
        check_finite_tensor(f"{path}.{name}" if path else name, parameter)


def check_finite_tensor(name: str, *tensors: Shaped[Tensor, "..."]) -> None:
    """Raise DamagedWeights if one of the tensors that `name` is stored as holds NaN or Inf."""
    for tensor in tensors:
        # torch has no isfinite of float8
        wide = tensor.float() if tensor.is_floating_point() and tensor.itemsize == 1 else tensor
        if not bool(torch.isfinite(wide).all()):
            raise _not_finite(name)


def check_finite_files(checkpoint: Checkpoint, names: Iterable[str]) -> None:
    """Raise DamagedWeights, naming the first of the tensors that holds NaN or Inf. They are read piece by piece."""
    for name in names:
        if (dtype := _FLOATS.get(checkpoint.stored(name).dtype)) is None:
            continue
        for piece in checkpoint.chunks(name):
            if not bool(torch.isfinite(torch.frombuffer(bytearray(piece), dtype=dtype)).all()):
                raise _not_finite(name)


def _not_finite(name: str) -> DamagedWeights:
    return DamagedWeights(f"NaN or Inf in {name}: the checkpoint is damaged; download it again")


def check_folder(folder: Path) -> None:
    """Refuse a folder that holds only an adapter."""
    if (folder / ADAPTER).is_file() and not (folder / "config.json").is_file():
        raise UnsupportedModel(
            f"{folder} holds an adapter, not a model: merge the adapter first (load it with peft, then "
            "merge_and_unload().save_pretrained(DIR))"
        )


def check_unquantised(checkpoint: Checkpoint) -> None:
    """Raise UnsupportedModel if the config says that the weights are quantised."""
    if "quantization_config" in checkpoint.config:
        raise UnsupportedModel(f"{checkpoint.folder} is quantised; prune the original weights, then quantise")


def check_complete(
    folder: Path, missing: Iterable[str], on_disk: Iterable[str], unclaimed: Collection[str] = ()
) -> None:
    """Raise CheckpointError for parameters that the files do not hold; without them the model would invent weights.

    unclaimed: tensors of the files that the model has no place for.
    """
    lacking = sorted(missing)
    if not lacking:
        return
    more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
    text = f"{folder} lacks {lacking[0]}{more}"
    for wrapper, cure in _WRAPPERS.items():
        if named := next((name for name in on_disk if name.startswith(wrapper)), None):
            raise CheckpointError(f"{text}: it holds {named}, so it {cure}")
    if unclaimed:
        rest = f" and {len(unclaimed) - 1} more" if len(unclaimed) > 1 else ""
        raise CheckpointError(
            f"{text}, and holds {min(unclaimed)}{rest} that the model has no place for: they may be names of another class or "
            "version of transformers; load it with the one that saved it, and save it again"
        )
    raise CheckpointError(f"{text}: download it again, or save the whole model")


def check_shapes(folder: Path, found: Iterable[tuple[str, tuple[int, ...], tuple[int, ...]]]) -> None:
    """found: (name, shape on disk, shape by the config). Raises CheckpointError for the first that differs."""
    for name, stored, expected in found:
        if tuple(stored) != tuple(expected):
            raise CheckpointError(
                f"tensor {name} of {folder} has shape {tuple(stored)}, config.json asks for {tuple(expected)}: they are not "
                "of one model"
            )


def check_floating(checkpoint: Checkpoint, names: Iterable[str]) -> None:
    """Raise CheckpointError for the first tensor that is stored as integers, truth values, complex numbers or 8-bit floats.

    Cast to what the config asks for, numbers without their scales would pass for weights.
    """
    for name in names:
        if (kind := checkpoint.stored(name).dtype) not in _FLOATS:
            raise CheckpointError(
                f"tensor {name} of {checkpoint.folder} is stored as {kind}, which is no type of weights: if they are "
                "quantised, take the original weights; otherwise save the model again"
            )


def usable_attention(config: Any) -> None:
    """Let the config ask for an attention that is installed; nothing is fetched to serve it."""
    asked = getattr(config, "_attn_implementation", None)
    if asked in (None, "eager", "sdpa"):
        return
    from transformers.utils.import_utils import is_flash_attn_2_available

    if asked == "flash_attention_2" and is_flash_attn_2_available():
        return
    warnings.warn(f"attention {asked!r} is not installed here; another one is used", UserWarning, stacklevel=2)
    config._attn_implementation = None


def why_unbuilt(config: Mapping[str, Any], error: Exception) -> str:
    """What is wrong with a config.json of which transformers cannot build a model, in one line."""
    from transformers import CONFIG_MAPPING

    kind, why = config.get("model_type"), " ".join(str(error).split())
    if (isinstance(kind, str) and kind in CONFIG_MAPPING) or not re.search("model.(type|identifier)", why):
        return why
    if kind is None:
        return "config.json names no model_type; copy it from the original"
    if "auto_map" in config:
        return f"model type {kind!r} needs code of its own (trust_remote_code), which is not run here"
    return f"it knows no model type {kind!r}; upgrade transformers, or correct model_type in config.json"


def needs_remote_code(error: Exception) -> bool:
    """Whether transformers refused to run the folder's own code."""
    return bool(re.search(r"trust_remote_code|custom code", str(error)))


def remote_code_error(folder: Path) -> UnsupportedModel:
    """The error for a model that needs code of its own which the user has not allowed to run."""
    return UnsupportedModel(f"{folder} needs code of its own to run: read it, then pass --trust-remote-code")
