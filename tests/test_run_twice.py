"""The same call twice: the second finds a finished OUT, does nothing to it and returns its report, whatever the command."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

import topiarist as tp
from topiarist.masklearn import Preset, Schedule
from topiarist.masks import apply

TOKENS = tiny.tiny_tokens(24, 16)
STEPS = Preset(
    steps=1, sequences=2, length=16, lr=Schedule(2e-2, 0.0, "cosine"), tau=Schedule(1.0, 0.05, "exponential"),
    lam=Schedule(1e-5, 0.0), max_norm=1.0, gap=0.02, prior_samples=2,
)  # fmt: skip


@dataclass(frozen=True)
class Call:
    """A command that writes a model. settings: of a run of one step or less."""

    run: Callable[..., Any]
    settings: dict[str, Any]
    in_place: bool = True
    """Whether what is done to an object is done to the caller's own."""


CALLS = {
    "prune": Call(tp.prune, {"method": "wanda", "data": TOKENS[:4]}),
    "learn": Call(
        tp.learn, {"data": TOKENS, "preset": STEPS, "prior": "magnitude", "evaluate_every": 1, "held_out": 2}
    ),
    "shrink": Call(
        tp.shrink, {"method": "magnitude", "keep": 0.6, "units": ["channels"], "refit": False}, in_place=False
    ),
    "recover": Call(tp.recover, {"data": TOKENS, "tokens": 128, "sequences": 4, "held_out": 2, "learning_rate": 1e-3}),
    "quantize": Call(tp.quantize, {"bits": 8}),
}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.tiny_checkpoint(tmp_path_factory.mktemp("twice") / "dense")


@pytest.fixture(scope="module")
def sparse(dense: Path) -> Path:
    """What is recovered."""
    tp.prune(dense, dense.with_name("sparse"), method="magnitude")
    return dense.with_name("sparse")


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


def said(report: Any) -> str:
    return json.dumps(report.to_dict())


def refuse_work(*step: Any) -> None:
    raise AssertionError(f"a finished run works again: {step}")


@pytest.mark.parametrize("name", CALLS)
def test_a_folder(name: str, dense: Path, sparse: Path, tmp_path: Path):
    call, model = CALLS[name], sparse if name == "recover" else dense
    first = call.run(model, tmp_path / "out", **call.settings)
    before = contents(tmp_path / "out")
    assert list(first.recipe["stages"][0]) == [name] and str(tmp_path / "out" / "recipe.yaml") in before
    again = call.run(model, tmp_path / "out", progress=refuse_work, **call.settings)
    assert said(again) == said(first) and contents(tmp_path / "out") == before


@pytest.mark.parametrize("name", [name for name in CALLS if name != "quantize"])  # of objects nothing packed is written
def test_an_object(name: str, dense: Path, sparse: Path, tmp_path: Path):
    call, model = CALLS[name], tiny.tiny_model()
    settings = call.settings | {"tokenizer": tiny.tiny_tokenizer()}
    if name == "recover":
        tp.prune(model, method="magnitude")
        settings["teacher"] = dense
    copied = copy.deepcopy(model)
    first = call.run(model, tmp_path / "out", **settings)
    before = contents(tmp_path / "out")
    changed = any(not torch.equal(value, copied.state_dict()[name]) for name, value in model.state_dict().items())
    assert changed == call.in_place
    for same in (model, copied):  # the object as the first call left it, and one as it was before
        again = call.run(same, tmp_path / "out", progress=refuse_work, **settings)
        assert said(again) == said(first) and contents(tmp_path / "out") == before
        assert all(torch.equal(value, model.state_dict()[name]) for name, value in same.state_dict().items())
    with pytest.raises(tp.CheckpointError, match="holds another run: model was"):
        call.run(tiny.tiny_model(seed=1), tmp_path / "out", **settings)


def test_masks_on_a_folder(dense: Path, tmp_path: Path):
    tp.learn(dense, tmp_path / "learned", **CALLS["learn"].settings)
    masks, out = tmp_path / "learned" / "masks.safetensors", tmp_path / "out"
    assert apply(dense, masks, out) == out
    before = contents(out)
    assert apply(dense, masks, out) == out and contents(out) == before
