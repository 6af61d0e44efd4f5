"""A model without memory from a folder's config: the class that its files were saved from, and its dtypes."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn

from topiarist.checkpoints.reading import Checkpoint
from topiarist.core.errors import CheckpointError, TopiaristError, UnsupportedModel, first_line
from topiarist.models import checks, modeling_pruned


def without_memory(checkpoint: Checkpoint, trust_remote_code: bool) -> Any:
    """The model of a folder, its parameters and stored buffers on the meta device, buffers that are computed in memory.

    Raises UnsupportedModel if it needs code of its own and may not run it, CheckpointError if transformers cannot build it.
    """
    import transformers
    from accelerate import init_empty_weights

    modeling_pruned.register(checkpoint.config)
    try:
        config = transformers.AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=trust_remote_code)
        if "tie_word_embeddings" in checkpoint.config:
            config.tie_word_embeddings = checkpoint.config["tie_word_embeddings"]
            text = config.get_text_config(decoder=True)
            # The decoder of an encoder-decoder is tied as its own config says.
            if text is not config and not getattr(config, "is_encoder_decoder", False):
                text.tie_word_embeddings = config.tie_word_embeddings
        if hasattr(config, "quantization_config"):
            delattr(config, "quantization_config")  # the weights are given as what they stand for
        config.return_dict = True  # outputs are read by name, whatever the config asks for
        checks.usable_attention(config)
        with init_empty_weights(include_buffers=False):
            model = _build(checkpoint, config, trust_remote_code)
    except TopiaristError:
        raise
    except Exception as error:  # configurations are checked by several libraries, each with errors of its own
        if checks.needs_remote_code(error) and not trust_remote_code:
            raise checks.remote_code_error(checkpoint.folder) from error
        why = checks.why_unbuilt(checkpoint.config, error)
        raise CheckpointError(
            f"transformers {transformers.__version__} cannot build a model from {checkpoint.folder}: {why}"
        ) from error
    keep_in_fp32(model, checkpoint.dtype())
    return model.eval().requires_grad_(False)


REFUSALS = (
    StrictDataclassError, ValueError, TypeError, ArithmeticError, LookupError, AttributeError, RuntimeError, AssertionError,
)  # fmt: skip
"""What configs and modelling code raise for numbers that they cannot hold."""


def rebuilt(model: Any, config: Any, *, dtype: torch.dtype | None = None, buffers: bool = True) -> Any:
    """A model of another config without memory, of the same class, or of the type that the config names.

    buffers: whether those that are computed are without memory too. Raises one of `REFUSALS`.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    same = config.model_type == model.config.model_type
    build = type(model)._from_config if same else AutoModelForCausalLM.from_config
    with init_empty_weights(include_buffers=buffers):
        return build(config, dtype=dtype)


def _build(checkpoint: Checkpoint, config: Any, trust_remote_code: bool) -> Any:
    import transformers
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto import modeling_auto as auto

    dtype = checkpoint.dtype()
    known: set[str] = set()
    usual: set[str] = set()
    for mapping in (auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES):
        for kind, names in mapping.items():
            classes = [names] if isinstance(names, str) else names
            known.update(classes)
            usual.update(classes if kind == config.model_type else ())
    stated = next(iter(checkpoint.config.get("architectures") or ()), None)
    if stated in known and not (trust_remote_code and "auto_map" in checkpoint.config):
        stated_class = getattr(transformers, str(stated))
        if stated not in usual and not isinstance(config, stated_class.config_class):
            raise CheckpointError(
                f"config.json says model_type {config.model_type!r} and the architecture {stated}, which is of another type: "
                "correct the one that is wrong"
            )
        return stated_class._from_config(config, dtype=dtype)
    try:
        return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    except ValueError as error:
        if "Unrecognized configuration class" not in str(error):
            raise
    try:
        return AutoModelForImageTextToText.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    except ValueError as error:
        if "Unrecognized configuration class" not in str(error):
            raise
        both = ", it is an encoder-decoder" if getattr(config, "is_encoder_decoder", False) else ""
        raise UnsupportedModel(
            f"transformers has no causal language model of type {config.model_type!r}{both}: prune its modules with "
            "prune_module"
        ) from None


def keep_in_fp32(model: Any, dtype: torch.dtype) -> None:
    """Parameters that transformers would load in fp32 whatever the model's dtype are fp32 here too."""
    plan = model._get_dtype_plan(dtype) if hasattr(model, "_get_dtype_plan") else {}
    if not plan:
        return
    from transformers.core_model_loading import build_glob_alternation

    wide = build_glob_alternation(list(plan))[0]
    for name, tensor in model.state_dict(keep_vars=True).items():
        if wide.search(name) and tensor.is_floating_point():
            path, _, leaf = name.rpartition(".")
            module = model.get_submodule(path)
            if leaf in module._buffers:
                module._buffers[leaf] = tensor.float()
            else:
                module._parameters[leaf] = nn.Parameter(tensor.detach().float(), requires_grad=False)


def generation_config(folder: Path) -> Any | None:
    """That of a folder, or None. Raises CheckpointError for a damaged one."""
    import transformers

    path = folder / "generation_config.json"
    if not path.is_file():
        return None
    try:
        return transformers.GenerationConfig.from_pretrained(folder)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged ({first_line(error)}); copy it again, or remove it") from error


def restore_computed(model: Any, built: Any) -> None:
    """Give a loaded model the tensors that its code computes and no file holds, from the same model as it was built.

    transformers loads into a model without memory and lets `_init_weights` compute them again. Code that a folder brings
    along may compute them in its constructor alone, and would run on whatever is in memory.
    """
    for name, module in built.named_modules():
        loaded = model.get_submodule(name)
        computed = {key: module._buffers[key] for key in module._non_persistent_buffers_set}
        computed |= {key: value for key, value in vars(module).items() if isinstance(value, Tensor)}
        for key, value in computed.items():
            if value is not None and not value.is_meta:
                setattr(loaded, key, value.clone())


def untied_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of a model whose head is no copy of its embeddings."""
    untied = {**config, "tie_word_embeddings": False}
    for key, value in config.items():
        if isinstance(value, Mapping) and "tie_word_embeddings" in value:
            untied[key] = {**value, "tie_word_embeddings": False}
    return untied


def optional_names(model: Any) -> Callable[[str], bool]:
    """Whether the files may lack a parameter, as the model's class says."""
    patterns = [re.compile(pattern) for pattern in getattr(model, "_keys_to_ignore_on_load_missing", None) or ()]
    return lambda name: any(pattern.search(name) for pattern in patterns)
