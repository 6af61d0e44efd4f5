"""Allocations: exact by parameter count whatever the rule, bounds kept, true to what was measured, clear when impossible."""

from __future__ import annotations

import itertools
import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import topiarist as tp
from topiarist import allocate
from topiarist.allocate.budget import budget, fit, knapsack, mixture
from topiarist.allocate.fixed import kept_by
from topiarist.allocate.scores import Scores, outlier_ratio, probe, random_signs
from topiarist.core.patterns import parse_pattern

SHAPES = st.lists(st.tuples(st.integers(2, 40), st.integers(2, 40)), min_size=1, max_size=12)


def named(shapes) -> dict[str, tuple[int, int]]:
    return {f"model.layers.{i}.up": shape for i, shape in enumerate(shapes)}


@settings(max_examples=60, deadline=None)
@given(SHAPES, st.floats(0.0, 0.9), st.data())
def test_zeros_are_exactly_those_asked_for(shapes, sparsity: float, data):
    layers = named(shapes)
    total = sum(map(math.prod, layers.values()))
    wanted = {name: data.draw(st.floats(0, 1)) for name in layers}
    kept = total - round(sparsity * total)
    assume(kept >= len(layers))
    patterns = fit(layers, tp.Unstructured(sparsity), wanted)
    assert kept_by(layers, patterns) == kept
    # ... and so does what is written and read again, and the masks themselves.
    text = json.loads(json.dumps({name: str(p) for name, p in patterns.items()}))
    assert kept_by(layers, allocate.given(layers, text)) == kept
    for name, shape in layers.items():
        pattern = patterns[name]
        assert pattern is not None and int(pattern.mask(torch.rand(shape)).sum()) == pattern.num_kept(shape) > 0


@settings(max_examples=60, deadline=None)
@given(SHAPES, st.floats(0.2, 0.8), st.floats(0.0, 0.2), st.data())
def test_one_shift_for_all_and_bounds(shapes, sparsity: float, width: float, data):
    layers = named(shapes)
    wanted = {name: data.draw(st.floats(0, 1)) for name in layers}
    low, high = 1 - sparsity - width, 1 - sparsity + width
    assume(all(low * math.prod(shape) >= 2 for shape in shapes))
    patterns = fit(layers, tp.Unstructured(sparsity), wanted, bounds=(low, high))
    shifts = []
    for name, shape in layers.items():
        kept, n = patterns[name].num_kept(shape), math.prod(shape)  # pyright: ignore[reportOptionalMemberAccess]
        assert low * n - 1 <= kept <= high * n + 1
        if low * n + 1 < kept < high * n - 1:
            shifts.append((kept / n - wanted[name], 1 / n))
    for (one, slack), (other, more) in itertools.pairwise(shifts):
        assert abs(one - other) <= slack + more + 1e-9


@pytest.mark.parametrize("pattern", ["0.37/row", "0.61/columns"])
def test_rows_and_columns_are_exact_to_half_a_step(pattern: str):
    layers = named([(12, 30), (7, 40), (25, 16), (12, 30)])
    wanted = dict(zip(layers, (0.2, 0.9, 0.5, 0.6), strict=True))
    patterns = fit(layers, parse_pattern(pattern), wanted)
    assert abs(kept_by(layers, patterns) - budget(layers, parse_pattern(pattern))) <= 25 / 2


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from([8, 16, 24]), min_size=2, max_size=5), st.floats(0.05, 0.7), st.data())
def test_mixtures_are_the_best_there_are(widths, sparsity: float, data):
    """Against all combinations: the budget spent to less than the smallest step, and so the nearest to the wish."""
    layers = named([(4, width) for width in widths])
    wanted = {name: data.draw(st.floats(0, 1)) for name in layers}
    choices = [None, tp.NM(4, 8), tp.NM(1, 4)]
    kept = budget(layers, tp.Unstructured(sparsity))
    found = mixture(layers, kept, wanted, choices)

    def distance(patterns) -> float:
        kept_of = {n: math.prod(s) if (p := patterns[n]) is None else p.num_kept(s) for n, s in layers.items()}
        return sum(math.prod(s) * (kept_of[n] / math.prod(s) - wanted[n]) ** 2 for n, s in layers.items())

    every = [
        dict(zip(layers, combination, strict=True)) for combination in itertools.product(choices, repeat=len(layers))
    ]
    within = [patterns for patterns in every if kept_by(layers, patterns) <= kept]
    top = max(kept_by(layers, patterns) for patterns in within)
    step = min(widths) * 4 // 4  # from 1:4 to 4:8, the smaller of the two steps
    near = [patterns for patterns in within if kept_by(layers, patterns) > top - step]
    assert found in every and top - step < kept_by(layers, found) <= kept
    assert distance(found) == pytest.approx(min(map(distance, near)), abs=1e-9)


def test_more_choices_than_a_byte_counts():
    """The options are as near as their costs say, whatever their number."""
    counts, wanted = [list(range(151))] * 2, [149, 20]
    costs = [[abs(count - wish) for count in row] for row, wish in zip(counts, wanted, strict=True)]
    assert knapsack(counts, costs, sum(wanted), 300) == wanted


def test_impossible_wishes_are_said():
    layers = named([(10, 10), (10, 20)])
    half = dict.fromkeys(layers, 0.5)
    with pytest.raises(tp.PatternError, match=r"every layer may have 0\.2 to 0\.6 zeros, so 0\.7 in all cannot be met"):
        fit(layers, tp.Unstructured(0.7), half, bounds=(0.4, 0.8))
    with pytest.raises(tp.PatternError, match=r"the sparsest choices give 0\.5 zeros in all, 0\.7"):
        fit(layers, tp.Unstructured(0.7), half, choices=[None, tp.NM(1, 2)])
    with pytest.raises(tp.PatternError, match=r"layers\.0\.up: none of the choices is allowed: .*divisible by 32"):
        fit(layers, tp.Unstructured(0.3), half, choices=[tp.NM(16, 32)])
    for text in ("1.0", "0.999"):
        with pytest.raises(tp.PatternError, match=r"layer model\.layers\.0\.up"):
            allocate.given(layers, {"model.layers.0.up": text, "model.layers.1.up": "0.5"})
    with pytest.raises(tp.TopiaristError, match="min_sparsity <= max_sparsity"):
        allocate.Owl(min_sparsity=0.8, max_sparsity=0.5)
    with pytest.raises(tp.TopiaristError, match="estimate is 'trace', should be"):
        allocate.Sensitivity(estimate="trace")
    with pytest.raises(tp.PatternError, match="cannot read pattern 'sparse'"):
        allocate.Uniform(choices="dense+sparse")


def test_choices_of_one_density_go_by_their_order():
    layers = named([(8, 16)] * 3)
    rule = allocate.Uniform(choices="dense+4:8+2:4")
    assert {str(p) for p in rule.patterns(layers, dict.fromkeys(layers, 0), tp.NM(2, 4)).values()} == {"4:8"}


def test_an_nm_pattern_gives_its_own_mixture():
    layers = named([(8, 16)] * 5)
    depths = {name: i for i, name in enumerate(layers)}
    found = allocate.Linear(half_width=0.5).patterns(layers, depths, tp.NM(2, 4))
    # Linear asks for densities of 1, 3/4, 1/2, 1/4 and 0; the mixture ends at 1:4 and must pay for it elsewhere.
    assert [str(p) for p in found.values()] == ["3:4", "3:4", "2:4", "1:4", "1:4"]
    assert kept_by(layers, found) == 5 * 64


def test_an_allocation_that_turns_out_uniform_is_said():
    with pytest.warns(UserWarning, match="linear gives every layer 2:4, as uniform would.*Widen its half_width"):
        tp.find_allocation(tiny.tiny_model(), "linear", pattern="2:4")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = tp.find_allocation(tiny.tiny_model(), "linear:half_width=0.3", pattern="2:4")
        tp.find_allocation(tiny.tiny_model(), "uniform", pattern="2:4")
    assert len(set(map(str, found.patterns.values()))) > 1


# What the rules make of their scores


def test_linear_is_an_arithmetic_progression():
    layers = named([(10, 100)] * 5)
    depths = {name: i for i, name in enumerate(layers)}
    found = allocate.Linear(half_width=0.2).patterns(layers, depths, tp.Unstructured(0.7))
    assert [p.sparsity for p in found.values()] == pytest.approx([0.5, 0.6, 0.7, 0.8, 0.9])  # pyright: ignore


def test_owl_gives_outliers_room():
    layers = named([(10, 100)] * 3)
    depths = {name: i for i, name in enumerate(layers)}
    ratios = dict(zip(layers, (0.01, 0.05, 0.03), strict=True))
    found = allocate.Owl().patterns(layers, depths, tp.Unstructured(0.7), ratios)
    assert [p.sparsity for p in found.values()] == pytest.approx([0.78, 0.62, 0.7])  # pyright: ignore
    weight = torch.ones(4, 50)
    weight[0, 0], weight[1, 3] = 100.0, 30.0
    assert outlier_ratio([weight], [torch.ones(50)], 5.0) == 2 / 200
    norms = torch.ones(50)
    norms[3] = 0.0
    assert outlier_ratio([weight], [norms], 5.0) == 1 / 200


@pytest.mark.parametrize("level", ["matrix", "block"])
def test_sensitivity_ranks(level):
    layers = {f"model.layers.{i}.{kind}": (10, 100) for i in range(3) for kind in ("up", "down")}
    depths = {name: int(name.split(".")[2]) for name in layers}
    traces = dict(zip(layers, (5.0, 100.0, 1.0, 2.0, 7.0, -30.0), strict=True))  # below zero: by size
    rule = allocate.Sensitivity(level=level, half_width=0.1)
    found = [p.sparsity for p in rule.patterns(layers, depths, tp.Unstructured(0.5), traces).values()]  # pyright: ignore
    expected = [0.52, 0.4, 0.6, 0.56, 0.48, 0.44] if level == "matrix" else [0.4, 0.4, 0.6, 0.6, 0.5, 0.5]
    assert found == pytest.approx(expected)


# Traces


def test_probes_average_to_the_exact_trace():
    """On a quadratic loss one probe of signs gives the diagonal blocks exactly plus what the other blocks add."""
    torch.manual_seed(0)
    A = torch.randn(12, 12, dtype=torch.float64)
    A = A @ A.T
    weights = [torch.randn(2, 3, dtype=torch.float64), torch.randn(6, dtype=torch.float64)]
    before = [w.clone() for w in weights]

    def gradients() -> list[torch.Tensor]:
        g = A @ torch.cat([w.flatten() for w in weights])
        return [g[:6].view(2, 3), g[6:]]

    generator = torch.Generator().manual_seed(0)
    draws = [probe(gradients, weights, [random_signs(w.shape, generator) for w in weights], 1e-3) for _ in range(4000)]
    assert all(torch.equal(w, start) for w, start in zip(weights, before, strict=True)), (
        "weights are put back bit by bit"
    )
    scores = Scores.of_samples({"a": [d[0] for d in draws], "b": [d[1] for d in draws]})
    for name, rows in (("a", slice(0, 6)), ("b", slice(6, 12))):
        exact = float(A[rows, rows].trace())
        assert abs(scores.values[name] - exact) < 4 * scores.errors[name] < 0.2 * exact


SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 64,
}


def exact_trace(tokens: torch.Tensor, path: str) -> float:
    """Sum of the second derivatives of the mean next-token loss with respect to one matrix, in fp64."""
    model = tiny.tiny_model(**SMALL, attn_implementation="eager").double().requires_grad_(False)
    weight = model.get_parameter(f"{path}.weight")

    def loss_of(weight: torch.Tensor) -> torch.Tensor:
        logits = torch.func.functional_call(model, {f"{path}.weight": weight}, (tokens,)).logits[:, :-1]
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    gradient = torch.func.grad(loss_of)

    def second(direction: torch.Tensor) -> torch.Tensor:
        return (torch.func.jvp(gradient, (weight,), (direction,))[1] * direction).sum()

    each = torch.eye(weight.numel(), dtype=weight.dtype).view(-1, *weight.shape)
    return float(torch.func.vmap(second, chunk_size=64)(each).sum())


def test_hutchinson_is_the_trace_of_the_models_own_hessian():
    tokens, name = tiny.tiny_tokens(2, 12) % 64, "model.layers.1.mlp.down_proj"
    rule = allocate.Sensitivity(estimate="hutchinson", sequences=2, probes=150, half_width=0.05)
    found = tp.find_allocation(
        tiny.tiny_model(**SMALL), rule, pattern=0.5, calibration=tokens, skip=[r"^(?!.*layers\.1\.mlp\.down_proj)"]
    )
    assert set(found.scores.values) == {name}
    exact = exact_trace(tokens, name)
    assert found.scores.values[name] * math.prod(found.shapes[name]) == pytest.approx(exact, rel=0.1)


def test_fisher_is_the_squared_gradient_and_standard_errors_are_stated():
    tokens = tiny.tiny_tokens(3, 12)
    model = tiny.tiny_model(dtype=torch.bfloat16)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    rule = allocate.Sensitivity(estimate="fisher")
    found = tp.find_allocation(model, rule, pattern=0.5, calibration=tokens)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items()), "the model is not touched"
    reference = tiny.tiny_model(dtype=torch.bfloat16).float()
    name, squares = "model.layers.0.mlp.up_proj", []
    for window in tokens:
        reference.zero_grad()
        logits = reference(window[None]).logits[:, :-1]
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), window[1:]).backward()
        squares.append(12 * float(reference.get_parameter(f"{name}.weight").grad.square().mean()))
    expected = Scores.of_samples({name: squares})
    assert found.scores.values[name] == pytest.approx(expected.values[name], rel=1e-3)
    assert found.scores.errors[name] == pytest.approx(expected.errors[name], rel=1e-3)


def test_traces_that_are_mostly_noise_are_said():
    scores = Scores({"a": 1.0, "b": -1.0, "c": 0.1}, {"a": 0.1, "b": 0.6})
    assert scores.unsure == ["b"]
    rule = allocate.Sensitivity(estimate="hutchinson", probes=1, sequences=2)
    with pytest.warns(
        tp.errors.NumericalWarning, match="of 14 traces are within two standard errors .* raise sequences or probes"
    ):
        tp.find_allocation(tiny.tiny_model(), rule, pattern=0.5, calibration=tiny.tiny_tokens(3, 12))


def test_the_largest_seed_draws_signs():
    """Every sequence and probe draws from a generator of its own, whose seed is made of all three."""
    rule = allocate.Sensitivity(estimate="hutchinson", probes=1, sequences=2)
    seeds = (0, (1 << 32) - 1)
    found = [
        tp.find_allocation(tiny.tiny_model(), rule, pattern=0.5, calibration=tiny.tiny_tokens(3, 12), seed=seed).scores
        for seed in seeds
    ]
    assert found[0].values != found[1].values


# Through prune


RULES = [
    "uniform",
    "linear",
    "owl",
    allocate.Owl(level="matrix", threshold=3),
    allocate.Sensitivity(probes=2, sequences=2),
    allocate.Sensitivity(estimate="input_trace", level="block"),
]


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_prune_by_rule_is_exact(rule):
    model = tiny.tiny_model(num_hidden_layers=3)
    report = tp.prune(model, method="wanda", pattern=0.7, allocation=rule, calibration=tiny.tiny_tokens(8, 32))
    total = sum(math.prod(layer.shape) for layer in report.layers)
    zeros = sum(int((model.get_parameter(f"{layer.name}.weight") == 0).sum()) for layer in report.layers)
    assert zeros == round(0.7 * total)
    assert report.pattern == "mixed" and report.allocation["zeros"] == zeros


def test_experts_are_measured_too():
    model = tiny.tiny_model("qwen3_moe")
    tokens = tiny.tiny_tokens(8, 32)
    for rule in ("owl", allocate.Sensitivity(probes=1, sequences=2)):
        found = tp.find_allocation(model, rule, pattern=0.6, calibration=tokens)
        assert set(found.scores.values) == set(found.shapes) and any("experts" in name for name in found.shapes)
        total = sum(math.prod(shape) for shape in found.shapes.values())
        assert found.zeros == round(0.6 * total)


def test_a_file_gives_the_same_run_and_a_broken_one_is_refused(tmp_path: Path):
    base, tokens = tiny.tiny_checkpoint(tmp_path / "base"), tiny.tiny_tokens(8, 32)
    options = {"method": "magnitude", "calibration": tokens}
    direct = tp.prune(base, tmp_path / "a", allocation="owl", pattern=0.7, **options)
    file = tmp_path / "a" / "pruning_allocation.json"
    again = tp.prune(base, tmp_path / "b", allocation=file, pattern=0.7, **options)
    assert [layer.pattern for layer in again.layers] == [layer.pattern for layer in direct.layers]
    assert again.sparsity == direct.sparsity
    with pytest.raises(tp.PatternError, match=r"makes 0\.699978 zeros, pattern 0\.6 asks for 0\.599989"):
        tp.prune(base, tmp_path / "c", allocation=file, pattern=0.6, **options)
    stored = json.loads(file.read_text())
    stored["patterns"]["model.layers.0.mlp.up_proj"] = "0.9"
    for change, message in (
        ({}, "it was edited"),
        ({"skipped": None}, "says skipped None, which is no list of layers"),
        ({"patterns": {**stored["patterns"], "no.such": "0.5"}}, "names 'no.such'"),
        (
            {"patterns": {**stored["patterns"], "model.layers.1.mlp.down": "0.5"}},
            r"none of the layers that can be pruned here; the nearest is 'model.layers.1.mlp.down_proj'",
        ),
        ({"patterns": {k: v for k, v in stored["patterns"].items() if "up_proj" not in k}}, "misses"),
        ({"patterns": {**stored["patterns"], "model.layers.0.mlp.up_proj": "1.0"}}, r"up_proj: .*\[0, 1\)"),
    ):
        file.write_text(json.dumps({**stored, **change}))
        with pytest.raises(tp.PatternError, match=message):
            tp.prune(base, tmp_path / "c", allocation=file, **options)
    with pytest.raises(tp.PatternError, match="neither a file nor a rule; rules are uniform, linear, owl"):
        tp.prune(base, tmp_path / "c", allocation="owls", **options)
    assert not (tmp_path / "c").exists()


def test_skipped_layers_are_outside_the_budget(tmp_path: Path):
    base, tokens = tiny.tiny_checkpoint(tmp_path / "base"), tiny.tiny_tokens(8, 32)
    found = tp.find_allocation(base, "owl", pattern=0.5, calibration=tokens, skip=["down_proj"])
    assert all((found.patterns[name] is None) == ("down_proj" in name) for name in found.patterns)
    assert found.sparsity == pytest.approx(0.5, abs=1e-4)
    found.save(tmp_path / "a.json")
    report = tp.prune(
        base, tmp_path / "out", method="magnitude", allocation=tmp_path / "a.json", pattern=0.5, calibration=tokens
    )
    assert len(report.layers) == 12 and report.sparsity == pytest.approx(0.5, abs=1e-4)


QUICK_SEARCH = allocate.Search(generations=1, children=2, finalists=1, sequences=2)
KINDS = ["linear", "owl", "sensitivity", "search"]


@pytest.mark.parametrize("rule", ["linear", "owl", allocate.Sensitivity(sequences=2), QUICK_SEARCH], ids=KINDS)
def test_blocks_that_text_never_calls_are_outside_the_budget(rule):
    """They stay dense, so zeros that they were to have would be missing."""
    model = tiny.model_with_uncalled_block()
    tokens = tiny.tiny_tokens(8, 32)
    found = tp.find_allocation(model, rule, pattern=0.5, method="wanda", calibration=tokens)
    assert found.skipped == [name for name in found.shapes if ".layers.1." in name] != []
    with pytest.warns(UserWarning, match=r"layers\.1 is not called for text"):
        report = tp.prune(model, method="wanda", pattern=0.5, allocation=rule, calibration=tokens)
    assert {layer.name for layer in report.layers} == set(found.shapes) - set(found.skipped)
    total = sum(math.prod(layer.shape) for layer in report.layers)
    zeros = sum(int((model.get_parameter(f"{layer.name}.weight") == 0).sum()) for layer in report.layers)
    assert zeros == round(0.5 * total) == found.zeros


def test_everything_may_be_skipped():
    found = tp.find_allocation(tiny.tiny_model(), "owl", pattern=0.5, calibration=tiny.tiny_tokens(2, 16), skip=["."])
    assert set(found.patterns.values()) == {None} and found.zeros == 0 and found.sparsity == 0


def test_a_run_by_rule_resumes_without_measuring_again(tmp_path: Path, monkeypatch):
    from topiarist.pipelines.allocating import allocation
    from topiarist.pipelines.pruning.block import BlockPruner

    base, real = tiny.tiny_checkpoint(tmp_path / "base"), BlockPruner.prune
    options = {"method": "magnitude", "pattern": 0.7, "allocation": "owl", "calibration": tiny.tiny_tokens(8, 32)}
    whole = tp.prune(base, tmp_path / "whole", **options)

    def stopped(self, stream, index, *args, **kwargs):
        if index:
            raise KeyboardInterrupt
        return real(self, stream, index, *args, **kwargs)

    monkeypatch.setattr(BlockPruner, "prune", stopped)
    with pytest.raises(KeyboardInterrupt):
        tp.prune(base, tmp_path / "out", **options)
    monkeypatch.setattr(BlockPruner, "prune", real)
    monkeypatch.setattr(allocation, "measure", None)
    resumed = tp.prune(base, tmp_path / "out", **options)
    assert resumed.to_dict() | {"command": 0} == whole.to_dict() | {"command": 0}
    assert tp.prune(base, tmp_path / "out", **options).to_dict() == resumed.to_dict()
    with pytest.raises(tp.CheckpointError, match="allocation threshold was"):
        tp.prune(base, tmp_path / "out", **{**options, "allocation": allocate.Owl(threshold=3)})


@pytest.mark.parametrize("rule", ["owl", allocate.Sensitivity(sequences=2), QUICK_SEARCH], ids=KINDS[1:])
def test_a_work_folder_that_cannot_be_is_said_before_measuring(tmp_path: Path, monkeypatch, rule):
    from topiarist.pipelines.allocating import allocation, search

    monkeypatch.setattr(allocation, "measure", None)
    monkeypatch.setattr(search, "fill", None)
    (tmp_path / "work").write_text("a file")
    for work in (tmp_path / "work", tmp_path / "work" / "inside"):
        with pytest.raises(tp.CheckpointError, match=r"cannot create .*work.*; choose another work folder"):
            tp.find_allocation(tiny.tiny_model(), rule, method="wanda", calibration=tiny.tiny_tokens(4, 16), work=work)


def test_a_measurement_that_breaks_leaves_no_work_folder(tmp_path: Path, monkeypatch):
    from topiarist.pipelines.allocating import allocation

    monkeypatch.setattr(allocation, "measure", None)
    with pytest.raises(TypeError):
        tp.find_allocation(tiny.tiny_model(), "owl", calibration=tiny.tiny_tokens(4, 16), work=tmp_path / "a" / "work")
    assert not (tmp_path / "a").exists()


# The command line and the page


@pytest.fixture
def call(tmp_path: Path, command, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny.tiny_checkpoint(tmp_path / "base", num_hidden_layers=3)
    tiny.tiny_text(tmp_path, "text.txt")
    return lambda *words: command(*words, "--calibration", "text.txt", "--samples", "8")


def test_allocate_writes_what_prune_reads(call, tmp_path: Path):
    code, printed, error = call(
        "allocate", "base", "a.json", "--rule", "sensitivity:probes=1,sequences=2,level=block", "--pattern", "0.7"
    )
    assert code == 0 and "70.00" in printed and "mean standard error" in printed and "written a.json" in printed, error
    code, printed, error = call(
        "prune", "base", "out", "--method", "wanda", "--allocation", "a.json", "--pattern", "0.7"
    )
    assert code == 0 and "70.00% zeros" in printed, error
    code, _, error = call("prune", "base", "no", "--allocation", "a.json", "--pattern", "0.5")
    assert code == 2 and "asks for 0.5" in error and len(error.strip().splitlines()) == 1
    code, _, error = call("allocate", "base", "b.json", "--rule", "owl:lambda=3")
    assert code == 2 and "Owl has no field 'lambda'; it has min_sparsity" in error
    code, _, error = call("allocate", "base", "b.json", "--rule", "owls")
    assert code == 2 and "unknown allocation rule 'owls'; choose one of uniform, linear, owl" in error
    code, _, error = call("allocate", "base", "b.json", "--rule", "owl:max_sparsity=0.6", "--pattern", "0.7")
    assert code == 2 and "cannot be met" in error and not (tmp_path / "b.json").exists()


def test_the_page_shows_densities_and_scores_and_repeats_the_run(call, tmp_path: Path):
    rule = ("--allocation", "owl:threshold=3.0,level=matrix", "--pattern", "0.7", "--method", "wanda")
    code, _, error = call("prune", "base", "out", *rule)
    assert code == 0, error
    html = (tmp_path / "out" / "pruning_report.html").read_text()
    assert "Where the zeros are" in html and "What the allocation went by" in html and "% kept, mean error" in html
    command = json.loads((tmp_path / "out" / "pruning_report.json").read_text())["command"]
    words = ["again" if word == "OUT" else word for word in command[1:]]
    at = words.index("--data")
    code, _, error = call(*words[:at], *words[at + 4 :])
    assert code == 0, error
    assert (tmp_path / "again" / "pruning_report.html").read_text() == html
