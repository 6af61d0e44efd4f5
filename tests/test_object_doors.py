"""Model objects at every function that takes one: what is no plain model is refused, and nothing but its weights changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import accelerate
import peft
import pytest
import tiny
import torch

import topiarist as tp

TOKENS = tiny.tiny_tokens(16, 32)
TEXT = {"calibration": TOKENS, "num_windows": 16, "window_tokens": 32}
DOORS: dict[str, Callable[[Any], Any]] = {
    "prune": lambda model: tp.prune(model, method="sparsegpt", **TEXT),
    "learn": lambda model: tp.learn(model, data=TOKENS, preset="quick", steps=1, held_out=4),
    "shrink": lambda model: tp.shrink(model, method="magnitude", keep=0.8, **TEXT).result,
    "allocate": lambda model: tp.find_allocation(model, rule="owl", pattern="0.5", **TEXT).patterns,
    "perplexity": lambda model: tp.perplexity(model, TOKENS[:2]).value,
}
CHANGING = {"prune", "learn"}


def adapted(model: Any) -> Any:
    return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"]))


def inner(model: Any) -> Any:
    return adapted(model).get_base_model()


def offloaded(model: Any) -> Any:
    accelerate.cpu_offload(model, torch.device("cpu"))
    return model


def broken(model: Any) -> Any:
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    return model


@pytest.mark.parametrize("door", sorted(set(DOORS) - {"perplexity"}))
@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (adapted, "merge the adapter first"),
        (inner, "merge the adapter first"),
        (offloaded, "give its folder instead"),
        (broken, "NaN|finite"),
    ],
)
def test_what_is_no_plain_model_is_refused(made: Callable[[Any], Any], reason: str, door: str):
    model = made(tiny.tiny_model())
    before = {name: value.clone() for name, value in model.state_dict().items() if value.device.type != "meta"}
    with pytest.raises(tp.TopiaristError, match=reason):
        DOORS[door](model)
    after = model.state_dict()
    assert all(torch.equal(after[name].nan_to_num(7.0), value.nan_to_num(7.0)) for name, value in before.items())


@pytest.mark.parametrize("door", DOORS)
def test_dropout_of_a_model_in_training_changes_nothing(door: str):
    results = []
    for training in (False, True):
        model = tiny.tiny_model(attention_dropout=0.5).train(training)
        torch.manual_seed(int(training))
        found = DOORS[door](model)
        results.append(model.state_dict() if door in CHANGING else found)
        assert {module.training for module in model.modules()} == {training}
    first, second = (r.state_dict() if isinstance(r, torch.nn.Module) else r for r in results)
    if door in CHANGING | {"shrink"}:
        assert all(torch.equal(first[name], second[name]) for name in first)
    else:
        assert first == second
