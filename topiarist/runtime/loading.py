"""A model folder, ordinary or packed, as a model ready to run."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from torch import nn

from topiarist.checkpoints.dequantised import QUANTIZATION, DequantisedCheckpoint
from topiarist.checkpoints.reading import read_json
from topiarist.core.compiled import NoKernels
from topiarist.core.errors import CheckpointError, TopiaristError, UnsupportedModel
from topiarist.models import checks
from topiarist.models.building import generation_config
from topiarist.models.opened import open_model
from topiarist.quantization.grid import QuantizedWeight
from topiarist.runtime.linear import QuantisedEmbedding, QuantisedLinear
from topiarist.runtime.manifest import MANIFEST
from topiarist.runtime.packed import read_contents, read_packed
from topiarist.runtime.skeleton import skeleton


def from_packed(folder: Path | str, **kwargs: Any) -> Any:
    """A transformers causal LM with the weights of a packed folder; `kwargs` go to `from_pretrained`.

    Raises CheckpointError for a damaged folder, or a config that asks for other weights than there are.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    folder = Path(folder)
    state, generation = dict(read_packed(folder)), generation_config(folder)
    try:
        trust = kwargs.get("trust_remote_code", False)  # None would ask
        config = kwargs.pop("config", None) or AutoConfig.from_pretrained(folder, trust_remote_code=trust)
    except Exception as error:  # configurations are checked by several libraries, each with errors of its own
        reason = " ".join(str(error).split())
        raise CheckpointError(f"transformers cannot build a model from {folder}: {reason}") from error
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UnsupportedModel(f"transformers has no causal LM for model type {config.model_type!r} in {folder}")
    # The Auto class itself wants a folder to look into even if it is given all weights.
    cls: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    asked = kwargs.pop("output_loading_info", False)
    others = {"dtype": "auto", "ignore_mismatched_sizes": True, **kwargs}  # we say ourselves which differ
    model, about = cls.from_pretrained(None, config=config, state_dict=state, output_loading_info=True, **others)
    if not kwargs.get("ignore_mismatched_sizes"):
        checks.check_shapes(folder, about["mismatched_keys"])
    checks.check_complete(folder, about["missing_keys"], state)
    if generation is not None:
        model.generation_config = generation
    return (model, about) if asked else model


def load_model(folder: Path | str, *, device: str = "cpu") -> Any:
    """A causal LM of transformers in its own dtype, in evaluation mode; integers, packed or as `quantize` writes them, are
    multiplied as they are on the CPU.

    Raises CheckpointError if the folder cannot be read, DeviceError for a device that is not here.
    """
    folder, device = Path(folder), str(checks.device_or_default(device))
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

    if (folder / MANIFEST).exists():
        config, contents = read_json(folder / "config.json", cure="copy the folder again"), read_contents(folder)
    else:
        checkpoint = DequantisedCheckpoint(folder)
        config = checkpoint.config
        contents = ((name, checkpoint.quantized(name) or checkpoint.read(name)) for name in checkpoint.files)
    model = skeleton(config)
    # Where the config states no dtype, transformers takes that of the files.
    stated = config.get("dtype", config.get("torch_dtype")) is not None
    known = {name: tensor for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    for name, content in contents:
        if name not in known:
            return None
        quantised = isinstance(content, QuantizedWeight)
        stored, own = (content.q, content.scale.dtype) if quantised else (content, content.dtype)
        checks.check_shapes(folder, [(name, tuple(stored.shape), tuple(known[name].shape))])
        dtype = known[name].dtype if stated and own.is_floating_point else own
        path = name.rpartition(".")[0]
        module = _packed(content, model.get_submodule(path)) if quantised and own == dtype else None
        if module is not None:
            model.set_submodule(path, module)
        else:
            value = content.dequantized() if quantised else content
            set_module_tensor_to_device(model, name, "cpu", value=value, dtype=dtype)
    _tie(model)
    if (generation := generation_config(folder)) is not None:
        model.generation_config = generation
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
