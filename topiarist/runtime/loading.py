"""A model folder, ordinary or packed, as a model ready to run."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from torch import nn

from topiarist.checkpoints.dequantised import QUANTIZATION, DequantisedCheckpoint
from topiarist.checkpoints.reading import read_json
from topiarist.core.compiled import NoKernels
from topiarist.core.errors import CheckpointError, TopiaristError
from topiarist.models.checks import device_or_default
from topiarist.models.opened import open_model
from topiarist.quantization.grid import QuantizedWeight
from topiarist.runtime.linear import QuantisedEmbedding, QuantisedLinear
from topiarist.runtime.packed import MANIFEST, from_packed, read_contents
from topiarist.runtime.skeleton import skeleton


def load_model(folder: Path | str, *, device: str = "cpu") -> Any:
    """A causal LM of transformers in its own dtype, in evaluation mode; integers, packed or as `quantize` writes them, are
    multiplied as they are on the CPU.

    Raises CheckpointError if the folder cannot be read, DeviceError for a device that is not here.
    """
    folder, device = Path(folder), str(device_or_default(device))
    try:
        packed = (folder / MANIFEST).exists()
        model = _integers_or_none(folder) if device == "cpu" and (packed or _is_quantised(folder)) else None
        if model is None:
            model = from_packed(folder) if packed else open_model(str(folder), device=device).whole().model
    except TopiaristError:
        raise
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot load a model from {folder}: {error}") from error
    return model.to(device).eval()


def _is_quantised(folder: Path) -> bool:
    return (folder / "config.json").is_file() and QUANTIZATION in read_json(folder / "config.json")


def _integers_or_none(folder: Path) -> Any | None:
    try:
        return load_integers(folder)
    except NoKernels as error:
        warnings.warn(f"packed integers run as dense weights: {error}", stacklevel=3)
        return None


def load_integers(folder: Path) -> Any | None:
    """The model of a packed or quantised folder, its integer matrices never dense; None if its tensors go by other names than
    its modules, or none is symmetric packed integers.

    Raises CheckpointError for damaged files, NoKernels without a compiler.
    """
    from accelerate.utils import set_module_tensor_to_device
    from transformers import GenerationConfig

    if (folder / MANIFEST).exists():
        config, contents = read_json(folder / "config.json", cure="copy the folder again"), read_contents(folder)
    else:
        checkpoint = DequantisedCheckpoint(folder)
        config = checkpoint.config
        contents = ((name, checkpoint.quantized(name) or checkpoint.read(name)) for name in checkpoint.files)
    model = skeleton(config)
    known = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    for name, content in contents:
        if name not in known:
            return None
        path = name.rpartition(".")[0]
        module = _packed(content, model.get_submodule(path)) if isinstance(content, QuantizedWeight) else None
        if module is not None:
            model.set_submodule(path, module)
        else:
            value = content.dequantized() if isinstance(content, QuantizedWeight) else content
            set_module_tensor_to_device(model, name, "cpu", value=value, dtype=value.dtype)
    _tie(model)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return None if any(parameter.is_meta for parameter in model.parameters()) else model


def _packed(weight: QuantizedWeight, module: nn.Module) -> nn.Module | None:
    """The module with this weight packed; None if the kernels do not take it."""
    width = weight.grid.width(weight.q.shape[1])
    if width % 32 and width != weight.q.shape[1]:
        return None
    if isinstance(module, nn.Embedding):
        return QuantisedEmbedding(QuantisedLinear(weight.q, weight.scale, weight.grid.bits))
    if type(module) is nn.Linear:
        return QuantisedLinear(weight.q, weight.scale, weight.grid.bits, bias=module.bias)
    return None


def _tie(model: Any) -> None:
    """Let the head share the embeddings where the config says so."""
    embeddings = model.get_input_embeddings()
    if not getattr(model.config, "tie_word_embeddings", False):
        return
    if isinstance(embeddings, QuantisedEmbedding):
        model.set_output_embeddings(embeddings.table)
    else:
        model.tie_weights()
