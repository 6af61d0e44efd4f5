"""The tokenizer of a model folder as GGUF stores it: byte-level BPE, or SentencePiece's BPE with bytes to fall back on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from topiarist.checkpoints.reading import read_json
from topiarist.core.errors import CheckpointError, UnsupportedModel

_GPT4 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {
    (_GPT4, True): "llama-bpe",
    (_GPT4, False): "dbrx",
    (_GPT4.replace(r"\p{N}{1,3}", r"\p{N}"), False): "qwen2",
}
"""(Regular expression that cuts text into words, whether whole words of the vocabulary are taken before merges) -> llama.cpp's
name of it."""


def write_vocabulary(writer: Any, folder: Path, known: Mapping[str, Any], size: int) -> None:
    """Write tokens, merges and special tokens.

    known: what `read` gave of the folder. size: rows of the embeddings; those without a token are named [PAD...].
    Raises UnsupportedModel for a tokenizer that llama.cpp would read otherwise.
    """
    import gguf

    kind, split = kind_of(known)
    writer.add_tokenizer_model(kind)
    if split:
        writer.add_tokenizer_pre(split)
    ids = {index: token for token, index in known["model"]["vocab"].items()}
    special = {}
    for added in known.get("added_tokens", []):
        ids[added["id"]] = added["content"]
        special[added["id"]] = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
    tokens, types, scores = [], [], []
    for index in range(size):
        token = ids.get(index)
        tokens.append(f"[PAD{index}]" if token is None else token)
        scores.append(-float(index))  # SentencePiece's BPE numbers its tokens in the order of their merges
        if token is None:
            types.append(gguf.TokenType.UNUSED)
        elif index not in special and kind == "llama" and _is_byte(token):
            types.append(gguf.TokenType.BYTE)
        else:
            types.append(special.get(index, gguf.TokenType.NORMAL))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if kind == "llama":
        writer.add_token_scores(scores)
    gguf.SpecialVocab(folder, load_merges=kind == "gpt2", n_vocab=size).add_to_gguf(writer, quiet=True)


def read(folder: Path) -> dict[str, Any]:
    """tokenizer.json. Raises CheckpointError if it, or what the gguf package reads beside it, is not there or damaged."""
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json"
    try:
        text = path.read_text(encoding="utf-8")
        Tokenizer.from_str(text)
    except Exception as error:  # tokenizers raises nothing narrower
        raise CheckpointError(f"GGUF holds its tokenizer, and {path} cannot be read ({error}): put it there") from error
    for beside in ("tokenizer_config.json", "chat_template.json"):
        if (folder / beside).is_file():
            read_json(folder / beside, cure="copy it again")
    return json.loads(text)


def kind_of(known: Mapping[str, Any]) -> tuple[str, str]:
    """(GGUF's name of the model, of how text is cut into words). Raises UnsupportedModel if there is none."""
    model = known["model"]
    if model.get("type") == "BPE" and model.get("byte_fallback"):
        return "llama", ""
    steps = known.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers", [steps])
    kinds = [step.get("type") for step in steps]
    if model.get("type") == "BPE" and kinds and kinds[-1] == "ByteLevel":
        first = steps[0]
        if kinds == ["ByteLevel"]:
            return "gpt2", "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and first.get("individual_digits") and steps[1].get("use_regex", True):
            return "gpt2", "smollm"
        split = first.get("pattern", {}).get("Regex", ""), bool(model.get("ignore_merges", False))
        if kinds == ["Split", "ByteLevel"] and (name := SPLITS.get(split)):
            return "gpt2", name
    raise UnsupportedModel(
        f"a tokenizer of {model.get('type')} after {', '.join(map(str, kinds)) or 'nothing'} is not written as GGUF; "
        "byte-level BPE as of GPT-2, SmolLM, Llama 3 and Qwen, and SentencePiece's BPE are"
    )


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")
