"""Learned masks: a one-shot prior, a training loop on logits over frozen weights, an ordinary pruned checkpoint.

MaskLLM (Fang et al., NeurIPS 2024, arXiv 2409.17481). Choose it when quality at N:M matters more than hours: the weights
stay those of the base model, so that one base serves many masks. Cost: about that of as many steps of full training,
14 bytes a masked weight.

Differs from the authors' code in: 1. the prior is deterministic in `quick` and `standard`: random first logits undo one
weight in forty, which a short run cannot repair. 2. Noise is drawn once a step there, not once a micro-batch. 3. tau falls
exponentially there. 4. Biases stay. 5. A prior that is missing or not of the pattern is an error.
"""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from topiarist.data import TextFiles
from topiarist.errors import NumericalError
from topiarist.masklearn import Preset, Prior
from topiarist.patterns import Pattern, parse_pattern
from topiarist.pipelines.learn_files import (
    STATE,
    OpenedFolder,
    Scalars,
    layer_reports,
    mask_in_place,
    model_digest,
    open_output,
    read_state,
    write_result,
)
from topiarist.pipelines.learn_job import Job, open_model, prepare
from topiarist.pipelines.learn_report import LearnReport
from topiarist.pipelines.masking import MaskedModel
from topiarist.pipelines.priors import given_masks, one_shot_masks, prior_identity
from topiarist.pipelines.processes import Processes
from topiarist.pipelines.recover import Recover, recover_weights
from topiarist.pipelines.trainer import MaskTrainer
from topiarist.report import peak_memory_bytes, reset_peak_memory
from topiarist.solvers import SOLVERS
from topiarist.sources import LoadedModel
from topiarist.store import OutputFolder

Progress = Callable[[str, int, int], None]
"""(what is going on, done, in all)"""


def learn(
    model: str | Path | nn.Module,
    out: str | Path | None = None,
    *,
    data: TextFiles | Tensor | Sequence[str],
    pattern: str | float | Pattern = "2:4",
    prior: str | Path | Mapping[str, Tensor] | None = "wanda",
    preset: str | Preset = "quick",
    steps: int | None = None,
    relaxation: str | None = None,
    skip: Sequence[str] = (),
    last_block_dense: bool = False,
    distill: float = 0.0,
    recover: Recover | bool = False,
    batch_size: int | None = None,
    held_out: int = 8,
    evaluate_every: int | None = None,
    stop: bool = True,
    seed: int = 0,
    lean: bool = False,
    activation_checkpointing: bool = False,
    tensorboard: str | Path | None = None,
    device: str | torch.device | None = None,
    tokenizer: Any = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> LearnReport:
    """Learn the masks of a causal language model on text; its weights stay as they are.

    model: a folder or hub id (`out` is needed), or a model object (pruned in place; written to `out` if given).
    prior: a one-shot method, whose mask on the dense weights is the start; or a mask file, an .npz, or masks by
    parameter name (transfer to a domain: the prior is a general learned mask). preset: quick, standard, paper, or a
    `Preset`; `steps` changes its length. relaxation: categorical, topn or bernoulli; by default what fits the pattern.
    skip: regular expressions of layers that stay dense. last_block_dense: the most sensitive block stays as it is.
    distill: share of the loss that is the divergence from the dense model's predictions (0.0: none). recover: train the
    kept weights afterwards, under the final mask. batch_size: sequences a forward. held_out: sequences of the training
    text that are only looked at, every `evaluate_every` steps (default: a fifth of them, at most 25), when the state is
    saved too. stop: end early once the masks are decided and no longer move. lean: 9 bytes a masked weight instead of 14.

    The same call on the same `out` goes on where a killed run saved its state, to the same bits, and returns the report
    of a finished one. Under `torchrun` the sequences of a step are divided among the processes.
    Raises a TopiaristError for everything a user can mend.
    """
    started = time.perf_counter()
    reset_peak_memory()
    processes = Processes.join()
    scalars = Scalars(tensorboard if processes.first else None)
    identity = prior_identity(prior)
    source, checkpoint, name = open_model(model, out, device, trust_remote_code)
    job = prepare(
        source, checkpoint, data=data, pattern=parse_pattern(pattern), preset=preset, steps=steps, lean=lean, skip=skip,
        last_block_dense=last_block_dense, batch_size=batch_size, held_out=held_out, processes=processes.size,
        tokenizer=tokenizer,
    )  # fmt: skip
    recipe, wanted, notes = job.recipe, job.targets, job.notes
    given: dict[str, Tensor] = {}
    if not (isinstance(prior, str) and prior in SOLVERS):  # refused, if at all, before anything is written
        processes.once(lambda: given.update(given_masks(prior, wanted)))  # pyright: ignore[reportArgumentType]
    every = evaluate_every or max(1, min(25, recipe.steps // 5))
    recovery = (recover or None) if not isinstance(recover, bool) else Recover() if recover else None
    settings = {
        "prior": identity,
        "preset": preset if isinstance(preset, str) else "own",
        **{key: value for key, value in asdict(recipe).items() if key != "source"},
        "relaxation": relaxation,
        "last_block_dense": last_block_dense,
        "distill": distill,
        "recover": None if recovery is None else asdict(recovery),
        "batch_size": job.batch_size,
        "evaluate_every": every,
        "stop": stop,
        "lean": lean,
    }
    calibration = {
        "samples": len(job.training),
        "window": job.windows.window,
        "seed": seed,
        "digest": job.windows.digest,
        "held_out": len(job.watching),
    }
    report = LearnReport(str(parse_pattern(pattern)), name, settings, calibration, warnings=notes)
    output = None
    if out is not None:
        fingerprint = {
            "model": checkpoint.digest() if checkpoint else model_digest(source.model),
            "method": "learn",
            "patterns": {k: None if p is None else str(p) for k, p in job.patterns.items()},
            "data": calibration,
            **settings,
        }
        output = processes.once(lambda: open_output(Path(out), fingerprint, checkpoint, wanted))
        if output.complete:
            return LearnReport.from_folder(output.folder)
    state = read_state(output.folder / STATE) if output is not None and processes.first else None
    tell = progress or (lambda *_: None)
    run = _Run(source, job, processes, tell)
    masks = run.prior_masks(given or prior, state, seed)
    given.clear()
    options = Prior(gap=recipe.gap, alpha=recipe.alpha, std=recipe.std)
    dtype = torch.bfloat16 if lean else torch.float32
    masked = MaskedModel(source, wanted, masks, relaxation=relaxation, prior=options, seed=seed, dtype=dtype)
    del masks
    try:
        trainer = MaskTrainer(
            masked, job.training, job.watching, recipe,
            batch_size=job.batch_size, seed=seed, distill=distill, processes=processes,
        )  # fmt: skip
        if state is not None:
            trainer.load(*state)
        trainer.share()
        with masked.running(recompute=activation_checkpointing), scalars:
            run.loop(trainer, every, stop, output, scalars)
        report.history = trainer.history
        final = masked.masks()
        report.layers = layer_reports(wanted, final, trainer.flips_by_layer())
    finally:
        masked.restore()
    if report.loss > report.prior_loss:
        run.note(
            f"the learned mask is worse than its prior on held-out training text (loss {report.loss:.3f}, prior "
            f"{report.prior_loss:.3f}): train longer, or with a lower learning rate"
        )
    replaced = None
    if recovery is not None:
        replaced = recover_weights(source.model, final, job.training, recovery, job.batch_size, seed, processes, tell)
    report.run = {
        "seconds": time.perf_counter() - started,
        "peak_memory_bytes": peak_memory_bytes(),
        "threads": torch.get_num_threads(),
        "processes": processes.size,
        "device": str(source.device),
        "torch": torch.__version__,
    }
    if output is not None:
        report.output = str(out)
        folder = output
        processes.once(  # nobody returns before the folder is whole
            lambda: write_result(folder, checkpoint, source, tokenizer, wanted, final, replaced, report, job.windows)
        )
    if isinstance(model, nn.Module):
        mask_in_place(wanted, final, replaced)
    return report


@dataclass
class _Run:
    """What the stages of one run share."""

    source: LoadedModel
    job: Job
    processes: Processes
    progress: Progress

    def note(self, message: str) -> None:
        self.job.notes.append(message)
        warnings.warn(message, UserWarning, stacklevel=3)

    def prior_masks(
        self, prior: Any, state: tuple[dict[str, Tensor], dict[str, str]] | None, seed: int
    ) -> dict[str, Tensor]:
        """The prior's masks: from a saved state, a file, or a one-shot method on some training sequences.

        The first process finds them and tells the others.
        """
        job, wanted = self.job, self.job.targets
        masks: dict[str, Tensor] = {}

        def find() -> list[str]:
            if state is not None:
                masks.update({t.name: t.unpacked(state[0][f"{t.name} prior"]) for t in wanted})
                job.notes[:] = json.loads(state[1]["notes"])
            elif isinstance(prior, dict):
                masks.update(prior)
            else:
                order = torch.randperm(len(job.training), generator=torch.Generator().manual_seed(seed))
                sample = job.training[order[: job.recipe.prior_samples]]
                found, warned = one_shot_masks(
                    self.source, job.blocks, job.patterns, sample, SOLVERS[prior](), progress=self.progress
                )
                masks.update(found)
                return warned
            return []

        self.job.notes.extend(self.processes.once(find))
        if self.processes.size > 1:
            for target in wanted:
                mask = masks.get(target.name, torch.zeros(target.parameter.shape, dtype=torch.bool))
                told = self.processes.same(mask.to(self.source.device, torch.uint8).contiguous())
                masks[target.name] = told.bool()
        return masks

    def loop(self, trainer: MaskTrainer, every: int, stop: bool, output: OpenedFolder | None, scalars: Scalars) -> None:
        """Steps, evaluations and saved states until the end or the stop rule."""
        total, on_cpu = trainer.preset.steps, self.source.device.type == "cpu"
        if not trainer.history:
            self._look(trainer, output, scalars)
        while trainer.step < total and not (stop and trainer.settled):
            loss = trainer.run_step()
            if on_cpu:  # elsewhere reading the loss would make the host wait for the device
                self.progress(f"learning, loss {float(loss):.3f}", trainer.step, total)
            broken = on_cpu and not math.isfinite(float(loss))
            if trainer.step % every == 0 or trainer.step == total or broken:
                self._look(trainer, output, scalars)

    def _look(self, trainer: MaskTrainer, output: OpenedFolder | None, scalars: Scalars) -> None:
        """Evaluate, then save: what is saved is known to be finite."""
        try:
            entry = trainer.evaluate()
        except NumericalError as error:
            kept = f"; the last good state stays in {output.folder}" if output is not None and trainer.history else ""
            raise NumericalError(f"{error}{kept}: lower the learning rate, or use another seed") from error
        scalars.write(entry)
        if output is not None:
            self.processes.once(lambda: self._save(trainer, output))
        perplexity = math.exp(min(entry["hard_loss"], 700.0))
        self.progress(f"hard mask {perplexity:.2f}, {entry['flips']:.2%} changed", trainer.step, trainer.preset.steps)

    def _save(self, trainer: MaskTrainer, output: OpenedFolder) -> None:
        tensors, metadata = trainer.state()
        notes = {"notes": json.dumps(self.job.notes)}  # a resume does not compute the prior and its warnings again
        OutputFolder(output.folder, output.fingerprint).write_state(STATE, tensors, metadata | notes)
