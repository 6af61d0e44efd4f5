"""Learning masks end to end on tiny models: what changes, what must not, resuming, transfer, refusals."""

from __future__ import annotations

import json
import sys
import weakref
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from killing import assert_kills_change_nothing, contents
from safetensors.torch import load_file
from sweep.check import tokens
from sweep.tiny_types import tiny_folder

import topiarist as tp
from topiarist.checkpoints.writing import STATES
from topiarist.evaluation.audit import audit
from topiarist.evaluation.perplexity import load_model
from topiarist.masklearn import PRESETS, MaskAdamW, Preset, Prior, Schedule
from topiarist.models.opened import open_model
from topiarist.pipelines.learning import job
from topiarist.pipelines.learning.files import MASKS
from topiarist.pipelines.learning.masking import MaskedModel, targets
from topiarist.pipelines.learning.options import LearnOptions
from topiarist.pipelines.learning.plan import plan_learn
from topiarist.pipelines.training.batches import Batches
from topiarist.pipelines.training.processes import Processes

FAST = Preset(
    steps=24, sequences=4, length=32, lr=Schedule(1e-2, 0.0, "cosine"), tau=Schedule(1.0, 0.05, "exponential"),
    lam=Schedule(0.0, 0.0), max_norm=None, gap=0.04, prior_samples=8,
)  # fmt: skip


def language(num: int, window: int, seed: int = 0, choices: int = 2) -> torch.Tensor:
    """Sequences with something to learn: the next token is one of `choices` that follow from the last."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, 60, (num, window), generator=generator)
    for i in range(1, window):
        choice = torch.randint(0, choices, (num,), generator=generator)
        tokens[:, i] = 3 + (tokens[:, i - 1] * 5 + 7 * choice) % 57
    return tokens


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A tiny model that has learned the language."""
    folder = tmp_path_factory.mktemp("learn") / "base"
    model = tiny.tiny_model("llama", dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(90):
        tokens = language(16, 32, seed=1000 + step)
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
    model.eval().save_pretrained(folder)
    tiny.tiny_tokenizer().save_pretrained(folder)
    return folder


DATA = language(120, 32)


def learn(model: Any, out: Path | None, **options: Any) -> tp.LearnReport:
    defaults = {"data": DATA, "held_out": 4, "preset": FAST, "prior": "magnitude", "evaluate_every": 8}
    return tp.learn(model, out, **(defaults | options))


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {key: value for path in folder.glob("model*.safetensors") for key, value in load_file(path).items()}


@pytest.fixture(scope="module")
def learned(base: Path, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("learned") / "out"
    learn(base, out)
    return out


def test_the_learned_mask_beats_its_prior(learned: Path):
    report = tp.LearnReport.from_folder(learned)
    assert report.loss < report.prior_loss - 0.1
    assert 0.005 < report.flips < 0.5 and report.sparsity == 0.5
    assert [entry["step"] for entry in report.history] == [0, 8, 16, 24]
    assert report.history[-1]["certainty"] > 0.9
    model = load_model(learned)
    held_out = tp.perplexity(model, language(20, 32, seed=99)).value
    assert torch.tensor(held_out).log() < report.prior_loss - 0.1


def test_only_masked_weights_change_and_the_pattern_holds_in_the_files(base: Path, learned: Path):
    provenance, audits = audit(learned)
    assert provenance["method"] == "maskllm" and len(audits) == 14 and all(a.holds for a in audits)
    before, after = weights_of(base), weights_of(learned)
    assert before.keys() == after.keys()
    masks = tp.masks.MaskFile(learned / MASKS)
    for name, weight in before.items():
        expected = weight.masked_fill(~masks[name], 0.0) if name in masks else weight
        assert torch.equal(after[name], expected), name
    assert not (learned / STATES).exists()
    assert "learned 2:4 masks" in (learned / "README.md").read_text()


def test_a_mask_file_gives_the_same_checkpoint(base: Path, learned: Path, tmp_path: Path):
    out = tp.masks.apply(base, learned / MASKS, tmp_path / "applied")
    applied, wanted = weights_of(out), weights_of(learned)
    assert applied.keys() == wanted.keys() and all(torch.equal(applied[k], wanted[k]) for k in wanted)


@pytest.mark.parametrize("family", ["gpt2", "qwen2", "mixtral", "opt"])
def test_families(family: str, tmp_path: Path):
    """Conv1D, biases, fused experts: names in the files, weights that must not move, and back onto the base."""
    base = tiny.tiny_checkpoint(tmp_path / "base", family)
    preset = Preset(**{**vars(FAST), "steps": 3, "lr": Schedule(3e-2, 3e-2)})
    report = learn(base, tmp_path / "out", preset=preset, data=tiny.tiny_tokens(40, 32))
    assert report.history[-1]["flips"] > 0  # on random text the prior may stay the best
    _, audits = audit(tmp_path / "out")
    assert audits and all(a.holds for a in audits)
    before, after = weights_of(base), weights_of(tmp_path / "out")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    parts = sum(2 if "experts.gate_up_proj" in a.name else 1 for a in audits)  # two tensors on disk
    assert all(before[name].ndim == 2 for name in changed) and len(changed) == parts
    assert all(bool(((after[n] == before[n]) | (after[n] == 0)).all()) for n in before)
    applied = weights_of(tp.masks.apply(base, tmp_path / "out" / MASKS, tmp_path / "applied"))
    assert all(torch.equal(applied[n], after[n]) for n in after)


@pytest.mark.parametrize("family", ["gpt_oss", "llama4_text"])
def test_masks_of_experts_stored_transposed_run_along_their_inputs(family: str, tmp_path: Path):
    base = tiny_folder(tmp_path / "base", family)
    preset = Preset(**{**vars(FAST), "steps": 3, "lr": Schedule(3e-2, 3e-2)})
    report = learn(base, tmp_path / "out", preset=preset, prior="wanda", data=tokens().repeat(3, 1))
    assert report.history[-1]["flips"] > 0
    masks = tp.masks.MaskFile(tmp_path / "out" / MASKS)
    experts = [name for name in masks if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]
    assert experts and all(tp.NM(2, 4).holds(mask.T) for name in experts for mask in masks[name])
    before, after = weights_of(base), weights_of(tmp_path / "out")
    assert all(torch.equal(after[name], before[name] * masks[name]) for name in experts)


def test_a_model_object_is_masked_in_place_and_otherwise_as_it_was(base: Path, learned: Path, tmp_path: Path):
    model = load_model(base)
    kinds = [type(m) for m in model.modules()]
    learn(model, tmp_path / "out", tokenizer=tiny.tiny_tokenizer())
    assert [type(m) for m in model.modules()] == kinds and all(p.requires_grad for p in model.parameters())
    wanted, written = weights_of(learned), weights_of(tmp_path / "out")
    state = model.state_dict()
    assert all(torch.equal(state[name], wanted[name]) for name in wanted)
    assert all(torch.equal(written[name], wanted[name]) for name in wanted)
    assert not list(tmp_path.glob("*.tmp"))


SHORT: dict[str, Any] = {"steps": 6, "evaluate_every": 2, "held_out": 2}


@pytest.mark.slow
def test_a_linear_with_a_forward_of_its_own_keeps_it(base: Path):
    class Doubled(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    model = load_model(base)
    plain = model.model.layers[0].self_attn.o_proj
    plain.__class__ = Doubled
    dense = plain.weight.detach().clone()
    report = tp.learn(model, pattern="2:4", prior="magnitude", steps=2, held_out=2, data=language(12, 16))
    assert model.model.layers[0].self_attn.o_proj is plain and report.layers
    kept = plain.weight != 0
    assert bool((kept.view(-1, 4).sum(-1) == 2).all()) and torch.equal(plain.weight[kept], dense[kept])


def test_a_model_that_cuts_the_gradient_off_is_refused(base: Path):
    model = load_model(base)
    model.model.layers[-1].register_forward_hook(lambda module, args, out: out.detach())
    with pytest.raises(tp.UnsupportedModel, match="the loss has no gradient"):
        tp.learn(model, pattern="2:4", prior="magnitude", steps=2, held_out=2, data=language(12, 16))


def test_killed_at_random_points_ends_in_the_same_bytes(base: Path, tmp_path: Path):
    assert_kills_change_nothing(lambda out: learn(base, out, **SHORT), tmp_path, kills=4, each=3)


def test_the_best_evaluation_is_kept(base: Path, tmp_path: Path):
    """Steps far too large: the masks get worse, the prior's own stay, and the report says so."""
    wild = Preset(**{**vars(FAST), "lr": Schedule(1.0, 1.0)})
    with pytest.warns(UserWarning, match="no mask was better than the prior"):
        report = learn(base, tmp_path / "out", preset=wild, steps=4, evaluate_every=2)
    assert report.history[-1]["flips"] > 0.05 and report.flips == 0 and report.loss == report.prior_loss
    assert any("no mask was better" in warning for warning in report.warnings)


def test_a_shortened_preset_keeps_its_walk(base: Path, tmp_path: Path):
    report = learn(base, tmp_path / "out", preset="quick", steps=2, data=language(60, 32))
    lr = report.settings["lr"]
    assert report.settings["steps"] == 2
    assert lr["start"] == pytest.approx(PRESETS["quick"].lr.start * (80 / 2) ** 0.5)


class _Stop(Exception): ...


def stopped(base: Path, out: Path, at: int, **options: Any) -> None:
    """A run that ends after step `at`, as a kill would end it."""

    def progress(what: str, done: int, total: int) -> None:
        if what.startswith("learning") and done > at:
            raise _Stop

    with pytest.raises(_Stop):
        learn(base, out, progress=progress, **options)


def test_a_resume_does_not_compute_the_prior_again(base: Path, learned: Path, tmp_path: Path):
    stopped(base, tmp_path / "out", 10)
    seen: list[str] = []
    learn(base, tmp_path / "out", progress=lambda what, *_: seen.append(what))
    assert "prior" not in seen and len([s for s in seen if s.startswith("learning")]) == 16
    assert contents(tmp_path / "out") == contents(learned)


@pytest.mark.skipif(find_spec("torchao") is None, reason="torchao is not installed")
def test_a_run_with_eight_bit_moments_resumes(base: Path, tmp_path: Path):
    learn(base, tmp_path / "straight", eight_bit=True)
    stopped(base, tmp_path / "out", 10, eight_bit=True)
    learn(base, tmp_path / "out", eight_bit=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "straight")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"prior": "wanda"}, "prior was 'magnitude' and is 'wanda'"),
        ({"steps": 20}, "steps was 24 and is 20"),
        ({"data": language(120, 32, seed=5)}, "data digest was"),
        ({"pattern": "1:4"}, "patterns model.layers.0.mlp.down_proj"),
        ({"distill": 0.5}, "distill was"),
    ],
)
def test_another_recipe_is_refused_and_the_difference_named(base: Path, tmp_path: Path, change, named: str):
    stopped(base, tmp_path / "out", 0)
    before = contents(tmp_path / "out")
    with pytest.raises(tp.CheckpointError, match=rf"holds another run: .*{named}"):
        learn(base, tmp_path / "out", **change)
    assert contents(tmp_path / "out") == before


def test_transfer_starts_from_a_learned_mask(base: Path, learned: Path, tmp_path: Path):
    domain = language(120, 32, seed=7, choices=1)
    report = learn(base, tmp_path / "out", prior=learned / MASKS, data=domain)
    one_shot = learn(load_model(base), None, data=domain, steps=1)
    assert report.prior_loss < one_shot.prior_loss - 0.01, "what was learned in general serves the domain"
    assert report.loss < report.prior_loss - 0.02, "and the domain adds to it"
    flips = sum(
        int((tp.masks.MaskFile(learned / MASKS)[n] != tp.masks.MaskFile(tmp_path / "out" / MASKS)[n]).sum())
        for n in tp.masks.MaskFile(learned / MASKS)
    )
    weights = sum(mask.numel() for mask in tp.masks.MaskFile(learned / MASKS).values())
    assert report.flips == pytest.approx(flips / weights)


def test_the_last_block_can_stay_dense(base: Path, tmp_path: Path):
    report = learn(base, tmp_path / "out", last_block_dense=True, skip=["q_proj"], steps=4)
    names = {layer.name for layer in report.layers}
    assert len(names) == 6 and all(".layers.0." in name and "q_proj" not in name for name in names)
    before, after = weights_of(base), weights_of(tmp_path / "out")
    assert all(torch.equal(before[n], after[n]) for n in before if ".layers.1." in n or "q_proj" in n)


def test_one_shot_priors_are_those_of_the_pipeline(base: Path):
    """Without a step of training the mask is Wanda's, as `prune` finds it on the same sequences."""
    model = load_model(base)
    report = learn(model, None, prior="wanda", preset=Preset(**{**vars(FAST), "lr": Schedule(0.0, 0.0)}), steps=1)
    assert report.flips == 0 and report.sparsity == 0.5
    sparse = {n: p.detach() != 0 for n, p in model.named_parameters() if n.endswith("proj.weight")}
    order = torch.randperm(report.calibration["num_windows"], generator=torch.Generator().manual_seed(0))[:8]
    chosen = torch.ones(len(DATA), dtype=torch.bool)
    chosen[[(2 * i + 1) * len(DATA) // 8 for i in range(4)]] = False
    pruned = load_model(base)
    tp.prune(pruned, calibration=DATA[chosen][order], method="wanda", pattern="2:4", batch_size=4)
    assert all(torch.equal(sparse[n], p != 0) for n, p in pruned.named_parameters() if n in sparse)


@pytest.fixture(scope="module")
def plain(base: Path) -> tp.LearnReport:
    return learn(load_model(base), None)


def last(report: tp.LearnReport, field: str) -> float:
    return report.history[-1][field]


def test_recomputed_activations_change_nothing(base: Path, plain: tp.LearnReport):
    assert learn(load_model(base), None, activation_checkpointing=True).to_dict() == plain.to_dict()


def test_small_batches_learn_the_same_but_for_rounding(base: Path, plain: tp.LearnReport):
    report = learn(load_model(base), None, batch_size=1)
    assert report.prior_loss == pytest.approx(plain.prior_loss, rel=1e-5)
    assert last(report, "loss") == pytest.approx(last(plain, "loss"), rel=1e-2)
    assert report.loss == pytest.approx(plain.loss, rel=3e-2)


def changed(**fields: Any) -> dict[str, Any]:
    return {"preset": Preset(**{**vars(FAST), **fields})}


# TopN's straight-through gradients are larger: a third of the rate.
VARIANTS: dict[str, dict[str, Any]] = {
    "lean": {"lean": True},
    "topn": {"relaxation": "topn", **changed(lr=Schedule(3e-3, 0.0, "cosine"))},
    "distilled": {"distill": 0.5},
    "noise per micro-batch": {"batch_size": 2, **changed(sample="micro-batch")},
    "clipped": changed(max_norm=1.0),
    "regularised": changed(lam=Schedule(1e-3, 0.0)),
    **({"eight bits": {"eight_bit": True}} if find_spec("torchao") else {}),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_learns_and_is_another_run(base: Path, plain: tp.LearnReport, name: str):
    """Better than the prior by more than a fluke, and not what the plain settings find."""
    report = learn(load_model(base), None, **VARIANTS[name])
    assert report.loss < report.prior_loss - 0.02
    assert last(report, "loss") != pytest.approx(last(plain, "loss"), rel=1e-4)


def test_recovery_trains_kept_weights_only(base: Path, tmp_path: Path):
    report = learn(base, tmp_path / "out", steps=4, recover=tp.Recover(steps=10, sequences=4, learning_rate=3e-3))
    before, after = weights_of(base), weights_of(tmp_path / "out")
    masks = tp.masks.MaskFile(tmp_path / "out" / MASKS)
    for name in before:
        if name in masks:
            assert not torch.equal(before[name].masked_fill(~masks[name], 0.0), after[name])
            assert not bool(after[name][~masks[name]].any())
        else:
            assert torch.equal(before[name], after[name])
    held_out = tp.perplexity(load_model(tmp_path / "out"), language(20, 32, seed=99)).value
    assert torch.tensor(held_out).log() < report.loss
    masks.check(next(iter(masks)), before[next(iter(masks))])  # the mask file still belongs to the dense base


def test_moments_are_freed_before_the_weights_are_written(base: Path, tmp_path: Path, monkeypatch):
    """Layers and optimiser hold each other: without a collection they would stay beside the weights that are read again."""
    module = sys.modules["topiarist.pipelines.learning.learn"]
    alive, write, made, optimisers = [], module.write_weights, MaskAdamW.__init__, []

    def watched(self, *args, **settings):
        optimisers.append(weakref.ref(self))
        made(self, *args, **settings)

    monkeypatch.setattr(MaskAdamW, "__init__", watched)
    monkeypatch.setattr(
        module, "write_weights", lambda *a: alive.extend(o() is not None for o in optimisers) or write(*a)
    )
    learn(base, tmp_path / "out", steps=2)
    assert alive == [False]


def test_batches_depend_on_the_seed_alone():
    rows = [Batches(10, 4, 3).rows(step) for step in range(5)]
    assert rows == [Batches(10, 4, 3).rows(step) for step in range(5)]
    flat = [row for step in rows for row in step]
    assert sorted(flat[:10]) == sorted(flat[10:]) == list(range(10)) and flat[:10] != flat[10:]


def test_user_errors(base: Path, learned: Path, tmp_path: Path):
    out = tmp_path / "out"
    numbers = {name: mask.to(torch.uint8) for name, mask in tp.masks.MaskFile(learned / MASKS).items()}
    cases: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (tp.PatternError, "needs a prior", {"prior": None}),
        (tp.CheckpointError, "neither a method", {"prior": "wandering"}),
        (tp.PatternError, r"layer .*layers.0.*not a 1:4 mask", {"prior": learned / MASKS, "pattern": "1:4"}),
        (tp.PatternError, "no mask for", {"prior": {}}),
        (tp.PatternError, r"layer .*layers.0.*it is of torch.uint8, where booleans are due", {"prior": numbers}),
        (tp.TopiaristError, "unknown preset", {"preset": "instant"}),
        (tp.TopiaristError, "steps is 0, should be greater than 0", {"steps": 0}),
        (tp.TopiaristError, "nothing is left to prune", {"skip": ["."]}),
        (tp.PatternError, "divisible by 5", {"pattern": "2:5"}),
        (tp.CalibrationError, "a step takes 4", {"data": DATA[:4]}),
        (tp.CalibrationError, "too few", {"data": DATA[:1]}),
        (tp.CalibrationError, "128 tokens do not fit the model", {"data": tiny.tiny_tokens(20, 128)}),
        (tp.CalibrationError, "does not divide", {"batch_size": 3}),
        (tp.CalibrationError, "outside the model's vocabulary", {"data": DATA + 1000}),
    ]
    for kind, message, options in cases:
        with pytest.raises(kind, match=message):
            learn(base, out, **options)
    other = tiny.tiny_checkpoint(tmp_path / "other", seed=4)
    with pytest.raises(tp.CheckpointError, match=r"made for another base model .* first tensor that differs"):
        learn(other, tmp_path / "out2", prior=learned / MASKS)
    with pytest.raises(tp.CheckpointError, match="needs an output"):
        learn(base, None)
    with pytest.raises(tp.CheckpointError, match="is the model itself"):
        learn(base, base)


def test_what_cannot_be_learned_is_refused_before_the_prior(base: Path, monkeypatch):
    monkeypatch.setattr(MaskAdamW, "step", pytest.fail)
    monkeypatch.setattr("topiarist.pipelines.learning.run.one_shot_masks", lambda *_, **__: pytest.fail("a prior"))
    model = load_model(base)
    for options, message in (
        ({"relaxation": "bernoulli"}, "no relaxation bernoulli for pattern 2:4"),
        ({"recover": {"sequences": 5000}}, "a step of the recovery takes 5000"),
    ):
        with pytest.raises(tp.TopiaristError, match=message):
            learn(model, None, **options)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_layer_that_takes_no_mask_leaves_the_model_as_it_was(base: Path):
    model = load_model(base)
    before = {name: type(module) for name, module in model.named_modules()}
    source = open_model(model).whole()
    wanted = [t for block in targets(source, dict.fromkeys(source.shapes(), tp.NM(2, 4))) for t in block]
    masks = {t.name: torch.ones_like(t.parameter, dtype=torch.bool) for t in wanted}
    masks[wanted[0].name][:, 2::4] = masks[wanted[0].name][:, 3::4] = False  # the first fits, the second does not
    with pytest.raises(tp.PatternError, match="layer model"):
        MaskedModel(source, wanted, masks, relaxation=None, prior=Prior(), seed=0, dtype=torch.float32)
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_seed_chooses_the_text(base: Path, monkeypatch):
    seeds: list[int] = []
    own = job.training_text
    monkeypatch.setattr(
        job, "training_text", lambda *given, seed, **more: seeds.append(seed) or own(*given, seed=seed, **more)
    )
    for seed in (0, 7):
        learn(load_model(base), None, preset=replace(FAST, steps=1), seed=seed)
    assert seeds == [0, 7]


def test_a_plan_counts_the_recovery(base: Path):
    plain, more = (
        plan_learn(base, LearnOptions(data=DATA, held_out=4, preset=FAST, recover=recover))
        for recover in (None, {"steps": 10, "sequences": 2})
    )
    assert plain.recovery_seconds is None and more.recovery_seconds > 0 and more.disk_bytes > plain.disk_bytes
    assert "recovery after it, about" in dict(more.lines()) and "recovery after it, about" not in dict(plain.lines())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prior": "wandering"}, "neither a method"),
        ({"prior": {}}, "no mask for"),
        ({"shard": True}, "shards need several processes"),
        ({"preset": replace(FAST, sequences=117)}, "a step takes 117"),
    ],
)
def test_what_a_run_refuses_its_plan_refuses(base: Path, tmp_path: Path, options, message: str):
    said = {"data": DATA, "held_out": 4, "preset": FAST} | options
    errors = []
    for call in (lambda: learn(base, tmp_path / "out", **options), lambda: plan_learn(base, LearnOptions(**said))):
        with pytest.raises(tp.TopiaristError, match=message) as refused:
            call()
        errors.append(str(refused.value))
    assert errors[0] == errors[1]


@pytest.mark.parametrize("pattern", ["2:4", "4:8"])
def test_a_disk_is_asked_for_what_states_take(base: Path, tmp_path: Path, pattern: str):
    options = {"pattern": pattern, "relaxation": "categorical"}
    stopped(base, tmp_path / "out", 0, **options)
    state = (tmp_path / "out" / STATES / "learning.safetensors").stat().st_size
    plan = plan_learn(base, LearnOptions(data=DATA, held_out=4, preset=FAST, **options))
    assert 2 * state * 0.9 < plan.disk_bytes - open_model(base).whole().nbytes < 2 * state * 1.1


def test_blocks_keep_a_forward_of_their_own(base: Path):
    model, calls = load_model(base), []
    block = model.model.layers[0]
    block.forward = lambda *args, **kwargs: calls.append(0) or type(block).forward(block, *args, **kwargs)
    own = block.forward
    learn(model, None, steps=1, activation_checkpointing=True, recover={"steps": 1})
    assert calls and block.forward is own and "forward" not in vars(model.model.layers[1])


def test_copies_decide_by_one_certainty(base: Path, monkeypatch):
    told: list[Any] = []
    own = Processes.on_main
    monkeypatch.setattr(Processes, "on_main", lambda self, call: told.append(own(self, call)) or told[-1])
    report = learn(load_model(base), None, preset=replace(FAST, steps=8))
    certain = [entry["certainty"] for entry in report.history if entry["certainty"] is not None]
    assert certain and [found[0] / found[1] for found in told if isinstance(found, tuple)] == certain


def test_a_broken_loss_stops_and_keeps_the_last_good_state(base: Path, tmp_path: Path, monkeypatch):
    from topiarist.pipelines.learning.trainer import MaskTrainer

    whole = MaskTrainer._loss

    def broken(self: MaskTrainer, tokens: torch.Tensor) -> torch.Tensor:
        return whole(self, tokens) * (float("nan") if self.step == 10 else 1.0)

    with monkeypatch.context() as patch:
        patch.setattr(MaskTrainer, "_loss", broken)
        with pytest.raises(tp.NumericalError, match=r"loss of step 11 is not finite; the last good state stays in"):
            learn(base, tmp_path / "out")
    learn(base, tmp_path / "out")
    learn(base, tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_full_disk_keeps_the_last_state(base: Path, tmp_path: Path, monkeypatch):
    import topiarist.checkpoints.atomic as output

    whole, calls = output.save_file, []

    def full(*args: Any, **kwargs: Any) -> None:
        calls.append(args)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        whole(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(output, "save_file", full)
        with pytest.raises(tp.CheckpointError, match="the disk is full"):
            learn(base, tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.tmp"))
    learn(base, tmp_path / "out")
    assert (tmp_path / "out" / "config.json").exists()


def test_tensorboard_is_optional(base: Path, tmp_path: Path):
    try:
        import tensorboard  # noqa: F401
    except ImportError:
        scalars = {"data": DATA, "tensorboard": tmp_path / "scalars"}
        for call in (
            lambda: learn(load_model(base), None, steps=1, **scalars),
            lambda: plan_learn(base, LearnOptions(preset=FAST, **scalars)),
        ):
            with pytest.raises(tp.TopiaristError, match="TensorBoard is not installed"):
                call()
    else:
        learn(load_model(base), None, steps=1, tensorboard=tmp_path / "scalars")
        assert list((tmp_path / "scalars").iterdir())


def test_reports_read_back(learned: Path):
    report = tp.LearnReport.from_folder(learned)
    plain = json.loads((learned / "pruning_report.json").read_text())
    assert {k: plain[k] for k in report.to_dict()} == json.loads(json.dumps(report.to_dict()))
