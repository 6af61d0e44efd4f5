"""What is asked of one model type: prune its files, open them by plain transformers, compare with the model itself."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import topiarist as tp
from sweep.tiny_types import VOCAB
from topiarist.models.calls import first_of
from topiarist.models.derive import base_model, has_encoder, sees_later_tokens, text_inputs
from topiarist.models.opened import OpenedModel, at_rest, open_model
from topiarist.pipelines.common.stream import BlockStream, PausedStream

NEAR = 1e-3


@dataclass
class Outcome:
    """What came of one type. `why` is empty where everything holds."""

    architecture: str = ""
    why: str = ""
    way: str = ""
    """replayed, or paused: how its blocks are run."""
    matrices: int = 0
    covered: float = 0.0
    """Share of the weights of its blocks that are prunable matrices; the rest is said to stay dense."""
    dense: list[str] = field(default_factory=list)
    """What of its blocks stays dense, and why."""


def tokens() -> Tensor:
    """(8, 32), the same at every call."""
    return torch.randint(3, VOCAB - 6, (8, 32), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def check_type(folder: Path, out: Path, **options: Any) -> Outcome:
    """Prune the model of a folder with wanda to 2:4, and hold the result against what is promised.

    options: of `tp.prune`. An exception means that the type is refused, or that something is broken.
    """
    opened = open_model(folder, device="cpu")
    found = Outcome(type(opened.model).__name__, covered=opened.coverage, dense=opened.left_dense())
    dense = opened.whole().model.float()
    if error := hidden_error(opened, dense):
        found.why = error
    found.way = "replayed" if opened.flow is not None and opened.flow.replays else "paused"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = tp.prune(
            folder, out, **{"method": "wanda", "calibration": tokens(), "batch_size": 4, "device": "cpu"} | options
        )
    found.matrices = len(report.layers)
    kind = type(opened.model)
    again, about = kind.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    names = {layer.name for layer in report.layers}
    checks = {
        "tensors are missing in the result": not about["missing_keys"],
        "hidden states are not finite": bool(
            torch.isfinite(base_model(again.eval())(**text_inputs(again, tokens()[:2]))[0]).all()
        ),
        "a pattern does not hold": all(
            tp.NM(2, 4).holds(matrix.weight != 0) for name, matrix in _matrices(open_model(again)) if name in names
        ),
        "something else was changed": not _changed(dense, again, names),
        "nothing was pruned": bool(names),
        "which tokens it sees is not known": has_encoder(dense)
        or later_tokens_matter(dense) == bool(sees_later_tokens(dense)),
    }
    found.why = found.why or next((text for text, holds in checks.items() if not holds), "")
    return found


@torch.no_grad()
def later_tokens_matter(model: Any) -> bool:
    """Whether what a causal model predicts changes with a token that comes after."""
    text = tokens()[:1, :12]
    other = torch.cat([text[:, :-1], text[:, -1:] + 1], dim=1)
    one, two = (model(input_ids=rows, use_cache=False).logits[:, :-1] for rows in (text, other))
    return not torch.allclose(one, two, rtol=NEAR, atol=NEAR * float(one.std()))


def hidden_error(opened: OpenedModel, whole: Any) -> str:
    """Run the dense model block by block; empty if every block puts out what it does in the model's own forward."""
    batch = tokens()
    wanted: dict[int, list[Tensor]] = {}
    hooks = [
        whole.get_submodule(name).register_forward_hook(
            lambda _, __, out, index=index: wanted.setdefault(index, []).append(first_of(out).clone())
        )
        for index, name in enumerate(opened.block_names)
    ]
    with at_rest(whole), at_rest(opened.model):
        stream = BlockStream.of(opened, batch, batch_size=4)  # a model that cannot run on text is refused here
        for rows in batch.split(4):
            base_model(whole)(**text_inputs(whole, rows))
        for hook in hooks:
            hook.remove()
        for index in range(len(opened.block_names)):
            block = opened.load(index)
            if not stream.reaches(index):
                continue
            for number in range(stream.num_batches):
                out = stream.run_batch(index, block, number)[2]
                error = float((out - wanted[index][number]).abs().max() / wanted[index][number].abs().max())
                if not error < NEAR:
                    return f"hidden states after block {index} are off by {error:.0%}"
            stream.advance(index, block)
            opened.release(index)
        stream.close()
    assert isinstance(stream, PausedStream) or (opened.flow is not None and opened.flow.replays)
    return ""


def _matrices(whole: OpenedModel) -> list[tuple[str, Any]]:
    return [
        (f"{path}.{matrix.name}", matrix)
        for index, path in enumerate(whole.block_names)
        for matrix in whole.matrices(index)
    ]


def _changed(dense: Any, again: Any, names: set[str]) -> list[str]:
    """Parameters that are not those of the dense model and were not pruned."""
    after = dict(again.named_parameters())
    pruned = {re.sub(r"\.\d+$", "", name) for name in names} | {f"{name}.weight" for name in names}
    return [n for n, p in dense.named_parameters() if n not in pruned and not torch.equal(p, after[n])]
