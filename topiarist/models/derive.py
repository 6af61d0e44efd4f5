"""What can be seen from the modules of any model: its decoder blocks, its experts, and what of a block stays dense.

Only what cannot be seen stands in a row of `FAMILIES`. `make sweep` tries
the rules on every type that transformers knows, and writes
docs/reference/architectures.md.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from typing import Any

from jaxtyping import Int
from torch import Tensor, nn

from topiarist.core.errors import UnsupportedModel
from topiarist.models.families import FAMILIES, Family

ROUTER = "a router"
GATE = "a gate of few outputs"
THROUGH_WEIGHT = "multiplied by the block itself, not called"
OUTSIDE = "a parameter of no linear layer"

_TOWER = re.compile(
    r"(^|[._])(vision|visual|image|audio|speech|encoder|qformer|abstractor|patcher|vqmodel|protein|video|mtp)"
)
_OTHER_INPUT = re.compile(r"vision|visual|image|audio|speech|video")
_BLOCK_CLASS = re.compile(r"(Layer|Block)$")
_ROUTER_CLASS = re.compile(r"Router|TopK|M[oO]EGate$|MoeGate$")
_ROUTER_NAME = re.compile(r"(^|\.)(gate|wg|classifier|\w*router|\w*experts?_gate)$")
_HEADS = re.compile(r"(^|_)(num|n)_(\w+_)?heads?$|^n_head$")
_WEIGHT_USED = re.compile(r"self\.(\w+)\.weight\b(?!\s*\.\s*(dtype|device|shape|size|is_\w+|ndim|numel|data_ptr)\b)")
_TRANSPOSED = {"Llama4TextExperts", "AriaGroupedExpertsGemm"}
"""Classes whose experts are stored (in, out) and do not say so by `is_transposed`."""
_CAUSAL_BY: dict[str, tuple[str, Any]] = {"xlm": ("causal", True), "xlnet": ("attn_type", "uni")}
"""What makes a type with tokens that see the later ones predict the next; of BERT and its kin it is `is_decoder`."""
_NEVER_CAUSAL = {"cpmant"}
"""Types whose forward takes a whole text for a context that is known from its beginning to its end."""


def family_of(model: Any) -> Family:
    """All that is known of a model: its row, and what its modules show.

    model: a causal language model; its parameters may be without memory.
    Raises UnsupportedModel if no list of decoder blocks can be found.
    """
    model_type = str(getattr(getattr(model, "config", None), "model_type", type(model).__name__))
    row = FAMILIES.get(model_type.removeprefix("pruned_"), Family())
    path = row.blocks or decoder_blocks(model)
    dense: dict[str, str] = {}
    experts: dict[str, bool] = {}
    few = _few(model)
    for block in model.get_submodule(path):
        for name, reason in _dense_parts(block, few):
            dense.setdefault(name, reason)
        experts.update(_fused_experts(block))
    return replace(row, blocks=path, dense={**dense, **row.dense}, experts={**experts, **row.experts})


def structure_of(model: Any) -> Family:
    """The family of a model whose parts are known by a row, as cutting its width needs.

    Raises UnsupportedModel without one.
    """
    if not has_row(model):
        raise UnsupportedModel(
            f"where the parts of model type {model.config.model_type!r} lie is not known: say so in a row of "
            "topiarist.models.FAMILIES, or choose other --units"
        )
    return family_of(model)


def has_row(model: Any) -> bool:
    """Whether a row of `FAMILIES` says where heads and channels of the model's type lie."""
    return str(model.config.model_type).removeprefix("pruned_") in FAMILIES


def decoder_blocks(model: Any) -> str:
    """Path of the list of decoder blocks: the largest outermost one below the decoder that is no tower's."""
    lists = block_lists(model)
    root = _decoder_path(model)
    inside = [name for name in lists if not root or name == root or name.startswith(root + ".")]
    plain = [name for name in inside if not _TOWER.search(name[len(root) :])]
    text = [name for name in inside if not _OTHER_INPUT.search(name[len(root) :])]  # a decoder may be called an encoder
    chosen = plain or text or inside or lists
    if not chosen:
        config = getattr(model, "config", None)
        if getattr(config, "num_hidden_layers", None) == 0:
            raise UnsupportedModel(
                "the model has no decoder blocks, for its config says num_hidden_layers 0: there is nothing to prune"
            )
        kind = getattr(config, "model_type", type(model).__name__)
        raise UnsupportedModel(
            f"no list of decoder blocks in model type {kind!r}: name it in a row of topiarist.models.FAMILIES "
            "(Family(blocks='path.of.the.list')), or prune its modules with prune_module"
        )
    return chosen[0]


def block_lists(model: Any) -> list[str]:
    """Outermost lists of layers, the one with most weights first."""
    kinds = set(getattr(model, "_no_split_modules", None) or ())
    found: list[tuple[int, str]] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or not len(module):
            continue
        if any(name.startswith(path + ".") for _, path in found):
            continue
        if all(_is_block(child) or type(child).__name__ in kinds for child in module):
            found.append((-sum(p.numel() for p in module.parameters()), name))
    return [name for _, name in sorted(found, key=lambda one: one[0])]


def base_model(model: Any) -> Any:
    """The model without its head: what turns token ids into hidden states."""
    for name in (getattr(model, "base_model_prefix", ""), "model", "transformer"):
        if name and isinstance(getattr(model, name, None), nn.Module):
            return getattr(model, name)
    return model.get_decoder() if hasattr(model, "get_decoder") and not has_encoder(model) else model


def has_encoder(model: Any) -> bool:
    """Whether the decoder reads what an encoder makes of other tokens."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def check_has_text_loss(model: Any, what: str) -> None:
    """Raise UnsupportedModel for a model that has no next-token loss on text by itself.

    That is an encoder-decoder, and a model whose tokens see the later ones. what: the work that needs the loss.
    """
    if has_encoder(model):
        raise UnsupportedModel(
            f"{what} needs the loss of text by itself, and model type {model.config.model_type!r} is an encoder-decoder: "
            "prune its decoder one-shot, or quantise it"
        )
    if reason := sees_later_tokens(model):
        raise UnsupportedModel(f"{what} needs a model that predicts the next token, and {reason}")


def sees_later_tokens(model: Any) -> str:
    """Why every token of a model sees the later ones, as in an encoder, with the cure; empty if none does."""
    config = getattr(model, "config", None)
    model_type = str(getattr(config, "model_type", ""))
    seen = f"every token of this {model_type} sees the later ones"
    if model_type in _NEVER_CAUSAL:
        return f"{seen}, whatever its config.json says"
    key, causal = _CAUSAL_BY.get(model_type, ("is_decoder", True))
    given = getattr(config, key, causal)
    if given == causal or (key == "is_decoder" and not _reads_is_decoder(model)):
        return ""
    return f"by {key} {json.dumps(given)} in config.json {seen}: set {key} to {json.dumps(causal)} there"


def _reads_is_decoder(model: Any) -> bool:
    """Whether a model's class turns into a decoder by that word, as BERT and its kin do; all others have it unread."""
    try:
        return "config.is_decoder" in inspect.getsource(type(model.base_model))
    except (OSError, TypeError, AttributeError):
        return False


def text_inputs(model: Any, tokens: Int[Tensor, "batch window"]) -> dict[str, Any]:
    """Arguments of the base model's forward for text. The encoder of an encoder-decoder reads the same tokens."""
    return {"input_ids": tokens, "use_cache": False} | ({"decoder_input_ids": tokens} if has_encoder(model) else {})


def is_tower(name: str, blocks: str, pattern: re.Pattern[str] = _TOWER) -> bool:
    """Whether a parameter is that of another input than text: one of a tower, beside the decoder that holds `blocks`."""
    parts, beside = name.split("."), blocks.split(".")
    common = next((i for i, (a, b) in enumerate(zip(parts, beside, strict=False)) if a != b), 0)
    return pattern.search(".".join(parts[common:])) is not None


def is_unread(model: Any, name: str, blocks: str) -> bool:
    """Whether a parameter beside the decoder's blocks plays no part where the input is text; an encoder of text does."""
    return is_tower(name, blocks, _OTHER_INPUT if has_encoder(model) else _TOWER)


def is_transposed(module: Any) -> bool:
    """Whether a module of fused experts stores them (expert, in, out)."""
    stated = getattr(module, "is_transposed", None)
    return type(module).__name__ in _TRANSPOSED if stated is None else bool(stated)


def _is_block(module: nn.Module) -> bool:
    from transformers.modeling_layers import GradientCheckpointingLayer

    return isinstance(module, GradientCheckpointingLayer) or _BLOCK_CLASS.search(type(module).__name__) is not None


def _decoder_path(model: Any) -> str:
    try:
        decoder = model.get_decoder()
    except (AttributeError, NotImplementedError):
        decoder = None
    if decoder is None or decoder is model:
        decoder = getattr(model, getattr(model, "base_model_prefix", "") or "", model)
    return next((name for name, module in model.named_modules() if module is decoder), "")


def _few(model: Any) -> int:
    """The largest number of heads that the config names: a linear layer of no more outputs gates them."""
    config = getattr(model, "config", None)
    config = (
        config.get_text_config(decoder=True) if config is not None and hasattr(config, "get_text_config") else config
    )
    counts = [v for k, v in vars(config or object).items() if _HEADS.search(k) and isinstance(v, int)]
    return max(counts, default=1)


def _dense_parts(block: nn.Module, few: int) -> Iterator[tuple[str, str]]:
    """(name in the block, reason) of what is not pruned: linear layers, and parameters of two or more axes outside them."""
    modules = dict(block.named_modules())
    for name, module in modules.items():
        parent = modules.get(name.rpartition(".")[0]) if name else None
        if isinstance(module, nn.Linear):
            routing = any(_ROUTER_CLASS.search(type(m).__name__) for m in (module, parent))
            if routing or _ROUTER_NAME.search(name):
                yield name, ROUTER
            elif module.out_features <= few:
                yield name, GATE
            elif parent is not None and name.rpartition(".")[2] in _used_through_weight(type(parent)):
                yield name, THROUGH_WEIGHT
        elif not _holds_vectors(module):
            router = _ROUTER_CLASS.search(type(module).__name__)
            for key, parameter in module._parameters.items():
                path = f"{name}.{key}" if name else key
                if parameter is None or parameter.ndim < 2 or "bias" in key or _is_fused(name, module, parameter):
                    continue
                yield path, ROUTER if router or _ROUTER_NAME.search(name) else OUTSIDE


def _holds_vectors(module: nn.Module) -> bool:
    """Convolutions, embeddings and norms: they hold no matrix that could be pruned."""
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)
    return isinstance(module, kinds) or type(module).__name__ == "Conv1D" or "Norm" in type(module).__name__


def _fused_experts(block: nn.Module) -> dict[str, bool]:
    """Parameters (expert, ..., ...) of a block by name, and whether they are stored (expert, in, out)."""
    return {
        f"{name}.{key}": is_transposed(module)
        for name, module in block.named_modules()
        for key, parameter in module._parameters.items()
        if parameter is not None and "bias" not in key and _is_fused(name, module, parameter)
    }


def _is_fused(name: str, module: nn.Module, parameter: Tensor) -> bool:
    if parameter.ndim != 3 or isinstance(module, nn.Conv1d):
        return False
    return hasattr(module, "has_gate") or "xpert" in type(module).__name__ or "xpert" in name


@lru_cache(maxsize=512)
def _used_through_weight(kind: type) -> frozenset[str]:
    """Attributes of a class that its own code never calls but whose `.weight` it multiplies by: no input is ever seen."""
    code = ""
    for name, function in vars(kind).items():
        if inspect.isfunction(function) and name != "_init_weights":
            try:
                code += inspect.getsource(function)
            except (OSError, TypeError):  # code without a file
                continue
    used = {match.group(1) for match in _WEIGHT_USED.finditer(code)}
    return frozenset(name for name in used if not re.search(rf"self\.{name}\(", code))
