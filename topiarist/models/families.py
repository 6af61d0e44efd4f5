"""A Hugging Face causal language model seen as blocks of prunable matrices. Families are rows of data.

Nothing here forks modelling code: blocks and matrices are found by type (derive.py). A row says only what cannot be seen
from the modules themselves, and structural pruning alone needs one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import torch
from jaxtyping import Float
from torch import Tensor, nn


@dataclass(frozen=True)
class Attention:
    """Where the attention of a block is. Matrices are named relative to `module`, itself relative to the block."""

    module: str = "self_attn"
    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    """Three matrices, or the one that holds all three."""
    out: str = "o_proj"
    interleaved: bool = False
    """In the one matrix q, k and v of a head stand together, instead of all q before all k before all v."""
    norm: str = ""
    """The norm that this sublayer alone reads through, where there is one: it leaves with the sublayer."""

    @property
    def values(self) -> frozenset[str]:
        """The name, in the block, of the matrix of values; none where it is part of another."""
        return frozenset({f"{self.module}.{self.qkv[2]}"} if len(self.qkv) == 3 else ())


@dataclass(frozen=True)
class FeedForward:
    """Where a block's feed-forward network is: down(act(gate) * up), or down(act(up)) without a gate. Names are relative to
    the block, and its own activation is used: what the config chose is what runs.
    """

    first: tuple[str, ...]
    """The matrices that read its input, gate above up; one name if they are stored as one matrix."""
    down: str
    activation: str
    gated: bool = True
    width: str = "intermediate_size"
    """What the config calls the number of its channels."""


@dataclass(frozen=True)
class Family:
    """What topiarist knows about one `model_type`. What can be seen from the modules is derived (derive.py) where a row is
    silent; what a row says of it stands.
    """

    blocks: str = ""
    """Path of the list of decoder blocks inside the causal LM."""
    dense: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    """What of a block is never pruned, by its name in the block, and why."""
    experts: Mapping[str, bool] = field(default_factory=lambda: MappingProxyType({}))
    """Fused 3-D parameters of a block, and whether they are stored (expert, in, out) instead of (expert, out, in)."""
    feed_forward: tuple[FeedForward, ...] = ()
    """Where its feed-forward network is, in every kind of block it has; experts are not meant."""
    attention: Attention = Attention()
    ffn: tuple[str, ...] = ("mlp",)
    """Modules of the feed-forward sublayer, experts and all, and a norm that is its alone; the output of the last is what it
    adds to the hidden states."""
    relabel: str | None = None
    """A model type of the same function whose config accepts head counts that this one's refuses."""

    def sublayer(self, kind: str) -> tuple[str, ...]:
        """Modules of a block's `attention` or `ffn`; the last one's output is what the sublayer adds to the hidden states."""
        return self.ffn if kind == "ffn" else tuple(filter(None, (self.attention.norm, self.attention.module)))


_GATED = FeedForward(("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj", "mlp.act_fn")
_GPT2 = FeedForward(("mlp.c_fc",), "mlp.c_proj", "mlp.act", gated=False)
_LLAMA_LIKE = Family(feed_forward=(_GATED,))
_PRE_NORM = Family(
    feed_forward=(_GATED,), attention=Attention(norm="input_layernorm"), ffn=("post_attention_layernorm", "mlp")
)
_SHARED_EXPERT = FeedForward(
    ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"),
    "mlp.shared_expert.down_proj",
    "mlp.shared_expert.act_fn",
    width="shared_expert_intermediate_size",
)

FAMILIES: dict[str, Family] = {
    "llama": replace(_PRE_NORM, relabel="mistral"),
    "mistral": _PRE_NORM,
    "ministral": _PRE_NORM,
    "qwen2": _PRE_NORM,
    "qwen3": _PRE_NORM,
    "gemma": _PRE_NORM,
    "gemma2": _LLAMA_LIKE,
    "gemma3_text": _LLAMA_LIKE,
    "phi3": Family(
        attention=Attention(qkv=("qkv_proj",)),
        feed_forward=(FeedForward(("mlp.gate_up_proj",), "mlp.down_proj", "mlp.activation_fn"),),
    ),
    "olmo2": _LLAMA_LIKE,
    "granite": _PRE_NORM,
    "smollm3": _PRE_NORM,
    "starcoder2": Family(feed_forward=(_GPT2,)),
    "cohere": _LLAMA_LIKE,
    "stablelm": _LLAMA_LIKE,
    "opt": Family(
        attention=Attention(out="out_proj"),
        feed_forward=(FeedForward(("fc1",), "fc2", "activation_fn", gated=False, width="ffn_dim"),),
        ffn=("fc1", "fc2"),
    ),
    "gpt2": Family(
        attention=Attention("attn", ("c_attn",), "c_proj"),
        feed_forward=(replace(_GPT2, width="n_inner"),),
    ),
    "gpt_neox": Family(
        attention=Attention("attention", ("query_key_value",), "dense", interleaved=True),
        feed_forward=(FeedForward(("mlp.dense_h_to_4h",), "mlp.dense_4h_to_h", "mlp.act", gated=False),),
    ),
    "mixtral": Family(),
    "qwen2_moe": Family(feed_forward=(_GATED, _SHARED_EXPERT)),
    "qwen3_moe": _LLAMA_LIKE,
    "olmoe": _LLAMA_LIKE,
}


@dataclass(frozen=True, eq=False)
class Matrix:
    """One prunable matrix: a Linear, a transposed Conv1D, or one expert's slice of a fused 3-D parameter."""

    name: str
    module: nn.Module
    parameter: str = "weight"
    transposed: bool = False
    expert: int | None = None

    @property
    def tensor(self) -> Tensor:
        """The stored tensor or its slice, as the module holds it, outside autograd."""
        stored = getattr(self.module, self.parameter).detach()
        return stored if self.expert is None else stored[self.expert]

    @property
    def weight(self) -> Float[Tensor, "out in"]:
        """View of the weight as (out, in)."""
        return self.tensor.t() if self.transposed else self.tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in), however the tensor is stored."""
        out_features, in_features = self.weight.shape
        return out_features, in_features

    @property
    def path(self) -> str:
        """Name of the stored parameter in the block."""
        return f"{self.name}.{self.parameter}" if self.expert is None else self.name.rpartition(".")[0]

    @property
    def is_plain(self) -> bool:
        """Whether its module only multiplies by the weight and adds a bias: no experts, no grouped rows."""
        kind = type(self.module)
        return self.expert is None and (kind.forward is nn.Linear.forward or kind.__name__ == "Conv1D")

    @torch.no_grad()
    def assign(self, weight: Float[Tensor, "out in"]) -> None:
        """Overwrite the weight in place."""
        self.weight.copy_(weight)

    @property
    def stage(self) -> str:
        """Matrices of one stage see their inputs at one point of the forward: all experts of a fused parameter do."""
        return self.name.rsplit(".", 1)[0] if self.expert is not None else self.name


def matrices_of(block: nn.Module, family: Family | None = None) -> list[Matrix]:
    """Every prunable matrix of a block, in module order; names are relative to the block.

    family: the block's model's; without it every linear layer of any module counts.
    """
    family = family or Family()
    found: list[Matrix] = []
    for name, module in block.named_modules():
        if name in family.dense:
            continue
        if isinstance(module, nn.Linear):
            found.append(Matrix(name, module))
        elif type(module).__name__ == "Conv1D":  # transformers' GPT-2 layer: weight is (in, out)
            found.append(Matrix(name, module, transposed=True))
    for fused, transposed in family.experts.items():
        path, parameter = fused.rpartition(".")[::2]
        try:
            experts = block.get_submodule(path)
        except AttributeError:  # a dense block of a mixed model
            continue
        stacked = getattr(experts, parameter, None)
        if isinstance(stacked, Tensor) and stacked.ndim == 3:
            count = stacked.shape[0]
            found += [Matrix(f"{fused}.{e}", experts, parameter, transposed, expert=e) for e in range(count)]
    return found


def block_names(model: nn.Module, family: Family) -> list[str]:
    """Full names of the decoder blocks, first to last."""
    return [f"{family.blocks}.{i}" for i in range(len(model.get_submodule(family.blocks)))]  # pyright: ignore[reportArgumentType]
