"""How large a finite difference may be, and in what dtype: one Hutchinson probe of the demo model against fp64.

    python -m benchmarks.curvature --tokens 48

Every line is one probe over all matrices of the model with the same random signs: the error of the samples z_j . (H z)_j
relative to those in fp64 with the smallest step (norm over all matrices), and the correlation of their ranks.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor

import topiarist as tp
from demo.assets import model_dir, text_dir
from topiarist.allocate.scores import probe, random_signs
from topiarist.data import calibration_windows, load_tokenizer
from topiarist.evaluation.perplexity import load_model
from topiarist.models.opened import ObjectModel
from topiarist.pipelines.allocating.measure import layers_of, loss_gradients

STEPS = {torch.float64: (1e-3, 1e-2), torch.float32: (1e-3, 1e-2, 3e-2, 1e-1), torch.bfloat16: (1e-2, 1e-1)}


def samples(dtype: torch.dtype, steps: tuple[float, ...], tokens: Tensor) -> dict[float, tuple[Tensor, float]]:
    """(one sample for every matrix, CPU seconds) by relative step."""
    model = load_model(model_dir()).to(dtype)
    source = ObjectModel(model)
    matrices = layers_of(model, source, list(source.shapes()))
    weights = [m.tensor for m in matrices.values()]
    size = sum(w.numel() for w in weights)
    rms = (sum(float(w.double().square().sum()) for w in weights) / size) ** 0.5
    generator = torch.Generator().manual_seed(1)
    signs = [random_signs(w.shape, generator) for w in weights]
    gradients = loss_gradients(model, list(matrices.values()), tokens)
    found = {}
    for step in steps:
        start = time.process_time()
        found[step] = (torch.tensor(probe(gradients, weights, signs, step * rms)), time.process_time() - start)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=48)
    options = parser.parse_args()
    text = tp.text_files(text_dir() / "calibration.jsonl")
    tokens = calibration_windows(text, load_tokenizer(model_dir()), num_samples=1, window=options.tokens).tokens
    reference: Tensor | None = None
    print("| dtype | step | relative error | rank correlation | CPU s |\n|---|---|---|---|---|")
    for dtype, steps in STEPS.items():
        for step, (drawn, seconds) in samples(dtype, steps, tokens).items():
            reference = drawn if reference is None else reference
            error = float((drawn - reference).norm() / reference.norm())
            ranks = torch.stack([drawn, reference]).argsort(1).argsort(1).double()
            line = [
                str(dtype).removeprefix("torch."),
                f"{step:g}",
                f"{error:.4f}",
                f"{float(torch.corrcoef(ranks)[0, 1]):.3f}",
            ]
            print(f"| {' | '.join(line)} | {seconds:.1f} |", flush=True)


if __name__ == "__main__":
    main()
