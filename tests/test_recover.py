"""Recovery: every kind of result, zeros exact at every step, the arithmetic of a plain loop, resumed to the same bits."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from killing import Kept, Killed
from safetensors.torch import load_file, save_file
from sweep.check import tokens
from sweep.tiny_types import tiny_folder, tiny_model
from torch import nn

import topiarist as tp
from topiarist.cli import main
from topiarist.core.losses import divergence
from topiarist.evaluation.verify import verify
from topiarist.masklearn import Preset, Schedule
from topiarist.models.opened import ObjectModel, open_model
from topiarist.pipelines.recovering.objective import Objective
from topiarist.pipelines.recovering.options import RecoverOptions
from topiarist.pipelines.recovering.plan import plan_recover
from topiarist.pipelines.recovering.scales import scales_of
from topiarist.pipelines.recovering.trainee import Trainee
from topiarist.pipelines.shrinking.distill import Distill, distill
from topiarist.pipelines.training import loop
from topiarist.pipelines.training.batches import Batches, micro_batch_size, split_held_out
from topiarist.pipelines.training.loop import FineTuning
from topiarist.pipelines.training.processes import Processes
from topiarist.pipelines.training.weights import TrainedWeights

TOKENS = tiny.tiny_tokens(40, 32)
SETTINGS: dict[str, Any] = {
    "data": TOKENS, "tokens": 6 * 8 * 32, "sequences": 8, "learning_rate": 3e-3, "held_out": 2, "warmup": 0.0,
}  # fmt: skip
LEARN = Preset(
    steps=2, sequences=4, length=32, lr=Schedule(2e-2, 0.0, "cosine"), tau=Schedule(1.0, 0.05, "exponential"),
    lam=Schedule(1e-5, 0.0), max_norm=1.0, gap=0.02, prior_samples=8,
)  # fmt: skip


def prune(base: Path, out: Path, how: str) -> None:
    shrink = {"method": "magnitude", "keep": 0.6, "refit": False}
    if how == "learned":
        tp.learn(base, out, data=TOKENS, preset=LEARN, prior="magnitude", evaluate_every=2)
    elif how in ("uniform", "padded", "hetero"):
        scope = {} if how == "uniform" else {"scope": "parameters", "max_waste": 2.0}
        tp.shrink(base, out, layout=how, units=["channels"], round_to=8, **shrink, **scope)
    else:
        tp.prune(base, out, method="wanda", pattern=how, calibration=TOKENS[:8])


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {key: value for path in sorted(folder.glob("*.safetensors")) for key, value in load_file(path).items()}


def pruned_model() -> Any:
    model = tiny.tiny_model()
    tp.prune(model, method="magnitude")
    return model


def loss_of(model: Any, teacher: Any) -> float:
    with torch.no_grad():
        return float(divergence(model(TOKENS).logits, teacher(TOKENS).logits))


@pytest.mark.parametrize(
    ("family", "how", "kind"),
    [
        ("llama", "2:4", "full"),
        ("llama", "2:4", "lora"),
        ("gpt2", "0.6", "full"),  # Conv1D, a tied head
        ("gpt2", "0.6", "lora"),
        ("mixtral", "2:4", "full"),  # fused experts, stored one by one
        ("llama", "learned", "full"),
        ("llama", "uniform", "full"),
        ("llama", "padded", "lora"),
        ("llama", "hetero", "full"),
    ],
)
def test_every_result_recovers_and_keeps_its_zeros(family: str, how: str, kind: Any, tmp_path: Path):
    base = tiny.tiny_checkpoint(tmp_path / "base", family, dtype=torch.bfloat16)
    prune(base, tmp_path / "pruned", how)
    report = tp.recover(tmp_path / "pruned", tmp_path / "out", kind=kind, **SETTINGS)
    assert report.best["loss"] < report.before and report.steps == 6
    before, after = (tensors(tmp_path / name) for name in ("pruned", "out"))
    assert {k: (v.shape, v.dtype) for k, v in before.items()} == {k: (v.shape, v.dtype) for k, v in after.items()}
    if how not in ("uniform", "hetero"):
        assert report.weights["held"] > 0
        assert tp.audit(tmp_path / "pruned")[0]["pattern"] == tp.audit(tmp_path / "out")[0]["pattern"]
        for name, value in before.items():
            if value.ndim == 2 and float((value == 0).float().mean()) > 0.01:
                assert not after[name][value == 0].any(), name
                assert not (torch.signbit(after[name]) & (after[name] == 0)).any(), name
    teacher, pruned, recovered = (tp.load_pruned(tmp_path / name).float() for name in ("base", "pruned", "out"))
    assert loss_of(recovered, teacher) < loss_of(pruned, teacher)
    if how in ("2:4", "0.6", "learned"):
        assert verify(tmp_path / "out").holds


def test_zeros_are_exact_at_every_step():
    model = tiny.tiny_model()
    tp.prune(model, method="wanda", calibration=TOKENS[:8])
    zeros = {name: p == 0 for name, p in model.named_parameters() if p.ndim == 2 and (p == 0).any()}
    seen: list[int] = []

    def check(what: str, done: int, total: int) -> None:
        for name, mask in zeros.items():
            assert not model.get_parameter(name)[mask].any()
        seen.append(done)

    tp.recover(model, teacher=tiny.tiny_model(), progress=check, **SETTINGS)
    assert seen == [1, 2, 3, 4, 5, 6] and len(zeros) == 14


def test_it_is_the_arithmetic_of_a_plain_loop_that_holds_the_zeros():
    """The user's own loop: fp32 weights, torch's AdamW, masks.hold."""
    model, own, teacher = tiny.tiny_model(), tiny.tiny_model(), tiny.tiny_model()
    for one in (model, own):
        tp.prune(one, method="wanda", calibration=TOKENS[:8])
    tp.recover(model, teacher=teacher, **{**SETTINGS, "batch_size": 8, "evaluate_every": 6, "embeddings": True})
    trained, _ = split_held_out(len(TOKENS), 2)
    tokens, batches = TOKENS[trained], Batches(int(trained.sum()), 8, 0)
    optimizer = torch.optim.AdamW(own.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    with tp.masks.hold(own):
        for step in range(6):
            optimizer.param_groups[0]["lr"] = 3e-3 * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * step / 6))).item()
            batch = tokens[batches.rows(step)]
            divergence(own(batch).logits, teacher(batch).logits.detach()).backward()
            nn.utils.clip_grad_norm_(own.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    for (name, a), b in zip(model.named_parameters(), own.parameters(), strict=True):
        torch.testing.assert_close(a, b, msg=name, rtol=1e-4, atol=1e-6)


def test_micro_batches_are_of_one_size_as_large_as_may_be():
    sizes = {sequences: micro_batch_size(sequences, 4) for sequences in (1, 2, 3, 4, 5, 6, 7, 8, 9)}
    assert sizes == {1: 1, 2: 2, 3: 3, 4: 4, 5: 1, 6: 3, 7: 1, 8: 4, 9: 3}


@pytest.mark.parametrize("loss", ["kl", "kl+hidden", "lm"])
def test_micro_batches_and_checkpointing_change_nothing(loss: str):
    def recovered(**options: Any) -> torch.Tensor:
        model = tiny.tiny_model()
        tp.prune(model, method="wanda", calibration=TOKENS[:8])
        teacher = None if loss == "lm" else tiny.tiny_model()
        tp.recover(model, teacher=teacher, loss=loss, **{**SETTINGS, "tokens": 512, **options})
        return model.model.layers[0].mlp.up_proj.weight.detach()

    plain = recovered(batch_size=4)
    assert torch.equal(plain, recovered(batch_size=4, activation_checkpointing=True))
    torch.testing.assert_close(plain, recovered(batch_size=8), rtol=1e-3, atol=1e-4)


def test_what_is_trained_is_what_was_asked_for():
    def changed(**options: Any) -> set[str]:
        model = tiny.tiny_model("gpt2")
        tp.prune(model, method="magnitude")
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        tp.recover(model, teacher=tiny.tiny_model("gpt2"), **{**SETTINGS, "tokens": 256, "warmup": 0.0}, **options)
        moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
        return {name.split(".")[-2] + "." + name.split(".")[-1] for name in moved}

    linears = {"c_attn.weight", "c_proj.weight", "c_fc.weight"}
    assert changed(norms=False) == linears
    assert "ln_f.weight" in changed() and not {"wte.weight", "wpe.weight"} & changed()
    assert {"wte.weight", "ln_f.weight"} <= changed(embeddings=True)
    assert changed(kind="lora", norms=False) == linears


@pytest.mark.parametrize("kind", ["full", "lora", "scales"])
def test_a_killed_recovery_resumes_to_the_same_bits(kind: Any, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(loop, "SAVED_AFTER", 0.0)
    monkeypatch.setattr(loop, "SHARE", 1e9)
    base = tiny.tiny_checkpoint(tmp_path / "base", dtype=torch.bfloat16)
    prune(base, tmp_path / "pruned", "2:4")
    if kind == "scales":
        tp.quantize(tmp_path / "pruned", tmp_path / "quantised", data=TOKENS[:8], group=32)
        (tmp_path / "pruned").rename(tmp_path / "unquantised")
        (tmp_path / "quantised").rename(tmp_path / "pruned")
        kind = "full"
    options = {**SETTINGS, "kind": kind, "evaluate_every": 2}
    tp.recover(tmp_path / "pruned", tmp_path / "whole", **options)

    def kill(what: str, done: int, total: int) -> None:
        if done == 5:
            raise Killed

    with pytest.raises(Killed):
        tp.recover(tmp_path / "pruned", tmp_path / "out", progress=kill, **options)
    steps: list[int] = []
    report = tp.recover(tmp_path / "pruned", tmp_path / "out", progress=lambda _, n, __: steps.append(n), **options)
    assert steps == [5, 6]
    whole, resumed = tensors(tmp_path / "whole"), tensors(tmp_path / "out")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    again = tp.recover(tmp_path / "pruned", tmp_path / "out", **options)
    assert again.evaluations == report.evaluations and again.losses == report.losses
    with pytest.raises(tp.CheckpointError, match="learning_rate was"):
        tp.recover(tmp_path / "pruned", tmp_path / "out", **{**options, "learning_rate": 1e-3})


def test_a_broken_step_is_named_and_the_best_state_stays():
    module = nn.Linear(4, 1, bias=False)
    start = module.weight.detach().clone()
    x = torch.randn(8, 4)

    def loss(step: int) -> torch.Tensor:
        value = (module(x) - 1.0).square().mean()
        return value * float("nan") if step == 3 else value

    def held_out() -> float:
        with torch.no_grad():
            return float((module(x) - 1.0).square().mean())

    tuning, state = FineTuning(steps=5, learning_rate=0.1, evaluate_every=1), Kept()
    with pytest.raises(tp.NumericalError, match=r"loss of recovery step 4 is not finite"):
        tuning.run(module, TrainedWeights({"weight": module.weight}), lambda step: [step], loss, held_out)
    assert held_out() < float((x @ start.T - 1.0).square().mean())
    assert bool(torch.isfinite(module.weight).all()) and state.saved is None
    with pytest.raises(tp.NumericalError, match="step 1 is not finite: nothing is trained yet"):
        tuning.run(module, TrainedWeights({"weight": module.weight}), lambda _: [3], loss, held_out)
    wild = FineTuning(steps=1, learning_rate=1e308)
    with pytest.raises(tp.NumericalError, match="a weight after the last step of recovery is not finite: lower its"):
        wild.run(module, TrainedWeights({"weight": module.weight}), lambda step: [step], loss)


def test_low_rank_updates_of_the_best_state_are_merged_though_an_error_ends_the_training(monkeypatch):
    settings = {**SETTINGS, "kind": "lora", "evaluate_every": 1}
    teacher, whole, broken = tiny.tiny_model(), pruned_model(), pruned_model()
    tp.recover(whole, teacher=teacher, **settings)
    losses: list[torch.Tensor] = []

    def breaking(self: Any, rows: Any, own=Objective.loss) -> torch.Tensor:
        losses.append(own(self, rows) * (float("nan") if len(losses) > 5 else 1.0))
        return losses[-1]

    monkeypatch.setattr(Objective, "loss", breaking)
    before = loss_of(broken, teacher)
    with pytest.raises(tp.NumericalError):
        tp.recover(broken, teacher=teacher, **settings)
    assert loss_of(broken, teacher) < before
    assert all(bool(((p == 0) == (q == 0)).all()) for p, q in zip(broken.parameters(), whole.parameters(), strict=True))


def test_gradients_from_before_play_no_part():
    teacher, clean, used = tiny.tiny_model(), pruned_model(), pruned_model()
    used(TOKENS[:2], labels=TOKENS[:2]).loss.backward()
    first, second = (tp.recover(model, teacher=teacher, **SETTINGS) for model in (clean, used))
    assert first.evaluations == second.evaluations


def test_layers_of_one_weight_take_one_low_rank_update():
    pruned, teacher = (tiny.tiny_model() for _ in range(2))
    for model in (pruned, teacher):
        first, last = model.model.layers
        last.mlp.up_proj.weight = first.mlp.up_proj.weight
    tp.prune(pruned, method="magnitude")
    text = {**SETTINGS, "data": TOKENS[:8], "tokens": 6 * 64, "sequences": 2, "evaluate_every": 1, "held_out": 1}
    report = tp.recover(pruned, teacher=teacher, kind="lora", **text)
    _, held_out = split_held_out(8, 1)
    with torch.no_grad():
        after = float(divergence(pruned(TOKENS[:8][held_out]).logits, teacher(TOKENS[:8][held_out]).logits))
    assert report.best["loss"] < report.before and after == pytest.approx(report.best["loss"], rel=1e-5)


def test_a_matrix_that_is_never_called_takes_no_low_rank_update():
    pruned, dense = (tiny_model("falcon_mamba") for _ in range(2))
    tp.prune(pruned, method="magnitude")
    before = {name: p.detach().clone() for name, p in pruned.named_parameters() if "dt_proj.weight" in name}
    text = {"data": tokens().repeat(5, 1), "tokens": 64, "sequences": 2, "held_out": 2}
    with pytest.warns(UserWarning, match="2 matrices are multiplied in their modules' own way"):
        tp.recover(pruned, teacher=dense, kind="lora", **text)
    assert len(before) == 2 and all(torch.equal(pruned.get_parameter(name), p) for name, p in before.items())
    notes: list[str] = []
    small = copy.deepcopy(dense)
    distill(small, dense, Distill(steps=1), tokens(), batch_size=2, seed=0, on_note=notes.append)
    assert len(notes) == 1 and "2 matrices" in notes[0]


def test_matrices_with_a_forward_of_their_own_take_no_low_rank_update(tmp_path: Path):
    base = tiny_folder(tmp_path / "base", "deepseek_v4")
    tp.prune(base, tmp_path / "pruned", method="magnitude", pattern="2:4")
    with pytest.warns(UserWarning, match="multiplied in their modules' own way"):
        report = tp.recover(
            tmp_path / "pruned",
            tmp_path / "out",
            kind="lora",
            data=tokens().repeat(5, 1),
            tokens=64,
            sequences=2,
            held_out=2,
        )
    assert any("use kind full" in note for note in report.warnings)


def test_a_plan_times_a_step_and_not_a_look(tmp_path: Path, monkeypatch):
    base = tiny.tiny_checkpoint(tmp_path / "base")
    tp.prune(base, tmp_path / "pruned", method="magnitude")
    calls: list[str] = []
    for name in ("loss", "held_out_loss"):
        own = getattr(Objective, name)
        monkeypatch.setattr(Objective, name, lambda *given, own=own, name=name: calls.append(name) or own(*given))
    monkeypatch.setattr("time.perf_counter", lambda: calls.append("clock") or 0.0)
    plan_recover(tmp_path / "pruned", **{**SETTINGS, "sequences": 1})
    asked = [call for call in calls if call != "clock"]
    assert asked == ["held_out_loss", "loss", "loss", "loss", "held_out_loss"]


def test_a_plan_refuses_what_the_run_would(tmp_path: Path):
    base = tiny.tiny_checkpoint(tmp_path / "base")
    tp.prune(base, tmp_path / "pruned", method="magnitude")
    unsaid = tp.load_pruned(tmp_path / "pruned")
    del unsaid.config.pruning_config
    for settings, message in (
        ({"teacher": unsaid}, "is itself pruned: 50% of"),
        ({"shard": True}, "shards need several processes"),
    ):
        for work in (plan_recover, lambda model, **given: tp.recover(model, tmp_path / "out", **given)):
            with pytest.raises(tp.TopiaristError, match=message):
                work(tmp_path / "pruned", **SETTINGS, **settings)


def test_a_dense_model_that_moved_away_is_told_with_the_cure(tmp_path: Path):
    base = tiny.tiny_checkpoint(tmp_path / "base")
    tp.prune(base, tmp_path / "pruned", method="magnitude")
    base.rename(tmp_path / "elsewhere")
    with pytest.raises(tp.CheckpointError, match=r"pruned names cannot be opened: .* or name it with --teacher"):
        tp.recover(tmp_path / "pruned", tmp_path / "out", **SETTINGS)
    with pytest.raises(tp.CheckpointError, match=r"^model folder .*base does not exist"):
        tp.recover(tmp_path / "pruned", tmp_path / "out", teacher=base, **SETTINGS)


def test_files_may_know_a_tied_matrix_by_its_other_name(tmp_path: Path):
    base = tiny.tiny_checkpoint(tmp_path / "base", tie_word_embeddings=True)
    stored = load_file(base / "model.safetensors")
    stored["lm_head.weight"] = stored.pop("model.embed_tokens.weight")
    save_file(stored, base / "model.safetensors", metadata={"format": "pt"})
    tp.prune(base, tmp_path / "pruned", method="magnitude")
    tp.recover(tmp_path / "pruned", tmp_path / "out", embeddings=True, **SETTINGS)
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == stored.keys() and not torch.equal(found["lm_head.weight"], stored["lm_head.weight"])


def test_claims_without_a_pattern_are_refused(tmp_path: Path):
    pruned = pruned_model()
    pruned.config.pruning_config = {"modules": {"model.layers.0.mlp.up_proj": {}}}
    with pytest.raises(tp.CheckpointError, match="claims no pattern"):
        tp.recover(pruned, teacher=tiny.tiny_model(), **SETTINGS)


def test_out_may_be_the_folder_one_stands_in(tmp_path: Path, monkeypatch):
    tp.prune(tiny.tiny_checkpoint(tmp_path / "base"), tmp_path / "pruned", method="magnitude")
    text = tiny.tiny_text(tmp_path)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    report = tp.recover("../pruned", ".", data=str(text), tokens=64, window_tokens=32, sequences=2, held_out=2)
    assert report.steps == 1 and (tmp_path / "here" / "model.safetensors").is_file()


def test_threads_are_heeded_in_python(tmp_path: Path):
    base = tiny.tiny_checkpoint(tmp_path / "base")
    before = torch.get_num_threads()
    try:
        tp.prune(base, tmp_path / "pruned", method="magnitude", threads=before + 1)
        assert torch.get_num_threads() == before + 1
        tp.recover(tmp_path / "pruned", tmp_path / "out", threads=before + 2, **SETTINGS)
        assert torch.get_num_threads() == before + 2
    finally:
        torch.set_num_threads(before)


def test_a_harmful_training_is_not_kept():
    model = tiny.tiny_model()
    tp.prune(model, method="sparsegpt", calibration=TOKENS[:8])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.warns(UserWarning, match="no state was better .* try another learning rate than 3, mostly a lower one"):
        report = tp.recover(model, teacher=tiny.tiny_model(), **{**SETTINGS, "learning_rate": 3.0})
    assert report.best["step"] == 0 and "another learning rate" in report.warnings[-1]
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_refused_before_any_work(tmp_path: Path):
    base = tiny.tiny_checkpoint(tmp_path / "base")
    prune(base, tmp_path / "pruned", "2:4")
    other = tiny.tiny_checkpoint(tmp_path / "wide", vocab_size=300)
    swapped = tiny.tiny_checkpoint(tmp_path / "swapped")
    spoken = json.loads((swapped / "tokenizer.json").read_text())
    vocab = spoken["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (swapped / "tokenizer.json").write_text(json.dumps(spoken))
    shallow = tiny.tiny_checkpoint(tmp_path / "shallow", num_hidden_layers=1)
    few = {**SETTINGS, "data": TOKENS[:6]}
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"teacher": other}, tp.UnsupportedModel, "predicts 300 tokens"),
        ({"teacher": swapped}, tp.UnsupportedModel, "another tokenizer: token 'a' is"),
        ({"teacher": tmp_path / "pruned"}, tp.UnsupportedModel, "is itself pruned"),
        ({"teacher": shallow, "loss": "kl+hidden"}, tp.UnsupportedModel, "block by block"),
        ({"teacher": tmp_path / "none"}, tp.CheckpointError, "none"),
        (few, tp.CalibrationError, "a step takes 8"),
        ({"tokens": 255}, tp.CalibrationError, "below one step of 8 x 32 = 256"),
        (
            {"tokens": 31, "sequences": 1},
            tp.CalibrationError,
            "below one step of 1 x 32 = 32: raise --tokens, or lower --window",
        ),
        ({"data": None}, tp.CalibrationError, "--data"),
        ({"data": TOKENS + 250}, tp.CalibrationError, "outside the model's vocabulary"),
        ({"kind": "lora", "embeddings": True}, tp.TopiaristError, "cannot train embeddings"),
        ({"kind": "half"}, tp.TopiaristError, "kind is 'half'"),
    ]
    for options, error, message in cases:
        with pytest.raises(error, match=message):
            tp.recover(tmp_path / "pruned", tmp_path / "out", **{**SETTINGS, **options})
        assert not (tmp_path / "out").exists(), message


def test_zeros_that_came_back_are_refused(tmp_path: Path):
    base = tiny.tiny_checkpoint(tmp_path / "base")
    prune(base, tmp_path / "pruned", "2:4")
    model = tp.load_pruned(tmp_path / "pruned")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, :4] = 1.0
    model.save_pretrained(tmp_path / "tuned")
    with pytest.raises(tp.CheckpointError, match=r"layers\.1\.mlp\.up_proj no longer keeps its 2:4 zeros"):
        tp.recover(tmp_path / "tuned", tmp_path / "out", teacher=base, **SETTINGS)
    assert not (tmp_path / "out").exists()


def test_a_teacher_with_zeros_is_refused_though_it_says_nothing():
    pruned = tiny.tiny_model()
    tp.prune(pruned, method="magnitude")
    with pytest.raises(tp.UnsupportedModel, match="is itself pruned: 50% of"):
        tp.recover(pruned, teacher=pruned, **SETTINGS)


def test_a_teacher_may_come_from_four_bits():
    dense = tiny.tiny_model()
    with torch.no_grad():
        for weight in (w for w in dense.parameters() if w.ndim == 2):
            step = weight.abs().amax(1, keepdim=True) / 7
            weight.copy_((weight / step).round() * step)
    assert max(float((w == 0).float().mean()) for w in dense.parameters() if w.ndim == 2) > 0.1
    pruned = copy.deepcopy(dense)
    tp.prune(pruned, method="magnitude", pattern="2:4")
    tp.recover(pruned, teacher=dense, **SETTINGS)
    assert all((w == 0).float().mean() >= 0.5 for name, w in pruned.named_parameters() if "proj" in name)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_the_default_rate_goes_by_the_size_of_the_weights_and_the_budget(kind):
    dense = tiny.tiny_model()
    pruned = copy.deepcopy(dense)
    tp.prune(pruned, method="magnitude", pattern="2:4")
    settings = {key: value for key, value in SETTINGS.items() if key != "learning_rate"} | {"kind": kind, "tokens": 512}
    trained = [p for name, p in pruned.named_parameters() if p.ndim == 2 and "layers" in name]
    sizes = [float(p.detach().double().square().mean().sqrt()) for p in trained]
    report = tp.recover(pruned, teacher=dense, **settings)
    typical = sorted(sizes)[(len(sizes) - 1) // 2]
    assert report.learning_rate == pytest.approx({"full": 8e-4, "lora": 1.6e-3}[kind] * typical, rel=1e-5)
    for budget, share in ((199_999, 8e-4 if kind == "full" else 1.6e-3), (200_000, 1.6e-3)):
        trainee = Trainee(ObjectModel(copy.deepcopy(dense)), {}, RecoverOptions(kind=kind, tokens=budget))
        sizes = [float(p.detach().double().square().mean().sqrt()) for p in trainee.changed.values() if p.ndim == 2]
        typical = sorted(sizes)[(len(sizes) - 1) // 2]
        assert trainee.learning_rate(Processes()) == pytest.approx(share * typical, rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 4}, "rank is that of low-rank updates: leave it out, or use kind lora"),
        ({"hidden_weight": 2.0}, "leave it out, or use loss kl"),
        ({"tokens": 100, "window_tokens": 32, "sequences": 4}, "100 tokens is below one step of 4 x 32 = 128"),
    ],
)
def test_settings_that_nothing_would_heed_are_refused(settings, message):
    with pytest.raises(tp.TopiaristError, match=message):
        RecoverOptions(**settings)


def test_a_rank_beyond_the_matrices_is_said():
    model, dense = tiny.tiny_model(), tiny.tiny_model()
    tp.prune(model, method="magnitude", pattern="2:4")
    with pytest.warns(UserWarning, match="rank 4096 is more than 14 of the matrices have"):
        report = tp.recover(model, teacher=dense, kind="lora", rank=4096, **{**SETTINGS, "tokens": 512})
    assert "rank 4096" in report.warnings[0]


def test_a_model_of_zeros_has_no_rate():
    pruned = tiny.tiny_model()
    with torch.no_grad():
        for weight in pruned.parameters():
            weight.zero_()
    settings = {key: value for key, value in SETTINGS.items() if key != "learning_rate"}
    with pytest.raises(tp.NumericalError, match="all weights of the model's matrices are zero"):
        tp.recover(pruned, **settings, loss="lm")


def test_the_table_takes_any_loss(tmp_path: Path, command):
    base = tiny.tiny_checkpoint(tmp_path / "base")
    with torch.no_grad():
        model = tp.load_pruned(base)
        model.lm_head.weight.mul_(1e6)
    model.save_pretrained(tmp_path / "huge")
    tiny.tiny_text(tmp_path)
    words = [
        "--loss",
        "lm",
        "--tokens",
        "64",
        "--window",
        "32",
        "--sequences",
        "1",
        "--held-out",
        "1",
        "--tokenizer",
        base,
    ]
    code, printed, error = command(
        "recover", tmp_path / "huge", tmp_path / "out", "--data", tmp_path / "text.txt", *words
    )
    assert code == 0 and "inf" in printed, error


def test_next_tokens_ask_no_teacher():
    pruned = tiny.tiny_model()
    tp.prune(pruned, method="magnitude")
    with pytest.raises(tp.TopiaristError, match="loss lm asks no teacher"):
        tp.recover(pruned, teacher=tiny.tiny_model(), **SETTINGS, loss="lm")


def test_the_command_recovers_plans_and_refuses(tmp_path: Path, monkeypatch, capsys):
    base = tiny.tiny_checkpoint(tmp_path / "base")
    prune(base, tmp_path / "pruned", "2:4")
    text = tiny.tiny_text(tmp_path, paragraphs=30)
    words = ["topiarist", "recover", str(tmp_path / "pruned"), str(tmp_path / "out"), "--data", str(text)]
    words += ["--tokens", "1k", "--window", "32", "--sequences", "4", "--learning-rate", "3e-3"]

    def run(*more: str) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", [*words, *more])
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out + captured.err

    code, said = run("--plan")
    assert code == 0 and "128 x 7" in said and "peak memory" in said and not (tmp_path / "out").exists()
    code, said = run("--tokens", "many")
    assert code == 2 and "tokens is 'many'" in said
    code, said = run()
    assert code == 0 and "held-out divergence" in said
    report = tp.RecoverReport.from_folder(tmp_path / "out")
    assert report.steps == 7 and report.best["loss"] < report.before
    assert "## Recovered" in (tmp_path / "out" / "README.md").read_text()


def test_trainer_with_held_masks_gives_the_same_model(tmp_path: Path):
    """transformers' Trainer on the same batches; only the order of sums differs."""
    from torch.utils.data import SequentialSampler
    from transformers import Trainer, TrainingArguments

    teacher = tiny.tiny_model().eval()

    class Distiller(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            with torch.no_grad():
                wanted = teacher(inputs["input_ids"]).logits
            return divergence(model(inputs["input_ids"]).logits, wanted)

        def _get_train_sampler(self, *_: Any):
            return SequentialSampler(self.train_dataset)

    model, own = tiny.tiny_model(), tiny.tiny_model()
    for one in (model, own):
        tp.prune(one, method="wanda", calibration=TOKENS[:8])
    pruned = [p.detach().clone() for p in own.parameters()]
    tp.recover(model, teacher=teacher, **{**SETTINGS, "evaluate_every": 6})
    trained, _ = split_held_out(len(TOKENS), 2)
    batches = Batches(int(trained.sum()), 8, 0)
    rows = TOKENS[trained][[row for step in range(6) for row in batches.rows(step)]]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=8, max_steps=6, learning_rate=3e-3, weight_decay=0.0,
        adam_beta1=0.9, adam_beta2=0.95, max_grad_norm=1.0, lr_scheduler_type="cosine", report_to="none", save_strategy="no",
        use_cpu=True, disable_tqdm=True, remove_unused_columns=False,
    )  # fmt: skip
    for frozen in (own.get_input_embeddings(), own.get_output_embeddings()):
        frozen.requires_grad_(False)
    with tp.masks.hold(own):
        Distiller(own, arguments, train_dataset=[{"input_ids": row} for row in rows]).train()
    for (name, a), b, start in zip(model.named_parameters(), own.parameters(), pruned, strict=True):
        torch.testing.assert_close(a, b, msg=name, rtol=1e-3, atol=2e-5)
        assert torch.equal(b, start) == (name in ("model.embed_tokens.weight", "lm_head.weight")), name
        assert torch.equal(a == 0, b == 0) or a.ndim == 1, name


def quantised(tmp_path: Path, **more: Any) -> Path:
    base = tiny.tiny_checkpoint(tmp_path / "base", dtype=torch.bfloat16)
    tp.prune(base, tmp_path / "quantised", method="wanda", pattern="2:4", data=TOKENS[:8], bits=4, group=32, **more)
    return tmp_path / "quantised"


@pytest.mark.parametrize("dtype", ["stored", "float32"])
def test_the_scales_of_a_quantised_folder_learn(dtype: Any, tmp_path: Path):
    came = quantised(tmp_path)
    plan = plan_recover(came, dtype=dtype, **SETTINGS)
    assert plan.disk_bytes - 28 * plan.weights == (came / "model.safetensors").stat().st_size
    report = tp.recover(came, tmp_path / "out", dtype=dtype, **SETTINGS)
    assert (
        plan.weights
        == report.weights["trained"]
        == sum(
            tensor.numel() for name, tensor in tensors(came).items() if name.endswith((".weight_scale", "norm.weight"))
        )
    )
    assert report.best["loss"] < report.before
    before, after = tensors(came), tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        learned = name.endswith((".weight_scale", "norm.weight"))
        assert torch.equal(tensor, after[name]) != learned and tensor.dtype == after[name].dtype, name
        assert not name.endswith("scale") or bool((after[name] > 0).all())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"] == json.loads((came / "config.json").read_text())["quantization_config"]
    assert json.loads((tmp_path / "out" / "pruning_report.json").read_text())["recovery"]["weights"]["after"] == sum(
        tensor.nbytes for tensor in after.values()
    )
    # What is read back predicts what the state that was kept predicted.
    back, teacher = tp.load_pruned(tmp_path / "out"), tp.load_pruned(tmp_path / "base")
    held = TOKENS[~split_held_out(len(TOKENS), 2)[0]]
    with torch.no_grad():
        loss = float(divergence(back(held).logits, teacher(held).logits))
    assert loss == pytest.approx(report.best["loss"], rel=1e-2 if dtype == "stored" else 3e-2)


@pytest.mark.parametrize("dtype", ["stored", "float32"])
def test_the_scales_that_are_written_are_those_that_were_looked_at(dtype: Any, tmp_path: Path, monkeypatch):
    found: dict[str, torch.Tensor] = {}
    train, generator = Trainee.train, torch.Generator().manual_seed(0)

    def trained(self: Trainee, *words: Any) -> Any:
        history = train(self, *words)
        for scale in self.scales.values():
            scale.log.data.copy_(0.1 * torch.randn(scale.log.shape, generator=generator))
            found[scale.name] = scale.scale.clone()
        return history

    monkeypatch.setattr(Trainee, "train", trained)
    tp.recover(quantised(tmp_path), tmp_path / "out", dtype=dtype, **SETTINGS)
    after = tensors(tmp_path / "out")
    assert found.keys() == {name for name in after if name.endswith("_scale")}
    assert all(torch.equal(scale, after[name]) for name, scale in found.items())


def test_scales_of_a_wider_dtype_begin_with_the_weights_that_are_read(tmp_path: Path):
    came = quantised(tmp_path)
    stored = load_file(came / "model.safetensors")
    stored = {name: t.float() * 1.001 if name.endswith("_scale") else t for name, t in stored.items()}
    save_file(stored, came / "model.safetensors", metadata={"format": "pt"})
    model = open_model(came).whole()
    read = {name: parameter.detach().clone() for name, parameter in model.model.named_parameters()}
    scales = scales_of(model)
    assert len(scales) == 14 and all(torch.equal(scale.weight, read[name]) for name, scale in scales.items())


def test_papers_of_a_recovered_quantised_model_say_what_it_is(tmp_path: Path):
    base = tiny.tiny_checkpoint(tmp_path / "base", dtype=torch.bfloat16)
    tp.quantize(base, tmp_path / "came", data=TOKENS[:8], bits=4, group=32)
    tp.recover(tmp_path / "came", tmp_path / "out", **SETTINGS)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "scales and other weights were trained after quantising" in card and "zeros stayed zero" in card
    assert "pruned ones" not in card
    # Of another program there is nothing but the files.
    config = json.loads((tmp_path / "came" / "config.json").read_text())
    del config["pruning_config"]
    (tmp_path / "came" / "config.json").write_text(json.dumps(config))
    for name in ("pruning_report.json", "pruning_run.json"):
        (tmp_path / "came" / name).unlink(missing_ok=True)
    tp.recover(tmp_path / "came", tmp_path / "other", teacher=base, **SETTINGS)
    for name in ("README.md", "pruning_report.html"):
        text = (tmp_path / "other" / name).read_text()
        assert "integers of 4 bits" in text and "ordinary dense tensors" not in text, name


def test_the_rate_of_a_quantised_folder_belongs_to_all_its_matrices(tmp_path: Path):
    model = tiny.tiny_model(dtype=torch.bfloat16)
    with torch.no_grad():
        for block in model.model.layers:
            for matrix in block.mlp.children():
                if isinstance(matrix, nn.Linear):
                    matrix.weight *= 4
    model.save_pretrained(tmp_path / "base")
    tp.quantize(tmp_path / "base", tmp_path / "came", data=TOKENS[:8], group=32, skip=["self_attn"], head=True)
    report = tp.recover(tmp_path / "came", tmp_path / "out", **{**SETTINGS, "learning_rate": None})
    blocks = tp.load_pruned(tmp_path / "came").model.layers
    sizes = [p.detach().float().square().mean().sqrt() for p in blocks.parameters() if p.ndim > 1]
    assert report.learning_rate == pytest.approx(8e-4 * float(torch.stack(sizes).median()), rel=1e-2)


def test_matrices_that_quantising_left_learn_under_their_zeros(tmp_path: Path):
    base = tiny.tiny_checkpoint(tmp_path / "base", dtype=torch.bfloat16)
    prune(base, tmp_path / "pruned", "2:4")
    tp.quantize(tmp_path / "pruned", tmp_path / "came", data=TOKENS[:8], group=32, skip=["mlp"])
    report = tp.recover(tmp_path / "came", tmp_path / "out", **SETTINGS)
    before, after = tensors(tmp_path / "came"), tensors(tmp_path / "out")
    assert report.best["loss"] < report.before and before.keys() == after.keys()
    for name in (n for n in before if "_proj.weight" in n):
        learned = name.endswith(("_proj.weight", "_scale"))
        assert torch.equal(before[name], after[name]) != learned, name
        assert not name.endswith("_proj.weight") or torch.equal(before[name] == 0, after[name] == 0), name


def test_a_quantised_folder_whose_weights_are_all_zero_is_refused(tmp_path: Path):
    came = quantised(tmp_path)
    stored = load_file(came / "model.safetensors")
    stored = {name: tensor * 0 if name.endswith("_scale") else tensor for name, tensor in stored.items()}
    save_file(stored, came / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(tp.NumericalError, match="all weights of the model's matrices are zero"):
        tp.recover(came, tmp_path / "out", **SETTINGS)
    assert not (tmp_path / "out").exists()


def test_what_a_quantised_folder_does_not_take_is_refused(tmp_path: Path):
    came = quantised(tmp_path)
    with pytest.raises(tp.TopiaristError, match=r"is quantised: its scales learn, .*; use kind full"):
        tp.recover(came, tmp_path / "out", kind="lora", **SETTINGS)
    stored = load_file(came / "model.safetensors")
    stem = "model.layers.0.mlp.up_proj.weight"
    shape = stored.pop(f"{stem}_shape").tolist()
    del stored[f"{stem}_packed"]
    stored[stem], stored[f"{stem}_scale"] = torch.ones(shape, dtype=torch.int8), torch.ones(shape[0], 1)
    save_file(stored, came / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(tp.UnsupportedModel, match=r"up_proj\.weight has no symmetric packed integers"):
        tp.recover(came, tmp_path / "out", **SETTINGS)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("family", "message"),
    [("mixtral", "is one of several that make a parameter"), ("zamba2", "is shared by several layers")],
)
def test_scales_that_cannot_learn_are_refused_before_text_is_read(family: str, message: str, tmp_path: Path):
    tiny_folder(tmp_path / "base", family)
    tp.quantize(tmp_path / "base", tmp_path / "came", bits=8, group="channel")
    with pytest.raises(tp.UnsupportedModel, match=f"{message}, whose scales cannot learn: recover the model that"):
        tp.recover(tmp_path / "came", tmp_path / "out", **{**SETTINGS, "data": TOKENS[:1]})
    assert not (tmp_path / "out").exists()


def test_a_step_that_is_not_finite_keeps_the_last_good_state(tmp_path: Path):
    model = tiny.tiny_model()
    tp.prune(model, method="wanda", calibration=TOKENS[:8])

    def spoil(what: str, done: int, total: int) -> None:
        if done == 4:
            with torch.no_grad():
                model.model.layers[0].mlp.up_proj.weight[0] *= float("inf")

    with pytest.raises(tp.NumericalError, match="recovery step 5 is not finite"):
        tp.recover(model, teacher=tiny.tiny_model(), progress=spoil, **{**SETTINGS, "evaluate_every": 2})
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


def test_a_held_out_loss_that_is_not_finite_ends_the_run(tmp_path: Path):
    prune(tiny.tiny_checkpoint(tmp_path / "base"), tmp_path / "pruned", "2:4")
    one_step = {**SETTINGS, "tokens": 8 * 32, "learning_rate": 1e30}
    with pytest.raises(tp.NumericalError, match="held-out loss of recovery after step 1 is not finite: lower its"):
        tp.recover(tmp_path / "pruned", tmp_path / "out", **one_step)
    assert not (tmp_path / "out").exists()


def test_sequences_longer_than_the_teachers_positions_are_refused(tmp_path: Path):
    prune(tiny.tiny_checkpoint(tmp_path / "base", "gpt2"), tmp_path / "pruned", "0.6")
    short = tiny.tiny_checkpoint(tmp_path / "short", "gpt2", n_positions=16)
    for work in (
        lambda **given: tp.recover(tmp_path / "pruned", tmp_path / "out", **given),
        lambda **given: plan_recover(tmp_path / "pruned", **given),
    ):
        with pytest.raises(
            tp.CalibrationError, match=r"a sequence of 32 tokens is longer than the 16 positions of .*short"
        ):
            work(teacher=short, **SETTINGS)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("saved", [False, True])
def test_a_run_that_broke_leaves_a_folder_if_a_state_is_in_it(saved: bool, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(loop, "SAVED_AFTER", 0.0 if saved else 1e9)
    base, out = tiny.tiny_checkpoint(tmp_path / "base"), tmp_path / "out"
    prune(base, tmp_path / "pruned", "2:4")
    with pytest.raises(tp.NumericalError, match="is not finite: lower its learning rate"):
        tp.recover(tmp_path / "pruned", out, **{**SETTINGS, "learning_rate": 1e38, "evaluate_every": 6})
    assert out.exists() == saved


def test_products_in_fp32_leave_the_stored_dtype(tmp_path: Path):
    base = tiny.tiny_checkpoint(tmp_path / "base", dtype=torch.bfloat16)
    prune(base, tmp_path / "pruned", "2:4")
    tp.recover(tmp_path / "pruned", tmp_path / "out", dtype="float32", **SETTINGS)
    assert {value.dtype for value in tensors(tmp_path / "out").values()} == {torch.bfloat16}
    model = tp.load_pruned(tmp_path / "pruned")
    tp.recover(model, teacher=base, dtype="float32", **SETTINGS)
    written = tensors(tmp_path / "out")
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, written[name]), name


def test_looking_takes_a_tenth_of_the_training():
    options = RecoverOptions()
    assert options.steps_between_looks(1000, 8, 16) == 100
    assert options.steps_between_looks(20, 8, 16) == 10  # two looks at 16 cost as much as 16 of 160 trained sequences
    assert options.steps_between_looks(2, 8, 16) == 2
    assert RecoverOptions(evaluate_every=3).steps_between_looks(1000, 8, 16) == 3


def test_few_tokens_make_small_steps():
    def sequences(tokens: str, processes: int = 1) -> int:
        return RecoverOptions(tokens=tokens).sequences_a_step(512, processes)

    assert [sequences(tokens) for tokens in ("10k", "300k", "600k", "1M", "1B")] == [1, 1, 2, 3, 8]
    assert sequences("300k", 4) == 4 and sequences("1M", 3) == 3
    assert RecoverOptions(tokens="10k", sequences=5).sequences_a_step(512, 1) == 5


def test_a_budget_is_a_whole_number():
    budgets = {text: RecoverOptions(tokens=text).tokens for text in ("1e6", "1.5M", "1.001M", "300k", "7000")}
    assert budgets == {"1e6": 1_000_000, "1.5M": 1_500_000, "1.001M": 1_001_000, "300k": 300_000, "7000": 7000}
    for wrong in ("2q", "many", "1000.5", "1e999", "nan", "k"):
        with pytest.raises(tp.TopiaristError, match="should be a whole number such as 5000, 300k"):
            RecoverOptions(tokens=wrong)


def test_the_report_is_that_of_the_pruned_model_and_repeats(tmp_path: Path):
    base = tiny.tiny_checkpoint(tmp_path / "base")
    prune(base, tmp_path / "pruned", "2:4")
    report = tp.recover(tmp_path / "pruned", tmp_path / "out", **SETTINGS)
    again = tp.RecoverReport.from_folder(tmp_path / "out")
    assert again.to_dict() == report.to_dict() and again.best == report.best and again.tokens == SETTINGS["tokens"]
    stated = json.loads((tmp_path / "out" / "pruning_report.json").read_text())
    assert stated["pipeline"] == "prune" and stated["recovery"]["pipeline"] == "recover"
    assert stated["layers"] == json.loads((tmp_path / "pruned" / "pruning_report.json").read_text())["layers"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())["pruning_config"]
    assert "How recovery went" in (tmp_path / "out" / "pruning_report.html").read_text()
    with pytest.raises(tp.CheckpointError, match="no report of a recovery"):
        tp.RecoverReport.from_folder(tmp_path / "pruned")
    assert config["base_model"] == "../base" and config["recovery"]["held_out_loss"][0] == report.before


def test_a_companion_of_the_weights_as_they_were_is_left_behind(tmp_path: Path):
    base = tiny.tiny_checkpoint(tmp_path / "base")
    tp.prune(base, tmp_path / "pruned", method="wanda", pattern="2:4", data=TOKENS[:8], low_rank=2)
    with pytest.warns(UserWarning, match="low-rank companion"):
        report = tp.recover(tmp_path / "pruned", tmp_path / "out", **SETTINGS)
    assert not (tmp_path / "out" / "adapter").exists() and "left behind" in report.warnings[0]
