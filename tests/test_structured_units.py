"""Units, their costs, the gates that switch them off, and the exact choice under a budget."""

from __future__ import annotations

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import topiarist as tp
from topiarist.models.derive import family_of
from topiarist.models.families import FAMILIES
from topiarist.models.opened import at_rest
from topiarist.structured import choose, gates, kept_cost, layer_counts, total_cost, units_of
from topiarist.structured.finding import default_kinds
from topiarist.structured.units import UnitGroup

MIXTURES = ["mixtral", "olmoe", "qwen2_moe", "qwen3_moe"]


def indices(part, units) -> list[int]:
    return [part.start + u * part.size + i for u in units for i in range(part.size)]


def tensor_of(model, part) -> torch.Tensor:
    tensor = model.get_parameter(part.parameter).detach()
    return tensor if part.expert is None else tensor[part.expert]


@torch.no_grad()
def zeroed(model, groups, off: dict[str, list[int]]) -> None:
    """Write zeros into the consumers' columns of the units in `off`."""
    for group in groups:
        part = group.parts[-1]
        tensor_of(model, part).index_fill_(part.axis, torch.tensor(indices(part, off[group.key])), 0.0)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_parts_of_all_units_cover_their_matrices_once(family: str):
    model = tiny.tiny_model(family)
    groups = units_of(model, ("kv_groups", "channels"))
    seen: dict[str, torch.Tensor] = {}
    for group in groups:
        counted = 0
        for part in group.parts:
            count = seen.setdefault(part.parameter, torch.zeros(model.get_parameter(part.parameter).shape))
            chosen = count if part.expert is None else count[part.expert]
            chosen.index_add_(
                part.axis,
                torch.tensor(indices(part, range(group.count))),
                torch.ones_like(tensor_of(model, part)).index_select(
                    part.axis, torch.tensor(indices(part, range(group.count)))
                ),
            )
            counted += len(indices(part, range(group.count))) * chosen.numel() // chosen.shape[part.axis]
        assert counted == group.cost * group.count
    block = model.get_submodule(family_of(model).blocks)[0]
    covered = {name.split(".", family_of(model).blocks.count(".") + 2)[-1] for name in seen}
    matrices = {name for name, p in block.named_parameters() if p.ndim > 1 and "gate.weight" not in name}
    assert matrices - {"mlp.shared_expert_gate.weight"} <= covered
    assert all(bool((count == 1).all()) for count in seen.values())


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_gates_equal_zeros_in_the_consumers(family: str):
    model, tokens = tiny.tiny_model(family), tiny.tiny_tokens(2, 12)
    groups = units_of(model, ("kv_groups", "channels"))
    with torch.no_grad():
        dense = model(tokens).logits
        off = {g.key: [0, g.count // 2] if g.kind == "channels" else [g.count - 1] for g in groups}
        with gates(model, groups) as masks:
            torch.testing.assert_close(model(tokens).logits, dense, rtol=1e-5, atol=1e-5)
            for key, units in off.items():
                masks[key][units] = 0
            gated = model(tokens).logits
        torch.testing.assert_close(model(tokens).logits, dense, rtol=0, atol=0)
        zeroed(model, groups, off)
        assert not torch.allclose(gated, dense, atol=1e-3)
        with at_rest(model):
            torch.testing.assert_close(gated, model(tokens).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "opt", "qwen2_moe", "gpt2"])
def test_every_sequence_may_have_its_own_masks(family: str):
    model, tokens = tiny.tiny_model(family), tiny.tiny_tokens(1, 12).repeat(2, 1)
    for kinds in (("kv_groups", "channels"), ("attention", "ffn"), ("block",)):
        groups = [g for g in units_of(model, kinds) if g.parts[-1].expert is None]
        with torch.no_grad(), gates(model, groups) as masks:
            rows = {g.key: (torch.rand(2, g.count) > 0.4).float() for g in groups}
            masks.update(rows)
            both = model(tokens).logits
            for i in range(2):
                masks.update({key: row[i] for key, row in rows.items()})
                torch.testing.assert_close(model(tokens[:1]).logits[0], both[i], rtol=1e-4, atol=1e-5)


def test_masks_have_gradients_and_hooks_leave_with_errors():
    model, tokens = tiny.tiny_model("qwen3_moe"), tiny.tiny_tokens(2, 8)
    groups = units_of(model, ("kv_groups", "channels"))
    with gates(model, groups) as masks:
        for key in masks:
            masks[key].requires_grad_()
        model(tokens).logits.square().mean().backward()
        assert all(mask.grad is not None and bool(mask.grad.any()) for mask in masks.values())
    with torch.no_grad():
        dense = model(tokens).logits
        with pytest.raises(RuntimeError), gates(model, units_of(model, ("experts",))) as masks:
            masks.update({key: torch.zeros(99) for key in masks})
            model(tokens)
        torch.testing.assert_close(model(tokens).logits, dense, rtol=0, atol=0)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_sublayers_and_blocks(family: str):
    model, tokens = tiny.tiny_model(family), tiny.tiny_tokens(2, 12)
    blocks = model.get_submodule(family_of(model).blocks)
    with torch.no_grad():
        dense = model(tokens).logits
        with gates(model, units_of(model, ("block",))) as masks:
            for mask in masks.values():
                mask.zero_()
            nothing = model(tokens).logits
        for block in blocks:
            block.forward = lambda hidden_states, *_, **__: hidden_states
        torch.testing.assert_close(model(tokens).logits, nothing, rtol=1e-5, atol=1e-5)
        for block in blocks:
            del block.forward
        with gates(model, units_of(model, ("attention", "ffn"))) as masks:
            for mask in masks.values():
                mask.zero_()
            torch.testing.assert_close(model(tokens).logits, nothing, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(model(tokens).logits, dense, rtol=0, atol=0)


@pytest.mark.parametrize("family", MIXTURES)
def test_an_expert_that_is_off_gets_no_token(family: str):
    model, tokens = tiny.tiny_model(family), tiny.tiny_tokens(2, 12)
    groups = units_of(model, ("experts",))
    assert all(group.floor == 2 for group in groups)
    with torch.no_grad(), gates(model, groups) as masks:
        for mask in masks.values():
            mask[1] = 0
        gated = model(tokens).logits
        for block in model.model.layers:
            for name in ("gate_up_proj", "down_proj"):
                getattr(block.mlp.experts, name)[1].fill_(float("nan"))
        with at_rest(model):
            torch.testing.assert_close(model(tokens).logits, gated)


def test_multi_query_attention_has_query_heads():
    model = tiny.tiny_model(num_key_value_heads=1)
    assert default_kinds(model) == ("heads", "channels")
    with pytest.raises(tp.UnsupportedModel, match="--units heads"):
        units_of(model, ("kv_groups",))
    assert [g.count for g in units_of(model, ("heads",))] == [4, 4]
    grouped = tiny.tiny_model()
    groups = units_of(grouped, ("heads",))
    assert [g.count for g in groups] == [2, 2, 2, 2] and len({g.tie for g in groups}) == 2
    kept = choose(groups, {g.key: torch.randn(2) for g in groups}, 0.5)
    assert {int(kept[g.key].sum()) for g in groups} == {1}
    with torch.no_grad(), gates(grouped, groups) as masks:
        masks.update({key: mask.float() for key, mask in kept.items()})
        gated = grouped(tiny.tiny_tokens(2, 8)).logits
    with torch.no_grad():
        zeroed(grouped, groups, {k: (~m).nonzero().flatten().tolist() for k, m in kept.items()})
        torch.testing.assert_close(grouped(tiny.tiny_tokens(2, 8)).logits, gated, rtol=1e-4, atol=1e-5)


def test_bad_kinds_are_named():
    model = tiny.tiny_model()
    for kinds, message in (
        (("neurons",), "unknown units 'neurons'"),
        ((), "unknown units"),
        (("kv_groups", "heads"), "holds the other"),
        (("channels", "block"), "shrink twice"),
        (("experts",), "no experts"),
    ):
        with pytest.raises(tp.TopiaristError, match=message):
            units_of(model, kinds)


def group(
    key: str, count: int, cost: int, *, kind: str = "kv_groups", tie: str | None = None, floor: int = 1
) -> UnitGroup:
    return UnitGroup(key, kind, 0, count, cost, key, 0, 1, (), f"place:{kind}:{count}:{cost}", tie or key, floor)


layers = st.lists(st.tuples(st.integers(1, 40), st.sampled_from(["kv_groups", "channels"])), min_size=1, max_size=8)


@settings(deadline=None, max_examples=150)
@given(layers, st.floats(0.05, 1.0), st.integers(0, 10**6), st.sampled_from(["global", "parameters", "per_layer"]))
def test_the_choice_keeps_floors_budget_and_order(shape, keep: float, seed: int, scope: str):
    groups = [
        group(f"g{i}", count, 96 if kind == "kv_groups" else 3, kind=kind) for i, (count, kind) in enumerate(shape)
    ]
    generator = torch.Generator().manual_seed(seed)
    # Few distinct values: many ties.
    scores = {g.key: torch.randint(0, 4, (g.count,), generator=generator).float() for g in groups}
    try:
        kept = choose(groups, scores, keep, scope=scope)
    except tp.PatternError:
        return

    assert kept_cost(groups, kept) <= keep * total_cost(groups) * (1 + 1e-9)
    for g in groups:
        mask = kept[g.key]
        assert int(mask.sum()) >= g.floor
        if bool((~mask).any()):
            ranked = [(-float(scores[g.key][u]), u) for u in range(g.count)]
            worst_kept = max(r for u, r in enumerate(ranked) if mask[u])
            best_cut = min(r for u, r in enumerate(ranked) if not mask[u])
            assert worst_kept < best_cut
    if scope == "per_layer":
        counts: dict[str, set[int]] = {}
        for g in groups:
            counts.setdefault(g.place, set()).add(int(kept[g.key].sum()))
        assert all(len(found) == 1 for found in counts.values())


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(2, 12), min_size=1, max_size=6), st.floats(0.3, 1.0), st.integers(0, 10**6))
def test_global_choice_is_top_k_over_all_layers(counts, keep: float, seed: int):
    groups = [group(f"g{i}", count, 7, floor=0) for i, count in enumerate(counts)]
    generator = torch.Generator().manual_seed(seed)
    scores = {g.key: torch.randint(0, 5, (g.count,), generator=generator).float() for g in groups}
    wanted = int(keep * sum(counts) * (1 + 1e-12))
    if wanted == 0:
        return
    kept = choose(groups, scores, keep)
    ranked = sorted((-float(scores[g.key][u]), i, u) for i, g in enumerate(groups) for u in range(g.count))
    best_total = -sum(value for value, _, _ in ranked[:wanted])
    total = sum(float(scores[g.key][kept[g.key]].sum()) for g in groups)
    assert sum(int(mask.sum()) for mask in kept.values()) == wanted and total == best_total


def test_equal_scores_keep_the_earlier_units():
    groups = [group("a", 4, 1), group("b", 4, 1)]
    kept = choose(groups, {"a": torch.zeros(4), "b": torch.zeros(4)}, 0.75)
    assert kept["a"].tolist() == [True] * 4 and kept["b"].tolist() == [True, True, False, False]


def test_channels_are_kept_in_steps():
    groups = [group("a", 256, 1, kind="channels"), group("b", 256, 1, kind="channels")]
    scores = {"a": torch.rand(256), "b": torch.rand(256)}
    for round_to, step in ((None, 16), (64, 64), (1, 1)):
        kept = choose(groups, scores, 0.6, round_to=round_to)
        assert all(int(mask.sum()) % step == 0 for mask in kept.values())
    with pytest.raises(tp.PatternError, match="round_to 300"):
        choose(groups, scores, 0.6, round_to=300)


def test_counts_of_a_uniform_layout():
    groups = [group(f"h{i}", 3, 300) for i in range(2)]
    groups += [group(f"c{i}", 1024, 3, kind="channels") for i in range(2)]
    counts = layer_counts(groups, 0.8)
    assert counts == {"place:kv_groups:3:300": 3, "place:channels:1024:3": 704}  # 0.8 of 3972 less 900, in steps of 64
    assert layer_counts(groups, 0.6) == {"place:kv_groups:3:300": 2, "place:channels:1024:3": 576}
    assert layer_counts(groups, 1.0) == {"place:kv_groups:3:300": 3, "place:channels:1024:3": 1024}
    legal = layer_counts(groups, 0.8, legal=lambda place, count: "kv_groups" not in place or count < 3)
    assert legal["place:kv_groups:3:300"] == 2 and legal["place:channels:1024:3"] == 832
    with pytest.raises(tp.PatternError, match="no legal number of kv_groups"):
        layer_counts(groups, 0.8, legal=lambda place, count: "kv_groups" not in place)


@pytest.mark.parametrize("keep", [0.0, -1.0, 1.1, float("nan")])
def test_keep_outside_its_range(keep: float):
    with pytest.raises(tp.PatternError, match="keep"):
        choose([group("a", 4, 1)], {"a": torch.zeros(4)}, keep)


def test_floors_above_the_budget_and_broken_scores_are_errors():
    groups = [group("a", 4, 10), group("b", 4, 10)]
    with pytest.raises(tp.PatternError, match="floors alone"):
        choose(groups, {"a": torch.zeros(4), "b": torch.zeros(4)}, 0.1)
    with pytest.raises(tp.NumericalError, match="not a number"):
        choose(groups, {"a": torch.full((4,), float("nan")), "b": torch.zeros(4)}, 0.5)
    with pytest.raises(ValueError, match="needs 4 scores"):
        choose(groups, {"a": torch.zeros(4)}, 0.5)
