"""Llama-like models as the C++ decoder takes them: which ones it knows, and where their weights lie in memory."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from topiarist.core.errors import UnsupportedModel
from topiarist.models.modeling_pruned import PREFIX, Absent
from topiarist.runtime.build import FORMS, TYPES, Weight, load_kernels, whole_indices
from topiarist.runtime.linear import PackedLinear, QuantisedEmbedding

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma")
STATIC_ROPE = ("default", "linear", "llama3", "yarn")
"""Kinds of rotary embeddings whose angles depend on the position alone, not on the text's length."""

_LONG, _FLOAT, _INT, _POINTER = ctypes.c_int64, ctypes.c_float, ctypes.c_int32, ctypes.c_void_p
_MATRICES = ("query", "key", "value", "output", "gate", "up", "down")
_NORMS = ("input_norm", "feed_forward_norm", "query_norm", "key_norm")


class _Block(ctypes.Structure):
    _fields_ = (
        *((name, Weight) for name in _MATRICES),
        *((name, _POINTER) for name in (*_NORMS, "keys", "values")),
        *((name, _LONG) for name in ("window", "heads", "kv_heads", "feed_forward")),
    )


class _Decoder(ctypes.Structure):
    _fields_ = (
        *((name, _LONG) for name in ("num_blocks", "hidden", "head_dim", "rotary_dim", "max_tokens")),
        *((name, _LONG) for name in ("most_heads", "most_kv_heads", "most_feed_forward")),
        *((name, _FLOAT) for name in ("epsilon", "attention_scale", "embedding_scale")),
        *((name, _INT) for name in ("activation", "level", "threads")),
        *((name, _POINTER) for name in ("cosines", "sines", "blocks", "norm")),
        ("embedding", Weight),
        ("head", Weight),
    )


class Decoder:
    """A causal LM whose steps after the prompt run in C++, in fp32 but for the weights, on a cache of fixed size.

    Layers of different size, and removed ones, are taken as they are. Raises UnsupportedModel, naming what does not fit,
    for a model that is not Llama-like; and NoKernels without a compiler.

    batch: sequences a step. max_tokens: tokens of a sequence that the cache has room for, prompt included.
    """

    def __init__(self, model: Any, *, batch: int, max_tokens: int) -> None:
        self.kernels = load_kernels()
        self.max_tokens = max_tokens
        self._state = _state(model)
        self._kept: list[Any] = []  # tensors whose addresses the structures hold
        _check(model)
        config, body = model.config, model.model
        num_blocks = len(body.layers)
        self._blocks = (_Block * num_blocks)()
        shape = (batch, max_tokens, _head_dim(body))
        self.caches = [self._describe(self._blocks[i], block, config, shape) for i, block in enumerate(body.layers)]
        cosines, sines = (self._keep(part) for part in _angles(body, max_tokens))
        first = next((block.self_attn for block in body.layers if not isinstance(block.self_attn, Absent)), None)
        scale = getattr(body.embed_tokens, "embed_scale", None)
        self._decoder = _Decoder(
            num_blocks=num_blocks,
            hidden=body.norm.weight.numel(),
            head_dim=shape[-1],
            rotary_dim=cosines.shape[1],
            max_tokens=max_tokens,
            most_heads=max(block.heads for block in self._blocks),
            most_kv_heads=max(block.kv_heads for block in self._blocks),
            most_feed_forward=max(block.feed_forward for block in self._blocks),
            epsilon=_epsilon(body.norm),
            attention_scale=1.0 if first is None else first.scaling,
            embedding_scale=1.0 if scale is None else float(scale.to(model.dtype)),
            activation=_activation(body),
            level=self.kernels.level,
            threads=torch.get_num_threads() if self.kernels.threaded else 1,
            cosines=cosines.data_ptr(),
            sines=sines.data_ptr(),
            blocks=ctypes.addressof(self._blocks),
            norm=self._norm(body.norm),
            embedding=self._matrix(body.embed_tokens),
            head=self._matrix(model.lm_head),
        )
        size = self.kernels.code.topiarist_workspace_size(ctypes.byref(self._decoder), batch)
        self._workspace = torch.empty(size)
        self.logits = torch.empty(batch, model.lm_head.out_features)

    def step(self, tokens: Int64[Tensor, " batch"], position: int) -> Float[Tensor, "batch vocabulary"]:
        """Logits after one more token of each sequence, all at `position`; overwritten by the next step.

        Raises IndexError for a token that has no embedding, or a position beyond the cache.
        """
        if not 0 <= position < self.max_tokens or len(tokens) != len(self.logits):
            raise IndexError(
                f"{len(tokens)} tokens at position {position}: the cache is for {len(self.logits)} sequences of "
                f"{self.max_tokens} tokens"
            )
        tokens = whole_indices(tokens, self._decoder.embedding.rows)
        self.kernels.code.topiarist_step(
            ctypes.byref(self._decoder), tokens.data_ptr(), tokens.numel(), position, self._workspace.data_ptr(),
            self.logits.data_ptr(),
        )  # fmt: skip
        return self.logits

    def fits(self, model: Any, batch: int, tokens: int) -> bool:
        """Whether it computes what `model` does now, for so many sequences of at most so many tokens."""
        return len(self.logits) == batch and tokens <= self.max_tokens and self._state == _state(model)

    def fill(self, cache: Any) -> None:
        """Take over the keys and values that transformers computed for a prompt."""
        for own, layer in zip(self.caches, cache.layers, strict=True):
            if own is not None:
                length = layer.keys.shape[2]
                own[0][:, :, :length] = layer.keys
                own[1][:, :, :length] = layer.values

    def _describe(
        self, out: _Block, block: Any, config: Any, shape: tuple[int, int, int]
    ) -> tuple[Tensor, Tensor] | None:
        """Fill in one block; returns its keys and values, None where attention was removed."""
        batch, max_tokens, dim = shape
        attention, feed_forward = block.self_attn, block.mlp
        cache = None
        if not isinstance(attention, Absent):
            for name in ("query", "key", "value", "output"):
                setattr(out, name, self._matrix(getattr(attention, f"{name[0]}_proj")))
            out.heads, out.kv_heads = out.query.rows // dim, out.key.rows // dim
            out.input_norm = self._norm(block.input_layernorm)
            if hasattr(attention, "q_norm"):
                out.query_norm, out.key_norm = self._norm(attention.q_norm), self._norm(attention.k_norm)
            own = getattr(attention, "sliding_window", None)
            out.window = (own if hasattr(attention, "sliding_window") else getattr(config, "sliding_window", None)) or 0
            keys, values = (self._keep(torch.zeros(batch, out.kv_heads, max_tokens, dim)) for _ in range(2))
            out.keys, out.values = keys.data_ptr(), values.data_ptr()
            cache = (keys, values)
        if not isinstance(feed_forward, Absent):
            for name in ("gate", "up", "down"):
                setattr(out, name, self._matrix(getattr(feed_forward, f"{name}_proj")))
            out.feed_forward = out.gate.rows
            out.feed_forward_norm = self._norm(block.post_attention_layernorm)
        return cache

    def _matrix(self, module: nn.Module) -> Weight:
        if isinstance(module, QuantisedEmbedding):
            module = module.table
        self._keep((module, *module.parameters(), *module.buffers()))  # the model may get others
        if isinstance(module, PackedLinear):
            return module.described()
        weight: Tensor = module.weight.detach()  # pyright: ignore[reportCallIssue]
        if type(module) not in (nn.Linear, nn.Embedding) and not isinstance(module, nn.Embedding):
            raise UnsupportedModel(f"the decoder knows no {type(module).__name__}")
        if weight.dtype not in TYPES or weight.device.type != "cpu" or not weight.is_contiguous():
            raise UnsupportedModel(f"the decoder knows no weights of {weight.dtype} on {weight.device}")
        out = Weight(rows=weight.shape[0], cols=weight.shape[1], type=TYPES[weight.dtype], form=FORMS["full"])
        out.values = weight.data_ptr()
        bias = getattr(module, "bias", None)
        if bias is not None:
            out.bias, out.bias_type = bias.data_ptr(), TYPES[bias.dtype]
        return out

    def _norm(self, norm: Any) -> int:
        """Address of a norm's factors in fp32; Gemma's are stored less one."""
        weight = norm.weight.detach().float()
        return self._keep(1 + weight if "Gemma" in type(norm).__name__ else weight.clone()).data_ptr()

    def _keep(self, thing: Any) -> Any:
        self._kept.append(thing)
        return thing


def _state(model: Any) -> list[tuple[int, int]]:
    """Where all weights of a model lie, and how often each was changed in place."""
    tensors = (*model.parameters(), *model.buffers())
    return [(tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version) for tensor in tensors]


def _check(model: Any) -> None:
    family = str(model.config.model_type).removeprefix(PREFIX)
    if family not in FAMILIES or not hasattr(model.model, "layers"):  # peft puts a model around them
        found = type(model).__name__ if family in FAMILIES else family
        raise UnsupportedModel(f"the decoder knows {', '.join(FAMILIES)}, and not {found}")
    rope = (getattr(model.config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope not in STATIC_ROPE:
        raise UnsupportedModel(f"the decoder knows no rotary embeddings of kind {rope!r}")
    for block in model.model.layers:
        norms = {block.self_attn: block.input_layernorm, block.mlp: block.post_attention_layernorm}
        gone = {norm for sublayer, norm in norms.items() if isinstance(sublayer, Absent)}  # they go with it
        if any(
            module.kind == "inside" for module in block.modules() if isinstance(module, Absent) and module not in gone
        ):
            raise UnsupportedModel("the decoder knows no layer whose inside was removed")


def _head_dim(body: Any) -> int:
    return next((b.self_attn.head_dim for b in body.layers if not isinstance(b.self_attn, Absent)), 2)


def _angles(body: Any, max_tokens: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines (max_tokens, rotary_dim) of every position, by the model's own module."""
    cosines, sines = body.rotary_emb(torch.zeros(1, 1), torch.arange(max_tokens)[None])
    return cosines[0].float().contiguous(), sines[0].float().contiguous()


def _epsilon(norm: Any) -> float:
    return norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps


def _activation(body: Any) -> int:
    """The decoder's code of a feed-forward layer's activation, recognised by its values."""
    x = torch.linspace(-6, 6, 49)
    function = next((block.mlp.act_fn for block in body.layers if not isinstance(block.mlp, Absent)), F.silu)
    for code, known in enumerate((F.silu(x), F.gelu(x, approximate="tanh"))):
        if torch.allclose(function(x), known, atol=1e-6):
            return code
    raise UnsupportedModel(f"the decoder knows no activation {type(function).__name__}")
