"""Text from a model, a token at a time: in C++ for Llama-like ones, by transformers' own loop for all others."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from topiarist.core.compiled import NoKernels
from topiarist.core.errors import TopiaristError, UnsupportedModel
from topiarist.models.opened import evaluated
from topiarist.models.positions import limit_of
from topiarist.runtime.decoder import Decoder

CACHE_STEP = 256
"""Caches are made for a multiple of so many tokens, so that texts of like lengths share one."""
COLDEST = 1e-30
"""A temperature below it draws as it does: logits divided by less are no numbers of fp32."""


class Generator:
    """Decodes with a causal LM of transformers, whose linears may be packed (`topiarist.runtime.accelerate`).

    The prompt goes through the model itself. Tokens after it come from a C++ loop with a cache of fixed size, whose
    activations are fp32: a greedy text can differ from transformers' in bf16 where two tokens are as good as equal. Of the
    model's generation config the ends and the padding are heeded, no penalties and no cuts of what is drawn from.
    `reason` says why a model goes through transformers instead; it is empty for those that do not.
    """

    def __init__(self, model: Any) -> None:
        self.model = model.eval()
        self._decoder: Decoder | None = None
        self.reason = ""
        try:
            self._decoder = self._prepare(batch=1, tokens=1)
        except (UnsupportedModel, NoKernels) as error:
            self.reason = str(error)

    def generate(
        self, ids: Int64[Tensor, "batch prompt"], max_new_tokens: int, **options: Any
    ) -> Int64[Tensor, "batch new"]:
        """All tokens that `stream` gives with the same options."""
        new = list(self.stream(ids, max_new_tokens, **options))
        return torch.stack(new, dim=1) if new else ids[:, :0]

    @torch.inference_mode()
    def stream(
        self, ids: Int64[Tensor, "batch prompt"], max_new_tokens: int, *, temperature: float = 0.0, seed: int = 0
    ) -> Iterator[Int64[Tensor, " batch"]]:
        """New tokens as they come, until every text has ended. Several streams may run at a time, each with a cache of its own.

        ids: prompts of one length. temperature: 0 takes the likeliest token, more draws from the softmax of logits divided by
        it. A text that has ended goes on in padding. Raises TopiaristError if the model's positions do not suffice.
        """
        self._check(ids, max_new_tokens, temperature)
        temperature = temperature and max(temperature, COLDEST)
        if self.reason:
            yield from self._stream_by_transformers(ids, max_new_tokens, temperature, seed)
            return
        batch, length = ids.shape
        decoder = self._prepare(batch, length + max_new_tokens)
        draw = torch.Generator().manual_seed(seed)
        ends, padding = self._ends()
        try:
            logits = self._read_prompt(decoder, ids)
            ended = torch.zeros(batch, dtype=torch.bool)
            for position in range(length, length + max_new_tokens):
                drawn = choose(logits, temperature, draw)
                tokens = torch.where(ended, padding, drawn)
                yield tokens
                ended |= torch.isin(tokens, ends)
                if ended.all() or position + 1 == length + max_new_tokens:
                    return
                logits = decoder.step(drawn, position)  # the padding need not have an embedding
        finally:
            self._decoder = decoder

    def _read_prompt(self, decoder: Decoder, ids: Tensor) -> Float[Tensor, "batch vocabulary"]:
        from transformers import DynamicCache

        # Without the config no layer forgets what lies beyond a sliding window; the mask alone hides it.
        cache = DynamicCache()
        with evaluated(self.model):
            out = self.model(ids, **{cache_word(self.model): cache}, use_cache=True, logits_to_keep=1)
        decoder.fill(cache)
        return out.logits[:, -1].float()

    def _prepare(self, batch: int, tokens: int) -> Decoder:
        """A decoder of the model as it is now, with room for so many tokens: the one at hand if it suffices and is free.

        Whoever takes it puts it back.
        """
        decoder, self._decoder = self._decoder, None
        if decoder is None or not decoder.fits(self.model, batch, tokens):
            del decoder  # two caches need not be in memory at once
            decoder = Decoder(self.model, batch=batch, max_tokens=-(-tokens // CACHE_STEP) * CACHE_STEP)
        return decoder

    def _ends(self) -> tuple[Tensor, Tensor]:
        """(tokens that end a text, the padding after it)."""
        config = self.model.generation_config
        ends = config.eos_token_id
        ends = torch.tensor([] if ends is None else ends if isinstance(ends, list) else [ends], dtype=torch.int64)
        padding = config.pad_token_id if config.pad_token_id is not None else ends[0] if len(ends) else 0
        return ends, torch.as_tensor(padding)

    def _check(self, ids: Tensor, max_new_tokens: int, temperature: float) -> None:
        config = self.model.config.get_text_config()
        limit, known = limit_of(config), getattr(config, "vocab_size", None)
        if ids.ndim != 2 or not ids.numel() or max_new_tokens < 1 or not temperature >= 0:
            raise TopiaristError(
                "a prompt needs a token (ids are a row a prompt), max_new_tokens must be at least 1 and temperature at least 0"
            )
        if known is not None and not 0 <= int(ids.min()) <= int(ids.max()) < known:
            raise TopiaristError(
                f"the prompt has token {int(ids.max())}, the model knows 0 to {known - 1}: it is of another tokenizer"
            )
        if limit is not None and ids.shape[1] + max_new_tokens > limit:
            raise TopiaristError(
                f"{ids.shape[1]} tokens of prompt and {max_new_tokens} new ones are more than the model's {limit} positions; "
                "shorten one of them"
            )

    def _stream_by_transformers(self, ids: Tensor, new: int, temperature: float, seed: int) -> Iterator[Tensor]:
        from transformers import GenerationConfig

        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
        own, (ends, padding) = self.model.generation_config, self._ends()
        # Of the model's own nothing but the ends, as in our loop; what else it says would fill in what a call leaves out. It
        # pads with any token that has an embedding: what follows an end is padded here.
        self.model.generation_config = GenerationConfig(eos_token_id=own.eos_token_id, pad_token_id=0)
        try:
            with torch.random.fork_rng(devices=[]), evaluated(self.model):
                torch.manual_seed(seed)
                out = self.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, **sampling)
        finally:
            self.model.generation_config = own
        written = out[:, ids.shape[1] :]
        end = torch.isin(written, ends).int()
        yield from written.masked_fill(end.cumsum(1) > end, int(padding)).unbind(1)


def cache_word(model: Any) -> str:
    """What a model's forward, and its output, call the cache: `cache` from transformers 5.24 on."""
    new, old = "cache", "past_key_values"
    return new if new in inspect.signature(model.forward).parameters else old


def choose(
    logits: Float[Tensor, "batch vocabulary"], temperature: float, draw: torch.Generator
) -> Int64[Tensor, " batch"]:
    """The next token of each text."""
    if temperature == 0:
        return logits.argmax(-1)
    return torch.multinomial(torch.softmax(logits / temperature, -1), 1, generator=draw)[:, 0]
