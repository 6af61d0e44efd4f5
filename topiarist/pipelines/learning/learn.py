"""Learned masks: a one-shot prior, a training loop on logits over frozen weights, an ordinary pruned checkpoint.

MaskLLM (Fang et al., NeurIPS 2024, arXiv 2409.17481). Choose it when quality at N:M matters more than hours: the weights
stay those of the base model, so that one base serves many masks. Cost: about that of as many steps of full training,
14 bytes a masked weight.

Differs from the authors' code in: 1. the prior is deterministic in `quick` and `standard`: random first logits undo one
weight in forty, which a short run cannot repair. 2. Noise is drawn once a step there, not once a micro-batch. 3. tau falls
exponentially there. 4. Biases stay. 5. A prior that is missing or not of the pattern is an error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from topiarist.checkpoints.writing import SavedState
from topiarist.core.errors import TopiaristError
from topiarist.core.meter import Meter, reset_peak_memory
from topiarist.core.patterns import Pattern, parse_pattern
from topiarist.data import TextFiles
from topiarist.masklearn import Preset
from topiarist.pipelines.common.finish import weights_of
from topiarist.pipelines.learning.files import (
    PRIOR,
    STATE,
    Scalars,
    keep_prior,
    layer_reports,
    mask_in_place,
    open_output,
    write_result,
)
from topiarist.pipelines.learning.job import open_whole, prepare
from topiarist.pipelines.learning.loop import Run
from topiarist.pipelines.learning.masking import targets
from topiarist.pipelines.learning.priors import given_masks, prior_identity
from topiarist.pipelines.learning.recover import Recover, recover_weights
from topiarist.pipelines.learning.report import LearnReport
from topiarist.pipelines.learning.trainer import MaskTrainer
from topiarist.pipelines.training.loop import Progress
from topiarist.pipelines.training.processes import Processes
from topiarist.solvers import SOLVERS


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
    eight_bit: bool = False,
    activation_checkpointing: bool = False,
    shard: bool | None = None,
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
    eight_bit: the optimiser's moments in eight bits, by torchao: 11 bytes, or 7.5 if lean; slow on a CPU.

    The same call on the same `out` goes on where a killed run saved its state, to the same bits, and returns the report
    of a finished one. The masks of the evaluation with the least loss are the result, so it is never worse than its prior
    on the held-out sequences. Under `torchrun` the sequences of a step are divided among the processes; `shard` divides the
    weights and logits too (FSDP2; default: yes, for a model on disk), or leaves each process a copy of the whole.
    Raises a TopiaristError for everything a user can mend.
    """
    meter = Meter()
    reset_peak_memory()
    processes = Processes.join()
    scalars = Scalars(tensorboard if processes.is_main else None)
    identity = prior_identity(prior)
    sharded = processes.size > 1 and not isinstance(model, nn.Module) if shard is None else shard
    _check_sharding(sharded, processes, model, recover)
    # FSDP moves the shards to the accelerator: only the host has to hold the whole model.
    source = open_whole(model, "cpu" if sharded else device, trust_remote_code)
    source.check_output(out)
    checkpoint, name = source.checkpoint, source.name
    job = prepare(
        source, data=data, pattern=parse_pattern(pattern), preset=preset, steps=steps, lean=lean,
        eight_bit=eight_bit, skip=skip, last_block_dense=last_block_dense, batch_size=batch_size, held_out=held_out,
        processes=processes.size, tokenizer=tokenizer,
    )  # fmt: skip
    recipe, wanted, notes = job.recipe, job.targets, job.notes
    given: dict[str, Tensor] = {}
    if not (isinstance(prior, str) and prior in SOLVERS):  # refused, if at all, before anything is written
        processes.on_main(lambda: given.update(given_masks(prior, wanted)))  # pyright: ignore[reportArgumentType]
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
        **({"sharded": True} if sharded else {}),
    }
    calibration = {
        "samples": len(job.training),
        "window": job.text.window,
        "seed": seed,
        "digest": job.text.digest,
        "held_out": len(job.watching),
    }
    report = LearnReport(
        settings=settings, pattern=str(parse_pattern(pattern)), model=name, base_digest=source.digest(),
        calibration=calibration, weights=weights_of(source), warnings=notes,
    )  # fmt: skip
    output = None
    with ExitStack() as held:
        if out is not None:
            fingerprint = {
                "model": report.base_digest,
                "method": "learn",
                "patterns": {k: None if p is None else str(p) for k, p in job.patterns.items()},
                "data": calibration,
                **settings,
            }
            output = processes.on_main(
                lambda: open_output(Path(out), fingerprint, checkpoint, wanted, held, recovers=bool(recovery))
            )
            if output.complete:
                return LearnReport.from_folder(output.folder)
        state = output.state(PRIOR if sharded else STATE).load() if output is not None and processes.is_main else None
        tell = progress or (lambda *_: None)
        run = Run(source, job, processes, tell)
        masks = run.prior_masks(given or prior, state, seed)
        given.clear()
        masked = run.masked(masks, relaxation, seed, lean=lean, sharded=sharded)
        if sharded and output is not None:
            folder = output
            processes.on_main(lambda: state is None and keep_prior(folder, wanted, masks, notes))
        del masks
        try:
            trainer = MaskTrainer(
                masked, job.training, job.watching, recipe,
                batch_size=job.batch_size, seed=seed, distill=distill, processes=processes,
            )  # fmt: skip
            run.resume(trainer, output, state)
            with masked.running(recompute=activation_checkpointing), scalars:
                run.loop(trainer, every, stop, output, scalars)
            report.history = trainer.history
            final = masked.masks(trainer.best_bits)
            report.layers = layer_reports(wanted, final, trainer.flips_by_layer())
        finally:
            masked.restore()
        run.note_if_useless(report)
        if sharded and processes.is_main:  # the dense weights again, whole
            source = open_whole(model, "cpu", trust_remote_code)
            wanted = [target for block in targets(source, job.patterns) for target in block]
        replaced = None
        if recovery is not None:
            replaced = recover_weights(
                source.model, final, recovery, job.training,
                batch_size=job.batch_size, seed=seed, progress=tell, processes=processes,
                state=SavedState() if output is None else output.state("recovery"),
            )  # fmt: skip
        report.run = {**meter.run(source.device), "processes": processes.size}
        if output is not None:
            report.output = str(out)
            folder = output
            processes.on_main(  # nobody returns before the folder is whole
                lambda: write_result(folder, source, wanted, final, replaced, report, job.text)
            )
        if isinstance(model, nn.Module):
            mask_in_place(wanted, final, replaced)
        return report


def _check_sharding(sharded: bool, processes: Processes, model: Any, recover: Any) -> None:
    if not sharded:
        return
    if processes.size == 1:
        raise TopiaristError("shards need several processes: start with torchrun --nproc-per-node N -m topiarist learn")
    if isinstance(model, nn.Module):
        raise TopiaristError("a model object cannot be sharded and given back: pass its folder, or shard=False")
    if recover:
        raise TopiaristError("recovery trains whole weights in every process: leave it out, or use --replicate")
