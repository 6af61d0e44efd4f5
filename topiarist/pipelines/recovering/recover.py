"""Recovery of a pruned model: its kept weights trained as a whole towards the dense model's predictions, its zeros held.

Differs from block refinement in that every weight sees the end of the model, and that norms learn too.
KL to the dense logits at temperature 1 (Minitron, arXiv 2407.14679, section 3.3), hidden states by SquareHead (Kurtic et
al., arXiv 2310.06927), AdamW without decay on fp32 masters.
"""

from __future__ import annotations

import os
import warnings
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from topiarist.checkpoints.dequantised import QUANTIZATION
from topiarist.checkpoints.references import reference, resolved
from topiarist.checkpoints.writing import ADAPTER, REPORT, OutputFolder, SavedState, bytes_to_write
from topiarist.core.errors import CheckpointError
from topiarist.core.meter import Meter, reset_peak_memory
from topiarist.core.options import given_or_made, plain, takes
from topiarist.models.derive import check_has_text_loss
from topiarist.models.opened import ObjectModel, OpenedModel, open_model
from topiarist.pipelines.common.dense import left_by_training
from topiarist.pipelines.common.finish import weights_of
from topiarist.pipelines.common.reproduce import command, recipe
from topiarist.pipelines.common.setup import open_for
from topiarist.pipelines.recovering.files import bytes_of, write_recovered
from topiarist.pipelines.recovering.inputs import (
    check_dense,
    check_divisible,
    check_quantised,
    check_teacher,
    cut_text,
    held_masks,
    text_of,
)
from topiarist.pipelines.recovering.objective import Objective
from topiarist.pipelines.recovering.options import RecoverOptions
from topiarist.pipelines.recovering.report import RecoverReport
from topiarist.pipelines.recovering.trainee import Trainee, computing_in
from topiarist.pipelines.training.loop import Progress
from topiarist.pipelines.training.processes import Processes, check_same_run
from topiarist.pipelines.training.recompute import blocks_of
from topiarist.pipelines.training.sharded_state import ShardedState
from topiarist.pipelines.training.text import Sequences
from topiarist.pipelines.training.weights import STATE_BYTES
from topiarist.results.first_version import renewed
from topiarist.results.result import json_if_any


@takes(RecoverOptions)
def recover(
    model: str | Path | nn.Module,
    out: str | Path | None = None,
    *,
    teacher: str | Path | nn.Module | None = None,
    options: RecoverOptions | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> RecoverReport:
    """Train a pruned model as a whole, its zeros held exactly at every step.

    model: a pruned folder or hub id (`out` is needed), or a model object (trained in place; written to `out` if given):
    2:4, unstructured, learned, or shrunk in any layout; or a quantised folder, whose integers stay and whose scales learn.
    teacher: the dense model; by default the one that the pruned model's config names. Without `out` nothing is written.
    options: instead of single settings.

    The state with the least loss on a held-out slice of the text is the result, the model as it came among them. The
    same call on the same `out` goes on where a killed run saved its state, to the same bits, and returns the report of a
    finished one. Under `torchrun` the sequences of a step are divided among processes, each with a whole copy or, with
    `shard`, its rows of all weights; they compare settings, models, text and versions before any work.
    Raises a TopiaristError for everything a user can mend.
    """
    meter = Meter()
    reset_peak_memory()
    options = given_or_made(RecoverOptions, options, settings)
    processes = Processes.join()
    opened = open_pruned(model, options)
    opened.check_output(out)
    dense = open_teacher(opened, teacher, options)
    check_divisible(opened, dense, options, processes)
    check_same_run(processes, options, opened, {"out": str(out), "teacher": None if dense is None else dense.digest()})
    tell, place = progress or (lambda *_: None), None if out is None else Path(out)
    with ExitStack() as held:
        text = held.enter_context(text_of(opened, options, processes, place, progress=tell))
        sequences = options.sequences_a_step(text.window, processes.size)
        options = replace(options, sequences=sequences)
        tokens, held_out, steps = cut_text(text, options, sequences, dense)
        report = _report(opened, dense, teacher, options, place)
        report.steps, report.tokens = steps, steps * sequences * text.window
        report.calibration = {
            "num_windows": len(tokens),
            "window_tokens": text.window,
            "held_out": len(held_out),
            "seed": options.seed,
            "digest": text.digest,
        }
        output = None
        processes.check_agreement({"text": report.calibration})
        if place is not None:
            fingerprint = {
                "model": report.base_digest,
                "method": "recover",
                "teacher": None if dense is None else dense.digest(),
                **report.settings,
                "data": report.calibration,
            }
            output = processes.on_main(lambda: OutputFolder(place, fingerprint))
            if output.complete:
                opened.become(output.folder)
                return RecoverReport.from_folder(output.folder)
        computing = held.enter_context(ExitStack())
        divided = None
        if options.shard:
            # Here alone, for what it needs of torch.distributed takes a quarter of the package's time to import.
            from topiarist.pipelines.recovering.sharding import Divided

            divided = Divided(opened, dense, options, processes)
            student, teacher_model, trainee = divided.student, divided.teacher, divided.trainee
        else:
            student = opened.whole()
            masks = held_masks(student)
            teacher_model = None if dense is None else dense.whole()
            if teacher_model is not None:
                check_dense(teacher_model)
            computing.enter_context(computing_in(options.dtype, student, teacher_model))
            trainee = Trainee(student, masks, options)
        objective = make_objective(student, teacher_model, tokens, held_out, options, processes)
        state: SavedState | ShardedState = SavedState()
        if output is not None:
            folder, name = output, "recovery"
            state = ShardedState(folder.states / name, processes) if options.shard else folder.state(name)
            # A new state is whole before the old one goes.
            due = bytes_to_write(bytes_of(opened)) + 2 * (STATE_BYTES + 2) * trainee.count

            def begin() -> bool:
                held.enter_context(folder)
                if not folder.complete:
                    folder.begin(due)
                return folder.complete  # another run may have come and gone since

            if processes.on_main(begin):
                opened.become(folder.folder)
                return RecoverReport.from_folder(folder.folder)
        rate = trainee.learning_rate(processes)
        with meter.timed("training"):
            history = trainee.train(objective, rate, steps, sequences, processes, tell, state)
        scales = {scale.name: scale.scale for scale in trainee.scales.values()}
        computing.close()  # the weights are in their own dtypes again when they are written, what scales are made of too
        report.learning_rate = rate
        report.log(history.losses)
        report.evaluations = [{"step": step, "loss": loss} for step, loss in history.evaluations]
        zeros = trainee.held if divided is None else divided.held
        report.weights = {**weights_of(opened), "trained": trainee.count, "held": zeros}
        report.warnings = [*trainee.notes, *_left_behind(opened)]
        report.note_if_useless()
        if rows := report.pruned.get("dense"):
            report.pruned = {
                **report.pruned,
                "dense": left_by_training(rows, opened, {*trainee.changed, *trainee.scales}),
            }
        report.run = {**meter.run(student.device), "processes": processes.size}
        if output is not None:
            report.output, folder = str(out), output
            report.result_digest = opened.result_digest()
            model, changed = (student.model, trainee.changed) if divided is None else divided.result()
            processes.on_main(  # nobody returns before the folder is whole
                lambda: write_recovered(folder, opened, model, changed, scales, report, text)
            )
    return report


DENSE = {"pipeline": "recover", "method": "recover", "pattern": "dense"}
"""What the report of a model says of it that nothing was pruned of."""


def _report(
    opened: OpenedModel,
    dense: OpenedModel | None,
    teacher: Any,
    options: RecoverOptions,
    out: Path | None,
) -> RecoverReport:
    """What is known before any work."""
    folder = opened.folder
    stated = {} if folder is None else json_if_any(folder / REPORT)
    claims = getattr(opened.config, "pruning_config", None) or {}
    named = claims.get("base_model") or (opened.name if dense is None else dense.name)
    base = named if folder is None else resolved(str(named), folder)
    said = {} if teacher is None else {"teacher": str(teacher) if isinstance(teacher, str | Path) else "TEACHER"}
    words, unsaid = command("recover", opened.said, options)
    pruned = {key: value for key, value in stated.items() if key not in ("fingerprint", "files")}
    return RecoverReport(
        model=opened.name,
        pattern=str(claims.get("pattern", "")),
        settings={key: value for key, value in plain(options).items() if key != "data"},
        teacher=None if dense is None else dense.name,
        base_model=base if out is None else reference(base, out),
        base_digest="" if out is None else opened.digest_before(out),
        steps=0,
        tokens=0,
        command=[*words, *(word for name, value in said.items() for word in (f"--{name}", value))],
        not_in_command=unsaid,
        recipe=recipe("recover", opened.said, options, more=said),
        pruned=renewed(
            {"model": base, **({} if "pattern" in claims else {**DENSE, **_integers(opened)}), **claims, **pruned}
        ),
        claims=claims,
    )


def _integers(opened: OpenedModel) -> dict[str, Any]:
    """Bits and group of a quantised folder that has no report to say them."""
    about = {} if opened.checkpoint is None else opened.checkpoint.as_stored.config.get(QUANTIZATION, {})
    weights = next((group["weights"] for group in about.get("config_groups", {}).values()), {})
    return {"bits": weights["num_bits"], "group": weights.get("group_size")} if "num_bits" in weights else {}


def _left_behind(opened: OpenedModel) -> list[str]:
    """What beside the pruned model does not fit the recovered one."""
    if opened.beside(f"{ADAPTER}/adapter_config.json") is None:
        return []
    note = f"{opened.name} has a low-rank companion, which was made for its weights as they were: it is left behind"
    warnings.warn(note, UserWarning, stacklevel=4)
    return [note]


def open_pruned(model: str | Path | nn.Module, options: RecoverOptions) -> OpenedModel:
    """Open the pruned model for this process' own accelerator."""
    local = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    device = "cpu" if options.shard else options.device or local  # FSDP moves the shards to the accelerator
    opened = open_for(replace(options, device=device), model)
    check_quantised(opened, options)
    check_has_text_loss(opened.model, "recovery")
    return opened


def open_teacher(
    student: OpenedModel, teacher: str | Path | nn.Module | None, options: RecoverOptions
) -> OpenedModel | None:
    """Open the dense model that the loss asks; None if it asks none. Raises a TopiaristError for one that does not fit."""
    options.check_asked(teacher)
    if not options.needs_teacher:
        return None
    given = teacher
    if teacher is None:
        provenance = getattr(student.config, "pruning_config", None) or {}
        teacher = provenance.get("base_model")
        teacher = student.resolve(str(teacher)) if teacher else teacher
        if not teacher:
            raise CheckpointError(
                f"{student.name} does not say which model it was pruned from: name it with --teacher, or use --loss lm"
            )
    try:
        opened = open_model(teacher, device=student.device, trust_remote_code=options.trust_remote_code)
    except CheckpointError as error:
        if given is not None:
            raise
        raise CheckpointError(
            f"the dense model that {student.name} names cannot be opened: {error}; or name it with --teacher, or use --loss lm"
        ) from error
    check_teacher(student, opened, hidden=options.loss == "kl+hidden")
    return opened


def make_objective(
    student: ObjectModel,
    teacher: ObjectModel | None,
    tokens: Sequences,
    held_out: Int[Tensor, "held window"],
    options: RecoverOptions,
    processes: Processes,
) -> Objective:
    """Make the loss that the options ask for."""
    hidden = teacher is not None and options.loss == "kl+hidden"
    blocks = [blocks_of(m) for m in (student, teacher) if m is not None] if hidden else [[], []]
    return Objective(
        student.model,
        None if teacher is None else teacher.model,
        tokens,
        held_out,
        blocks=(blocks[0], blocks[1]),
        hidden_weight=options.hidden_weight or 1.0 if hidden else None,
        processes=processes,
        shards=options.shard,
    )
