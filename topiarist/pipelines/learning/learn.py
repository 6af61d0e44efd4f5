"""Learned masks: a one-shot prior, a training loop on logits over frozen weights, an ordinary pruned checkpoint.

MaskLLM (Fang et al., NeurIPS 2024, arXiv 2409.17481). Choose it when quality at N:M matters more than hours: the weights
stay those of the base model, so that one base serves many masks. Cost: about that of as many steps of full training,
14 bytes a masked weight.

Differs from the authors' code in: 1. the prior is deterministic in `quick` and `standard`: random first logits undo one
weight in forty, which a short run cannot repair. 2. Noise is drawn once a step there, not once a micro-batch. 3. tau falls
exponentially there. 4. Biases stay. 5. A prior that is missing or not of the pattern is an error.
"""

from __future__ import annotations

import gc
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from topiarist.checkpoints.writing import SavedState
from topiarist.core.meter import Meter, reset_peak_memory
from topiarist.core.options import given_or_made, plain, takes
from topiarist.models.opened import evaluated
from topiarist.models.quick_attention import quick_attention
from topiarist.pipelines.common.dense import LAST_BLOCK, left_dense, why_dense
from topiarist.pipelines.common.finish import finish, weights_of
from topiarist.pipelines.common.reproduce import command
from topiarist.pipelines.common.reproduce import recipe as repeats
from topiarist.pipelines.learning.files import (
    PRIOR,
    STATE,
    Scalars,
    keep_prior,
    layer_reports,
    mask_in_place,
    open_output,
    write_weights,
)
from topiarist.pipelines.learning.job import divides, open_shell, open_whole, prepare
from topiarist.pipelines.learning.masking import targets
from topiarist.pipelines.learning.options import LearnOptions
from topiarist.pipelines.learning.priors import given_masks, prior_identity
from topiarist.pipelines.learning.report import LearnReport
from topiarist.pipelines.learning.run import Run
from topiarist.pipelines.learning.train_kept import recover_weights
from topiarist.pipelines.learning.trainer import MaskTrainer
from topiarist.pipelines.training.loop import Progress
from topiarist.pipelines.training.processes import Processes, check_same_run
from topiarist.pipelines.training.recompute import blocks_of

SAID = ("pattern", "prior", "preset", "seed")
"""Settings that the command says even at their defaults."""


@takes(LearnOptions)
def learn(
    model: str | Path | nn.Module,
    out: str | Path | None = None,
    *,
    options: LearnOptions | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> LearnReport:
    """Learn the masks of a causal language model on text; its weights stay as they are.

    model: a folder or hub id (`out` is needed), or a model object (pruned in place; written to `out` if given).
    options: all settings as one value, instead of single ones. progress: is told what goes on.

    The same call on the same `out` goes on where a killed run saved its state, to the same bits, and returns the report
    of a finished one. The masks of the evaluation with the least loss are the result, so it is never worse than its prior
    on the held-out sequences. Under `torchrun` the sequences of a step are divided among the processes; `shard` divides the
    weights and logits too, or leaves each process a copy of the whole. Raises a TopiaristError for everything a user can mend.
    """
    options = given_or_made(LearnOptions, options, settings)
    with ExitStack() as held:
        return _learn(model, None if out is None else Path(out), options, progress or (lambda *_: None), held)


def _learn(
    model: str | Path | nn.Module, out: Path | None, options: LearnOptions, progress: Progress, held: ExitStack
) -> LearnReport:
    """Learn as the options say. held: keeps what is open, and locked, until the run ends."""
    prior, recovery = options.prior, options.recover
    meter = Meter()
    reset_peak_memory()
    processes = Processes.join()
    scalars = Scalars(options.tensorboard if processes.is_main else None)
    identity = prior_identity(prior)
    sharded = divides(options, processes, model)
    # FSDP moves the shards to the accelerator: only the main process' host has to hold the whole model.
    if sharded and not processes.is_main:
        source = open_shell(model, options)
    else:
        source = open_whole(model, options, "cpu" if sharded else options.device)
    source.check_output(out)
    check_same_run(processes, options, source, {"out": str(out), "prior": identity})
    held.enter_context(evaluated(source.model))
    name = source.name
    job = prepare(source, options, processes, held, sharded=sharded, out=out, progress=progress)
    recipe, wanted, notes = job.recipe, job.targets, job.notes
    given: dict[str, Tensor] = {}
    # Refused, if at all, before anything is written.
    processes.on_main(lambda: given.update(given_masks(prior, wanted)))
    every = options.evaluate_every or max(1, min(25, recipe.steps // 5))
    preset, seed = options.preset if isinstance(options.preset, str) else "own", options.seed
    asked = {
        "prior": identity,
        "preset": preset,
        **{key: value for key, value in asdict(recipe).items() if key != "source"},
        "relaxation": options.relaxation,
        "last_block_dense": options.last_block_dense,
        "distill": options.distill,
        "recover": plain(recovery),
        "batch_size": job.batch_size,
        "evaluate_every": every,
        "stop": options.stop,
        "lean": options.lean,
        **({"sharded": True} if sharded else {}),
    }
    calibration = {
        "num_windows": len(job.training),
        "window_tokens": job.text.window,
        "seed": seed,
        "digest": job.text.digest,
        "held_out": len(job.held_out),
    }
    processes.check_agreement({"text": calibration})
    words, unsaid = command("learn", source.said, options, always=SAID)
    report = LearnReport(
        settings=asked, pattern=str(options.base_pattern), model=name,
        base_digest=source.digest_before(out), calibration=calibration, weights=weights_of(source), warnings=notes,
        command=words, not_in_command=unsaid,
        recipe=repeats("learn", source.said, options, always=SAID),
    )  # fmt: skip
    output = None
    if out is not None:
        fingerprint = {
            "model": report.base_digest,
            "method": "learn",
            "patterns": {k: None if p is None else str(p) for k, p in job.patterns.items()},
            "data": calibration,
            **asked,
        }
        output = processes.on_main(
            lambda: open_output(
                out, fingerprint, source.nbytes, wanted, held, relaxation=options.relaxation, recovers=bool(recovery)
            )
        )
        if output.complete:
            source.become(output.folder)
            return LearnReport.from_folder(output.folder)
    state = output.state(PRIOR if sharded else STATE).load() if output is not None and processes.is_main else None
    run = Run(source, job, processes, progress)
    masks = run.prior_masks(given or prior, state, seed)
    given.clear()
    masked = run.masked(masks, options.relaxation, seed, lean=options.lean, sharded=sharded)
    if sharded and output is not None:
        folder = output
        processes.on_main(lambda masks=masks: state is None and keep_prior(folder, wanted, masks, notes))
    del masks
    try:
        trainer = MaskTrainer(
            masked, job.training, job.held_out, recipe,
            batch_size=job.batch_size, seed=seed, distill=options.distill, processes=processes,
        )  # fmt: skip
        run.resume(trainer, output, state)
        with masked.running(recompute=options.activation_checkpointing), scalars, quick_attention():
            run.loop(trainer, every, options.stop, output, scalars)
        report.history = trainer.history
        final = masked.masks(trainer.best_bits)
        report.layers = layer_reports(wanted, final, trainer.flips_by_layer())
    finally:
        masked.restore()
    del trainer, masked
    gc.collect()  # layers and optimiser hold each other; logits and moments make room for weights that are read again
    run.note_if_useless(report)
    masked_names = {name for layer in report.layers for name in layer.matrices}
    report.dense = left_dense(source, masked_names, why_dense(job.patterns, options.skip, LAST_BLOCK))
    if sharded and processes.is_main:  # the dense weights again, whole
        source = open_whole(model, options, "cpu")
        wanted = [target for block in targets(source, job.patterns) for target in block]
    replaced = None
    if recovery is not None:
        replaced = recover_weights(
            source.model, final, recovery, job.training,
            batch_size=job.batch_size, seed=seed, progress=progress, processes=processes,
            state=SavedState() if output is None else output.state("recovery"),
            recompute=blocks_of(source) if options.activation_checkpointing else (),
        )  # fmt: skip
    report.run = {**meter.run(source.device), "processes": processes.size}
    written: Path | None = None
    if output is not None:
        folder = output
        written = processes.on_main(lambda: write_weights(folder, source, wanted, final, replaced))
    if source.in_place:
        mask_in_place(wanted, final, replaced)
    if output is not None:
        report.output, report.result_digest, folder = str(out), source.result_digest(), output
        # Nobody returns before the folder is whole.
        processes.on_main(lambda: finish(folder, report, source, text=job.text, written=written))
    return report
