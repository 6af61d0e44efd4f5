"""The stages of one run of learning: its prior, its loop, its saved states."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from topiarist.checkpoints.writing import OutputFolder
from topiarist.core.errors import NumericalError
from topiarist.masklearn import Prior
from topiarist.models.opened import ObjectModel
from topiarist.pipelines.learning.files import SHARDS, STATE, Scalars, packed_prior
from topiarist.pipelines.learning.job import Job
from topiarist.pipelines.learning.masking import MaskedModel
from topiarist.pipelines.learning.priors import one_shot_masks
from topiarist.pipelines.learning.report import LearnReport
from topiarist.pipelines.learning.trainer import MaskTrainer
from topiarist.pipelines.training.loop import Progress
from topiarist.pipelines.training.processes import Processes
from topiarist.pipelines.training.sharded_state import ShardedState
from topiarist.solvers import SOLVERS


@dataclass
class Run:
    """What the stages of one run share."""

    source: ObjectModel
    job: Job
    processes: Processes
    progress: Progress

    def note(self, message: str) -> None:
        """Warn of something, and keep it for the report."""
        self.job.notes.append(message)
        warnings.warn(message, UserWarning, stacklevel=3)

    def note_if_useless(self, report: LearnReport) -> None:
        """Note it if no evaluation had a lower held-out loss than the prior's mask."""
        if report.loss >= report.prior_loss:
            self.note(
                f"no mask was better than the prior on held-out training text (loss {report.prior_loss:.3f}, after the last "
                f"step {report.history[-1]['hard_loss']:.3f}), which is kept: train longer, or with a lower learning rate"
            )

    def masked(
        self, masks: Mapping[str, Tensor], relaxation: str | None, seed: int, *, lean: bool, sharded: bool
    ) -> MaskedModel:
        """The model with its targets as masked layers, each process' share of it if `sharded`."""
        recipe = self.job.recipe
        options: dict[str, Any] = {
            "relaxation": relaxation,
            "prior": Prior(gap=recipe.gap, alpha=recipe.alpha, std=recipe.std),
            "seed": seed,
            "dtype": torch.bfloat16 if lean else torch.float32,
        }
        if sharded:
            # Here alone, for what it needs of torch.distributed takes a quarter of the time that the package takes to import.
            from topiarist.pipelines.learning.sharding import ShardedModel

            return ShardedModel(self.source, self.job.targets, masks, processes=self.processes, **options)
        return MaskedModel(self.source, self.job.targets, masks, **options)

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
                    self.source,
                    job.blocks,
                    job.patterns,
                    sample,
                    SOLVERS[prior](),
                    sweeps=job.recipe.prior_sweeps,
                    progress=self.progress,
                )
                masks.update(found)
                return warned
            return []

        self.job.notes.extend(self.processes.on_main(find))
        if self.processes.size > 1:
            for target in wanted:
                mask = masks.get(target.name, torch.zeros(target.parameter.shape, dtype=torch.bool))
                told = self.processes.broadcast(mask.to(self.source.device, torch.uint8).contiguous())
                masks[target.name] = told.bool()
        return masks

    def resume(
        self,
        trainer: MaskTrainer,
        output: OutputFolder | None,
        state: tuple[dict[str, Tensor], dict[str, str]] | None,
    ) -> None:
        """Go on from the saved state, if there is one: every process from the first one's, or each with its own rows."""
        if not trainer.masked.sharded:
            if state is not None:
                trainer.load(*state)
            trainer.share()
        elif output is not None:
            loop = ShardedState(output.states / SHARDS, self.processes).load(trainer.tensors())
            if loop is not None:
                trainer.go_on(loop)

    def loop(self, trainer: MaskTrainer, every: int, stop: bool, output: OutputFolder | None, scalars: Scalars) -> None:
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

    def _look(self, trainer: MaskTrainer, output: OutputFolder | None, scalars: Scalars) -> None:
        """Evaluate, then save: what is saved is known to be finite."""
        try:
            entry = trainer.evaluate()
        except NumericalError as error:
            kept = f"; the last good state stays in {output.folder}" if output is not None and trainer.history else ""
            raise NumericalError(f"{error}{kept}: lower the learning rate, or use another seed") from error
        scalars.write(entry)
        if output is not None:
            self._save(trainer, output)
        perplexity = math.exp(min(entry["hard_loss"], 700.0))
        self.progress(f"hard mask {perplexity:.2f}, {entry['flips']:.2%} changed", trainer.step, trainer.preset.steps)

    def _save(self, trainer: MaskTrainer, output: OutputFolder) -> None:
        if trainer.masked.sharded:
            state = ShardedState(output.states / SHARDS, self.processes)
            state.save(trainer.step, trainer.tensors(), trainer.progress())
            return
        prior = packed_prior(self.job.targets, trainer.masked.prior_bits)
        notes = {"notes": json.dumps(self.job.notes)}  # a resume does not compute the prior and its warnings again

        self.processes.on_main(lambda: output.state(STATE).save(trainer.tensors() | prior, trainer.progress() | notes))
