"""The baselines: what each score is, held against the formula worked out from the model itself."""

from __future__ import annotations

import pytest
import tiny
import torch

from topiarist.models.derive import family_of
from topiarist.models.families import FAMILIES
from topiarist.structured import choose, gates, units_of
from topiarist.structured.methods import Task
from topiarist.structured.metrics import BlockInfluence, Flap, Moments, WandaSP
from topiarist.structured.occlusion import Occlusion
from topiarist.structured.taylor import Taylor
from topiarist.structured.trial import Prefix

WIDTH = ("kv_groups", "channels")


def task_of(model, kinds=WIDTH, **options) -> Task:
    defaults = {"keep": 0.5, "tokens": tiny.tiny_tokens(4, 16), "batch_size": 3}
    return Task(model=model, groups=units_of(model, kinds), **(defaults | options))


def input_of(model, name: str, tokens: torch.Tensor) -> torch.Tensor:
    seen = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    with torch.no_grad():
        model(tokens)
    hook.remove()
    return torch.cat([x.reshape(-1, x.shape[-1]) for x in seen]).double()


def test_moments_of_chunks_are_those_of_the_whole():
    x = 50 + torch.randn(40, 5, dtype=torch.float64)
    moments = Moments()
    for chunk in x.float().split([7, 1, 32]):
        moments.add(chunk)
    torch.testing.assert_close(moments.mean, x.mean(0), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(moments.variance, x.var(0), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(moments.energy, x.square().mean(0), rtol=1e-6, atol=1e-6)


def test_formulas():
    model = tiny.tiny_model()
    task = task_of(model)
    wanda, flap = WandaSP().scores(task), Flap(standardise=False).scores(task)
    for group in task.groups:
        x = input_of(model, group.consumer, task.tokens)
        W = model.get_submodule(group.consumer).weight.detach().double()
        expected = (W.abs() * x.square().mean(0).sqrt()).mean(0).view(group.count, -1).sum(1)
        torch.testing.assert_close(wanda[group.key], expected, rtol=1e-5, atol=1e-7)
        expected = (W.square().sum(0) * x.var(0)).view(group.count, -1).mean(1)
        torch.testing.assert_close(flap[group.key], expected, rtol=1e-4, atol=1e-7)


def test_flap_is_standardised_within_layers():
    scores = Flap().scores(task_of(tiny.tiny_model(), ("channels",)))
    for value in scores.values():
        assert float(value.mean().abs()) < 1e-9 and float(value.std(correction=0)) == pytest.approx(1)


def test_flap_takes_the_heads_of_a_layer_together():
    task = task_of(tiny.tiny_model(num_attention_heads=8), ("heads",))
    raw, scores = Flap(standardise=False).scores(task), Flap().scores(task)
    for layer in range(2):
        keys = [group.key for group in task.groups if group.block == layer]
        errors, standard = (torch.cat([found[key] for key in keys]) for found in (raw, scores))
        assert len(keys) == 2 and float(standard.mean().abs()) < 1e-9
        assert torch.equal(errors.argsort(), standard.argsort())


def test_a_constant_channel_goes_for_nothing_and_its_bias_makes_up_for_it():
    """Channel 5 puts out the same for every token: FLAP cuts it first, and the compensation is exact."""
    model = tiny.tiny_model("starcoder2", intermediate_size=64)
    mlp = model.model.layers[0].mlp
    with torch.no_grad():
        mlp.c_fc.weight[5], mlp.c_fc.bias[5], mlp.c_proj.weight[:, 5] = 0.0, 3.0, torch.linspace(-4, 4, 32)
    task = task_of(model, ("channels",))
    found = Flap().scores(task)
    key = "model.layers.0.mlp.c_proj:channels"
    assert int(found[key].argmin()) == 5
    kept = {group.key: torch.ones(group.count, dtype=torch.bool) for group in task.groups}
    kept[key][5] = False
    grown = Flap().biases(task, kept)
    with torch.no_grad(), gates(model, task.groups) as masks:
        dense = model(task.tokens).logits
        masks.update({k: mask.float() for k, mask in kept.items()})
        without = model(task.tokens).logits
        mlp.c_proj.bias += grown[mlp_name(task, key)].float()
        with_bias = model(task.tokens).logits
    assert (without - dense).abs().max() > 0.1
    torch.testing.assert_close(with_bias, dense, rtol=1e-4, atol=1e-4)


def mlp_name(task: Task, key: str) -> str:
    return next(group.consumer for group in task.groups if group.key == key)


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("kinds", [WIDTH, ("attention", "ffn"), ("block",)])
def test_every_family_is_scored(family: str, kinds: tuple[str, ...]):
    model = tiny.tiny_model(family)
    task = task_of(model, kinds)
    for method in [WandaSP(), Flap()] if kinds == WIDTH else [BlockInfluence()]:
        values = method.scores(task)
        kept = choose(task.groups, values, task.keep)
        assert all(bool(torch.isfinite(values[group.key]).all()) for group in task.groups)
        assert any(bool((~mask).any()) for mask in kept.values())


@pytest.mark.parametrize("family", ["llama", "opt", "gpt_neox", "granite"])
def test_what_adds_nothing_has_no_influence(family: str):
    model = tiny.tiny_model(family)
    ffn = FAMILIES[family].feed_forward[0].down
    block = model.get_submodule(family_of(model).blocks)[1]
    attention = block.get_submodule(FAMILIES[family].attention.module)
    for module in (attention.get_submodule(FAMILIES[family].attention.out), block.get_submodule(ffn)):
        for parameter in module.parameters():
            parameter.data.zero_()
    for kinds in (("attention", "ffn"), ("block",)):
        task = task_of(model, kinds)
        values = BlockInfluence().scores(task)
        for group in task.groups:
            assert (float(values[group.key]) < 1e-6) == (group.block == 1), group.key


@pytest.mark.parametrize("family", sorted(FAMILIES))
@torch.inference_mode()
def test_forwards_that_begin_at_a_block_are_those_of_the_whole_model(family: str):
    model = tiny.tiny_model(family)
    tokens = task_of(model).tokens[:3]
    blocks = model.get_submodule(family_of(model).blocks)
    originals, ran = list(blocks), []
    for index, block in enumerate(originals):
        block.register_forward_hook(lambda *_, index=index: ran.append(index))
    expected = model(input_ids=tokens).logits
    with Prefix(model, tokens) as prefix:
        for index in range(len(originals)):
            prefix.begin_at(index)
            ran.clear()
            torch.testing.assert_close(model(input_ids=tokens).logits, expected, rtol=0, atol=0)
            assert ran == list(range(index, len(originals)))
        with pytest.raises(ValueError, match="lies before"):
            prefix.begin_at(0)
    assert list(blocks) == originals


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "gpt2"])
@pytest.mark.parametrize("batch_size", [8, 3])
def test_occlusion_is_the_loss_without_a_unit(family: str, batch_size: int):
    model = tiny.tiny_model(family)
    task = task_of(model, ("kv_groups",), batch_size=batch_size)
    found = Occlusion(windows=4, window=16).scores(task)
    kept = {}
    with torch.no_grad(), gates(model, task.groups) as masks:
        dense = float(model(task.tokens, labels=task.tokens).loss)
        for group in task.groups:
            kept[group.key] = torch.zeros(group.count, dtype=torch.float64)
            for unit in range(group.count):
                masks[group.key] = (torch.arange(group.count) != unit).float()
                kept[group.key][unit] = (float(model(task.tokens, labels=task.tokens).loss) - dense) / group.cost
            masks[group.key] = torch.ones(group.count)
    size = torch.cat(list(kept.values())).abs().mean()
    for key, expected in kept.items():
        torch.testing.assert_close(found[key], expected / size, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", [Occlusion, Taylor])
def test_heads_are_weighed(method: type[Occlusion] | type[Taylor]):
    task = task_of(tiny.tiny_model(), ("kv_groups", "channels"))
    plain, weighed = (method(head_weight=weight).scores(task) for weight in (1.0, 3.0))
    ratios = {
        kind: torch.cat([weighed[g.key] / plain[g.key] for g in task.groups if g.kind == kind])
        for kind in ("kv_groups", "channels")
    }
    torch.testing.assert_close(
        ratios["kv_groups"], 3 * ratios["channels"].mean().expand_as(ratios["kv_groups"]), rtol=1e-2, atol=0
    )


def test_occlusion_takes_channels_in_slices_of_their_metric():
    model = tiny.tiny_model()
    task = task_of(model, ("channels",))
    metric, found = WandaSP().scores(task), Occlusion(slices=4).scores(task)
    for group in task.groups:
        ranked = found[group.key][torch.argsort(-metric[group.key])].view(4, 16)
        assert bool(((ranked - ranked.mean(1, keepdim=True)).abs() < 1e-4).all())
        assert bool((ranked.diff(dim=1) < 0).all())
    for kinds in (("block",), ("attention", "ffn")):
        assert len(Occlusion().scores(task_of(model, kinds))) == 2 * len(kinds)


def test_occlusion_does_not_tell_layers_apart_that_do_not_compete():
    task = task_of(
        tiny.tiny_model(), scope="per_layer", counts={"self_attn.o_proj:kv_groups": 2, "mlp.down_proj:channels": 32}
    )
    metric, found = WandaSP().scores(task), Occlusion().scores(task)
    for group in task.groups:
        if group.kind == "channels":
            assert torch.equal(found[group.key].argsort(), metric[group.key].argsort())
        else:  # all stay
            assert float(found[group.key].abs().max()) < 1e-5
