"""Any architecture: a sample of the sweep (tests/sweep), and each thing by itself that a model can do differently."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from sweep.check import check_type, later_tokens_matter, tokens
from sweep.tiny_types import tiny_folder, tiny_model

import topiarist as tp
from topiarist.models import derive
from topiarist.models.families import FAMILIES, Family
from topiarist.models.names import DiskNames
from topiarist.models.opened import open_model
from topiarist.pipelines.common.stream import BlockStream, PausedStream

pytestmark = [
    pytest.mark.filterwarnings("ignore::topiarist.core.errors.CalibrationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

SAMPLE = {
    "gpt_oss": "replayed",  # experts stored transposed, multiplied by matmul
    "llama4_text": "replayed",  # all experts in one product
    "deepseek_v3": "replayed",  # a stored buffer decides the routing; matrices of low rank; shared experts
    "phimoe": "replayed",  # other names on disk
    "gemma3n_text": "paused",  # hidden states of four axes, keys shared by layers
    "glm_moe_dsa": "paused",  # blocks hand on what they chose
    "zamba": "replayed",  # one transformer layer used by several blocks; recurrent layers
    "mamba": "replayed",  # a matrix that is multiplied and never called
}


@pytest.mark.parametrize("model_type", SAMPLE)
def test_a_type_without_a_row_is_pruned_rightly(model_type: str, tmp_path: Path):
    base = tiny_folder(tmp_path / "base", model_type)
    outcome = check_type(base, tmp_path / "out")
    assert (outcome.why, outcome.way) == ("", SAMPLE[model_type])
    assert outcome.matrices


def test_the_text_decoder_of_an_image_text_model_is_pruned_and_its_tower_said(tmp_path: Path):
    base = tiny_folder(tmp_path / "base", "gemma3", "image-text")
    opened = open_model(base)
    assert opened.family.blocks == "model.language_model.layers"
    assert any("vision_tower" in note and "stays dense" in note for note in opened.unpruned())
    assert check_type(base, tmp_path / "out").why == ""


def test_a_model_that_places_tensors_where_its_first_parameter_is_runs_without_its_tower(tmp_path: Path):
    base = tiny_folder(tmp_path / "base", "idefics3", "image-text")  # that parameter is the tower's
    report = tp.prune(base, tmp_path / "out", method="wanda", calibration=tokens())
    assert report.layers and all(layer.name.startswith("model.text_model.layers") for layer in report.layers)


def test_a_block_that_runs_twice_a_forward_is_refused_before_anything_is_written(tmp_path: Path):
    base = tiny_folder(tmp_path / "base", "hrm_text")
    with pytest.raises(tp.UnsupportedModel, match="called more than once a forward"):
        tp.prune(base, tmp_path / "out", method="wanda", calibration=tokens(), refine=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("model_type", "fields"),
    [
        ("gpt_oss", {}),  # by matmul
        ("llama4_text", {}),  # all experts in one product
        ("mixtral", {"intermediate_size": 32}),  # gate above up is square: no shape would tell
    ],
)
def test_experts_stored_otherwise_than_their_class_says_are_refused(
    model_type: str, fields: Any, tmp_path: Path, monkeypatch
):
    base = tiny_folder(tmp_path / "base", model_type, **fields)
    known = derive.is_transposed
    monkeypatch.setattr(derive, "is_transposed", lambda module: not known(module))
    with pytest.raises(
        tp.UnsupportedModel, match=r"experts\.\w+ is multiplied as \(expert, .* say so in a row of .*: (Tru|Fals)e"
    ):
        tp.prune(base, tmp_path / "out", method="wanda", calibration=tokens())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["Llama4TextExperts", "AriaGroupedExpertsGemm"])  # the second up to transformers 5.0
def test_experts_of_classes_that_do_not_say_how_they_are_stored(name: str):
    assert derive.is_transposed(type(name, (torch.nn.Module,), {})())


@pytest.mark.parametrize("kind", [ValueError, RuntimeError])  # as Jamba's without a GPU and xLSTM's in transformers 5.0
def test_a_block_that_cannot_run_here_is_refused_with_its_own_reason(kind: type, tmp_path: Path, monkeypatch):
    def forward(*_: Any) -> None:
        raise kind("fast kernels are not available\nand more lines")

    base = tiny.tiny_checkpoint(tmp_path / "base")
    monkeypatch.setattr("transformers.models.llama.modeling_llama.LlamaMLP.forward", forward)
    with pytest.raises(tp.UnsupportedModel, match=r"layers\.0 cannot run here \(fast kernels are not available\): "):
        tp.prune(base, tmp_path / "out", method="wanda", calibration=tokens()[:, :16])
    assert not (tmp_path / "out").exists()


def test_blocks_that_the_forward_never_runs_are_refused(tmp_path: Path, monkeypatch):
    base = tiny_folder(tmp_path / "base", "gemma3", "image-text")
    monkeypatch.setitem(FAMILIES, "gemma3", Family(blocks="model.vision_tower.encoder.layers"))
    with pytest.raises(tp.UnsupportedModel, match="not what the model's forward runs: its blocks are never called"):
        tp.prune(base, tmp_path / "out", method="wanda", calibration=tokens())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["mlp.gate", "mlp.gate.weight"])
def test_an_allocation_that_names_a_router_is_refused_with_the_reason(name: str):
    model = tiny.tiny_model("mixtral")
    said = dict.fromkeys(open_model(model).shapes(), "2:4") | {f"model.layers.0.{name}": "0.5"}
    with pytest.raises(tp.PatternError, match=rf"model\.layers\.0\.{name}' .*stays dense \(a router\): leave it out"):
        tp.prune(model, method="magnitude", allocation=said)


def test_names_of_older_and_of_newer_transformers_are_read_and_written_as_they_were(tmp_path: Path):
    base, renamed = tiny_folder(tmp_path / "base", "llava", "image-text"), tmp_path / "renamed"
    shutil.copytree(base, renamed)
    older = load_file(base / "model.safetensors")
    assert "language_model.model.layers.0.mlp.up_proj.weight" in older
    newer = {name.replace("language_model.lm_head", "lm_head"): name for name in older}
    newer = {re.sub(r"^language_model\.model", "language_model", name): old for name, old in newer.items()}
    newer = {re.sub(r"^(?!lm_head)", "model.", name): old for name, old in newer.items()}
    save_file(
        {name: older[old] for name, old in newer.items()}, renamed / "model.safetensors", metadata={"format": "pt"}
    )
    outs = [tmp_path / "out", tmp_path / "out-renamed"]
    for folder, out in zip((base, renamed), outs, strict=True):
        tp.prune(folder, out, method="magnitude", pattern="2:4")
    first, second = (load_file(out / "model.safetensors") for out in outs)
    assert first.keys() == older.keys() and second.keys() == newer.keys()
    assert all(torch.equal(tensor, first[newer[name]]) for name, tensor in second.items())
    assert tp.NM(2, 4).holds(second["model.language_model.layers.0.mlp.up_proj.weight"] != 0)


def test_the_decoder_of_an_encoder_decoder_is_pruned_on_what_its_encoder_reads(tmp_path: Path):
    base = tiny_folder(tmp_path / "base", "florence2", "image-text")
    outcome = check_type(base, tmp_path / "out")
    assert outcome.why == "" and outcome.covered == 1
    names = tp.Report.from_folder(tmp_path / "out").layers
    assert any("encoder_attn.k_proj" in layer.name for layer in names)  # it sees what the encoder puts out
    assert all(layer.name.startswith("model.language_model.decoder.layers") for layer in names)
    assert any("language_model.encoder.layers" in note for note in open_model(base).unpruned())


NEED_LOSS = pytest.mark.parametrize(
    ("call", "what"),
    [
        (lambda base, out: tp.learn(base, out, pattern="2:4", data=tokens(), held_out=4), "learning masks"),
        (lambda base, out: tp.shrink(base, out, data=tokens()), "shrinking"),
        (lambda base, out: tp.recover(base, out, data=tokens()), "recovery"),
        (
            lambda base, out: tp.find_allocation(base, "sensitivity", pattern="0.5", data=tokens()),
            "a rule by curvature",
        ),
    ],
)


@NEED_LOSS
def test_what_needs_a_loss_of_text_alone_refuses_an_encoder_decoder(call, what: str, tmp_path: Path):
    base = tiny_folder(tmp_path / "base", "t5gemma2", "image-text")
    with pytest.raises(tp.UnsupportedModel, match=f"{what} needs the loss of text .* 't5gemma2' is an encoder-decoder"):
        call(base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


SEES_LATER_TOKENS: dict[str, tuple[dict[str, Any], str]] = {
    "bert": ({"is_decoder": False}, "by is_decoder false in config.json .* set is_decoder to true there"),
    "xlnet": ({"attn_type": "bi"}, 'by attn_type "bi" in config.json .* set attn_type to "uni" there'),
    "cpmant": ({}, "every token of this cpmant sees the later ones, whatever"),
}


@NEED_LOSS
@pytest.mark.parametrize("model_type", SEES_LATER_TOKENS)
def test_what_needs_a_loss_of_text_refuses_a_model_that_sees_later_tokens(
    call, what: str, model_type: str, tmp_path: Path
):
    fields, reason = SEES_LATER_TOKENS[model_type]
    base = tiny_folder(tmp_path / "base", model_type, **fields)
    with pytest.raises(tp.UnsupportedModel, match=f"{what} needs a model that predicts .* {reason}"):
        call(base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("model_type", [*SEES_LATER_TOKENS, "xlm"])
def test_what_a_model_sees_is_known(model_type: str):
    bidirectional = {"xlm": {"causal": False}} | {kind: fields for kind, (fields, _) in SEES_LATER_TOKENS.items()}
    for fields, later in (({}, model_type == "cpmant"), (bidirectional[model_type], True)):
        model = tiny_model(model_type, **fields)
        assert later_tokens_matter(model) == bool(derive.sees_later_tokens(model)) == later


@pytest.mark.parametrize("model_type", ["bart", "gpt_neox", "llama", "minimax"])
def test_decoders_see_no_later_tokens(model_type: str):
    model = tiny_model(model_type)
    assert not later_tokens_matter(model) and not derive.sees_later_tokens(model)


@pytest.mark.parametrize(
    ("model_type", "cure"),
    [
        ("vision-encoder-decoder", r"save its decoder alone \(model\.decoder\."),
        ("udop", "prune its modules with prune_module"),
    ],
)
def test_an_encoder_of_other_inputs_is_refused_with_what_would_work(model_type: str, cure: str, tmp_path: Path):
    base = tiny_folder(tmp_path / "base", model_type, "image-text")
    with pytest.raises(tp.UnsupportedModel, match=rf"its encoder takes other inputs than token ids\): {cure}"):
        tp.prune(base, tmp_path / "out", method="wanda", calibration=tokens())
    assert not (tmp_path / "out").exists()


def test_names_of_another_class_are_refused_with_one_of_them(tmp_path: Path):
    base = tiny_folder(tmp_path / "base", "shieldgemma2", "image-text")  # transformers itself finds none of its tensors
    with pytest.raises(
        tp.CheckpointError, match=r"lacks lm_head\.weight and 28 more, and holds model\..* no place for: "
    ):
        open_model(base)


def test_what_is_never_called_stays_dense_and_is_named(tmp_path: Path):
    base = tiny_folder(tmp_path / "base", "bart")
    with pytest.warns(tp.errors.CalibrationWarning, match=r"never called .*, so dense: encoder_attn\.k_proj"):
        report = tp.prune(base, tmp_path / "out", method="wanda", calibration=tokens())
    assert not [layer.name for layer in report.layers if "encoder_attn" in layer.name]
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "out"))
    kept = [name for name in before if "encoder_attn" in name]
    assert kept and all(torch.equal(before[name], after[name]) for name in kept)


def test_low_coverage_is_said_with_what_stays_dense(tmp_path: Path):
    opened = open_model(tiny_folder(tmp_path / "base", "dbrx"))
    (note,) = opened.unpruned()
    assert "only 20% of the weights of the blocks" in note and "ffn.experts.mlp.w1" in note


def test_tensors_that_no_module_uses_are_copied_and_named(tmp_path: Path):
    base = tiny.tiny_checkpoint(tmp_path / "base")
    extra = {"mtp.layers.0.proj.weight": torch.randn(4, 4)}
    save_file(load_file(base / "model.safetensors") | extra, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.warns(UserWarning, match=r"does not use are copied as they are: mtp\.layers\.N\.proj\.weight"):
        tp.prune(base, tmp_path / "out", method="wanda", calibration=tokens()[:, :16])
    out = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(out["mtp.layers.0.proj.weight"], extra["mtp.layers.0.proj.weight"])
    with pytest.warns(UserWarning, match=r"does not use are left out: mtp\.layers\.N\.proj\.weight"):
        report = tp.shrink(base, tmp_path / "small", method="magnitude", refit=False)
    assert any("are left out" in note for note in report.warnings)


@pytest.mark.parametrize("family", ["llama", "mixtral", "qwen3_moe", "gpt2"])
def test_the_paused_forward_gives_the_grams_of_replayed_blocks(family: str):
    model = tiny.tiny_model(family)
    grams: dict[type, dict[str, torch.Tensor]] = {}
    for kind in (BlockStream, PausedStream):
        opened = open_model(model)
        stream = kind(opened, tiny.tiny_tokens(8, 32), batch_size=4, device=torch.device("cpu"))
        found = grams.setdefault(kind, {})
        for index in range(2):
            with torch.no_grad():
                groups = stream.grams(index, opened.load(index), opened.matrices(index))
            found.update({f"{index} {m.name}": group.gram.matrix.clone() for group in groups for m in group.matrices})
            stream.advance(index, opened.load(index))
        stream.close()
    assert grams[BlockStream].keys() == grams[PausedStream].keys() != set()
    assert all(torch.equal(gram, grams[PausedStream][name]) for name, gram in grams[BlockStream].items())
    assert "forward" not in model.get_submodule(open_model(model).block_names[0]).__dict__


@pytest.mark.parametrize("what", ["correct", "refine"])
def test_what_needs_hidden_states_says_so_where_there_are_none(what: str, tmp_path: Path):
    base = tiny_folder(tmp_path / "base", "gemma3n_text")
    with pytest.raises(tp.UnsupportedModel, match="needs hidden states that are one tensor"):
        tp.prune(base, tmp_path / "out", method="wanda", calibration=tokens(), **{what: True})
    assert not (tmp_path / "out").exists()


def test_a_killed_run_of_a_paused_model_resumes_to_the_same_bytes(tmp_path: Path):
    base = tiny_folder(tmp_path / "base", "gemma3n_text")
    options = {"method": "sparsegpt", "calibration": tokens(), "batch_size": 4}
    tp.prune(base, tmp_path / "whole", **options)

    def stop(activity: str, done: int, _: int) -> None:
        if activity == "pruning" and done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tp.prune(base, tmp_path / "out", **options, progress=stop)
    tp.prune(base, tmp_path / "out", **options)
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "out"))
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())


def test_names_on_disk_go_both_ways(tmp_path: Path):
    opened = open_model(tiny.tiny_checkpoint(tmp_path / "base", "mixtral"))
    stored = load_file(tmp_path / "base" / "model.safetensors")
    names = DiskNames(opened.model, stored)
    assert not names.unclaimed
    state = {target: t for first in names.groups for target, t in names.read(first, stored.__getitem__).items()}
    assert state["model.layers.0.mlp.experts.gate_up_proj"].shape == (4, 128, 32)
    back = names.write(state)
    assert back.keys() == stored.keys() and all(torch.equal(tensor, back[name]) for name, tensor in stored.items())


def test_an_expert_that_is_missing_on_disk_is_refused(tmp_path: Path):
    base = tiny.tiny_checkpoint(tmp_path / "base", "mixtral")
    tensors = load_file(base / "model.safetensors")
    for matrix in ("w1", "w2", "w3"):
        del tensors[f"model.layers.1.block_sparse_moe.experts.3.{matrix}.weight"]
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(tp.CheckpointError, match=r"has shape \(3, .*config.json asks for \(4, "):
        open_model(base)
