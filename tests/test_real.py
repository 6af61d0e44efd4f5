"""A few tests on the demo's real 135M model. `make test` fetches it first; without it they are skipped."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import topiarist as tp
from demo.assets import model_dir, text_dir
from topiarist.checkpoints.reading import Checkpoint
from topiarist.data import load_tokenizer
from topiarist.evaluation.comparison import held_out_windows
from topiarist.evaluation.perplexity import load_model
from topiarist.models.folder import FolderModel
from topiarist.pipelines.exporting.gguf_file import export_gguf

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not (model_dir() / "config.json").exists(), reason="run `make assets` first"),
]


def test_ties_of_a_model_that_was_4_bit_are_broken_exactly():
    """In about 15 % of its groups of four the second and third magnitude are equal: counts must be exact all the same."""
    source = FolderModel(Checkpoint(model_dir()), device=torch.device("cpu"))
    source.load(3)
    ties = groups = 0
    for matrix in source.matrices(3):
        scores = matrix.weight.float().abs()
        ordered = scores.unflatten(1, (-1, 4)).sort(-1, descending=True).values
        ties += int((ordered[..., 1] == ordered[..., 2]).sum())
        groups += ordered[..., 0].numel()
        mask = tp.NM(2, 4).mask(scores)
        assert bool((mask.unflatten(1, (-1, 4)).sum(-1) == 2).all())
        assert int(tp.Unstructured(0.7).mask(scores).sum()) == tp.Unstructured(0.7).num_kept(matrix.shape)
    assert 0.05 < ties / groups < 0.3


def test_pruned_real_model_opens_keeps_its_pattern_and_still_models_text(tmp_path: Path):
    text = tp.text_files(text_dir() / "heldout_c4.jsonl")
    report = tp.prune(
        model_dir(),
        tmp_path / "out",
        method="sparsegpt",
        pattern="4:8",
        calibration=tp.text_files(text_dir() / "calibration.jsonl"),
        num_samples=4,
        window=256,
    )
    assert len(report.layers) == 210 and report.sparsity == pytest.approx(0.5, abs=1e-6)
    _, matrices = tp.audit(tmp_path / "out")
    assert all(matrix.holds for matrix in matrices)
    windows = held_out_windows(tmp_path / "out", text, window=256, max_windows=4)
    dense = tp.perplexity(load_model(model_dir()), windows).value
    pruned = tp.perplexity(load_model(tmp_path / "out"), windows).value
    # Very little calibration: far from good, yet nowhere near a broken model (its vocabulary is 49,152).
    assert 20 < dense < 80 and dense < pruned < 20 * dense


def test_llama_cpp_goes_on_with_a_text_as_transformers_does(tmp_path: Path):
    llama = pytest.importorskip("xllamacpp")
    pytest.importorskip("gguf")
    done = export_gguf(model_dir(), tmp_path / "model.gguf", type="q8_0")
    about = llama.CommonParams()
    about.model.path, about.n_ctx, about.n_parallel, about.warmup = str(done.path), 64, 1, False
    about.cpuparams.n_threads = about.cpuparams_batch.n_threads = 1
    prompt = load_tokenizer(model_dir())("The history of the city begins with")["input_ids"]
    asked = {"prompt": prompt, "n_predict": 20, "temperature": -1.0, "logprobs": 1}
    steps = llama.Server(about).handle_completions(asked)["choices"][0]["logprobs"]["content"]
    chosen = [step["id"] for step in steps]
    with torch.no_grad():
        logits = load_model(model_dir()).float()(torch.tensor([prompt + chosen])).logits[0]
    ours = logits[len(prompt) - 1 : -1].log_softmax(-1)
    assert len(chosen) == 20
    # the file holds the weights in 8 bits: between two equally good tokens it may take the other one
    worse = ours.amax(-1) - ours[range(20), chosen]
    assert float(worse.max()) < 0.3 and int((worse == 0).sum()) >= 16
