"""A causal LM without its weights: what the names in a checkpoint stand for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from topiarist.core.errors import CheckpointError
from topiarist.models import building, checks, modeling_pruned


@dataclass(frozen=True)
class Roles:
    """Names of weights: of linears, and of the head and the embeddings, which are not among those."""

    linears: frozenset[str] = field(default_factory=frozenset)
    heads: frozenset[str] = field(default_factory=frozenset)


def skeleton(config: dict[str, Any]) -> Any:
    """The model of a config.json with parameters that take no memory, each of the dtype in which transformers loads it.

    Its buffers are real.

    Raises CheckpointError if transformers knows no such causal LM.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    modeling_pruned.register(config)
    try:
        settings = AutoConfig.for_model(**config)
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(settings, dtype=settings.dtype).eval()
    except Exception as error:  # configurations are checked by several libraries, each with errors of its own
        why = checks.why_unbuilt(config, error)[:300]
        raise CheckpointError(f"transformers cannot build a model from this config.json: {why}") from error
    building.keep_in_fp32(model, model.dtype)
    return model


def roles(config: dict[str, Any]) -> Roles:
    """What the 2-D weights of a model are.

    A weight that transformers renames while loading goes by another name here, so nobody finds it, and it stays as it is.
    """
    model = skeleton(config)
    around = [model.get_input_embeddings(), model.get_output_embeddings()]
    names = {module: f"{name}.weight" for name, module in model.named_modules()}
    heads = frozenset(names[module] for module in around if module is not None)
    return Roles(frozenset(name for m, name in names.items() if type(m) is nn.Linear and name not in heads), heads)
