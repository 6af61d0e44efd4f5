"""Error correction: the least squares it stands for, closer to the dense model, in every kind of block, and after a kill."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch

import topiarist as tp
from topiarist.core.errors import TopiaristError
from topiarist.models.families import FAMILIES, matrices_of
from topiarist.models.opened import ObjectModel, at_rest
from topiarist.pipelines.common.stream import BlockStream
from topiarist.pipelines.pruning.correct import Correct, Corrector
from topiarist.pipelines.pruning.refine import Refine

EXACT = Correct(ridge=0.0)


class Spoiled:
    """The second block of a model whose first block lost half of its weights, and the dense model beside it."""

    def __init__(self, family: str = "llama", *, settings: Correct = EXACT) -> None:
        self.dense, source = tiny.tiny_model(family), ObjectModel(tiny.tiny_model(family))
        self.tokens, self.block = tiny.tiny_tokens(32, 32), source.load(1)
        with at_rest(source.model):
            self.stream = BlockStream(source, self.tokens, batch_size=4, device=torch.device("cpu"))
            self.stream.follow_dense(0, source.load(0))
            for matrix in matrices_of(source.load(0), source.family):
                kept = torch.rand(matrix.shape, generator=torch.Generator().manual_seed(1)) < 0.5
                matrix.assign(matrix.weight * kept)
            self.stream.advance(0, source.load(0))
            self.stream.follow_dense(1, self.block, keep_entering=True)
            self.corrector = Corrector(settings, self.stream, 1, self.block)
            self.by_name = {m.name: m for m in matrices_of(self.block, source.family)}
            self.model = source.model

    def asked(self, *names: str) -> list[torch.Tensor]:
        (group,) = self.corrector.groups([self.by_name[name] for name in names])
        assert group.asked is not None
        return group.asked

    def seen(self, model, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """(inputs of a linear, hidden states after the second block), tokens first."""
        block, inputs = model.model.layers[1], []
        hook = block.get_submodule(name).register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten(0, 1)))
        states = []
        after = block.register_forward_hook(lambda _, __, out: states.append(out))
        with torch.no_grad():
            model(self.tokens)
        hook.remove()
        after.remove()
        return inputs[0].double(), (states[0][0] if isinstance(states[0], tuple) else states[0]).flatten(0, 1).double()


def test_matrices_within_a_block_are_asked_for_the_dense_models_outputs():
    spoiled = Spoiled()
    asked = spoiled.asked("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    x, _ = spoiled.seen(spoiled.model, "self_attn.q_proj")
    x_dense, _ = spoiled.seen(spoiled.dense, "self_attn.q_proj")
    for name, W in zip(("q_proj", "k_proj", "v_proj"), asked, strict=True):
        wanted = x_dense @ spoiled.by_name[f"self_attn.{name}"].weight.double().T
        best = torch.linalg.lstsq(x, wanted).solution.T
        assert torch.allclose(W.double(), best, atol=1e-3 * float(best.abs().max()))


def test_the_last_matrix_is_asked_for_all_that_the_hidden_states_lack():
    spoiled = Spoiled()
    (W,) = spoiled.asked("mlp.down_proj")
    x, states = spoiled.seen(spoiled.model, "mlp.down_proj")
    _, wanted = spoiled.seen(spoiled.dense, "mlp.down_proj")
    old = spoiled.by_name["mlp.down_proj"].weight.double()
    best = torch.linalg.lstsq(x, wanted - states + x @ old.T).solution.T
    assert torch.allclose(W.double(), best, atol=1e-3 * float(best.abs().max()))


def test_a_share_and_a_ridge_keep_weights_near_their_own():
    whole, half, ridged = (Spoiled(settings=s) for s in (EXACT, replace(EXACT, share=0.5), replace(EXACT, ridge=1e4)))
    W = whole.by_name["mlp.down_proj"].weight
    moved, half_moved, ridge_moved = ((s.asked("mlp.down_proj")[0] - W).norm() for s in (whole, half, ridged))
    assert float(half_moved) == pytest.approx(0.5 * float(moved), rel=1e-4)
    assert ridge_moved < 0.01 * moved


@pytest.mark.parametrize(
    ("family", "writers"),
    [
        ("llama", {"self_attn.o_proj", "mlp.down_proj"}),
        ("gpt2", {"attn.c_proj", "mlp.c_proj"}),
        ("gpt_neox", {"attention.dense", "mlp.dense_4h_to_h"}),
        ("opt", {"self_attn.out_proj", "fc2"}),
        ("mixtral", {"self_attn.o_proj"}),
        ("gemma2", set()),  # a norm stands between
    ],
)
def test_what_writes_to_the_hidden_states_is_asked_of_the_block(family: str, writers: set[str]):
    assert Spoiled(family).corrector.writers == writers


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_corrected_model_is_closer_to_the_dense_one(family: str):
    tokens, unseen = tiny.tiny_tokens(64, 32), tiny.tiny_tokens(8, 32, seed=9)
    dense, plain, corrected = (tiny.tiny_model(family) for _ in range(3))
    tp.prune(plain, method="sparsegpt", calibration=tokens, batch_size=4)
    report = tp.prune(corrected, method="sparsegpt", calibration=tokens, batch_size=4, correct=True)
    assert tiny.logits_error(corrected, dense, unseen) < tiny.logits_error(plain, dense, unseen)
    assert report.sparsity == pytest.approx(0.5, abs=2e-3)
    assert "--correct" in report.command


def test_no_share_is_true_sequential():
    plain, corrected = tiny.tiny_model(), tiny.tiny_model()
    tokens = tiny.tiny_tokens(16, 32)
    tp.prune(plain, method="wanda", calibration=tokens, true_sequential=True)
    tp.prune(corrected, method="wanda", calibration=tokens, correct=Correct(share=0.0))
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), corrected.parameters(), strict=True))


def test_refinement_goes_on_from_a_corrected_block():
    model, tokens = tiny.tiny_model(), tiny.tiny_tokens(32, 32)
    report = tp.prune(model, method="alps", calibration=tokens, batch_size=4, correct=True, refine=Refine(epochs=2))
    assert all(block.after <= block.before for block in report.refined)


def test_sparsellm_has_a_target_of_its_own():
    with pytest.raises(TopiaristError, match="drop the error correction"):
        tp.prune(tiny.tiny_model(), method="sparsellm", calibration=tiny.tiny_tokens(), correct=True)


def test_a_resumed_run_gives_the_same_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tiny.tiny_checkpoint(tmp_path / "base", num_hidden_layers=3)
    options = {"method": "wanda", "calibration": tiny.tiny_tokens(16, 32), "batch_size": 4, "correct": True}
    tp.prune(tmp_path / "base", tmp_path / "whole", **options)
    real, calls = Corrector.groups, []

    def stops_in_the_third_block(self, matrices):
        if self.index == 2:
            raise KeyboardInterrupt
        calls.append(self.index)
        return real(self, matrices)

    monkeypatch.setattr(Corrector, "groups", stops_in_the_third_block)
    with pytest.raises(KeyboardInterrupt):
        tp.prune(tmp_path / "base", tmp_path / "out", **options)
    assert calls == [0] * 4 + [1] * 4
    monkeypatch.undo()
    tp.prune(tmp_path / "base", tmp_path / "out", **options)
    for path in (tmp_path / "whole").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()
    with pytest.raises(tp.CheckpointError, match="correct"):
        tp.prune(tmp_path / "base", tmp_path / "out", **(options | {"correct": Correct(share=0.5)}))
