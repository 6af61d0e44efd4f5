"""Learned masks: a one-shot prior, a training loop on logits over frozen weights, an ordinary pruned checkpoint.

MaskLLM (Fang et al., NeurIPS 2024, arXiv 2409.17481). Choose it when quality at N:M matters more than hours: the weights
stay those of the base model, so that one base serves many masks. Cost: about that of as many steps of full training,
14 bytes a masked weight.

Differs from the authors' code in: 1. the prior is deterministic in `quick` and `standard`: random first logits undo one
weight in forty, which a short run cannot repair. 2. Noise is drawn once a step there, not once a micro-batch. 3. tau falls
exponentially there. 4. Biases stay. 5. A prior that is missing or not of the pattern is an error.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from topiarist import __about__
from topiarist.data import TextFiles, Windows, evaluation_windows, load_tokenizer
from topiarist.errors import CalibrationError, CheckpointError, NumericalError, TopiaristError, UnsupportedModel
from topiarist.evaluate import load_model
from topiarist.masklearn import PRESETS, Preset, Prior
from topiarist.masks import MaskFile, save_masks, weight_digest
from topiarist.masks.files import write_masked
from topiarist.models import block_names
from topiarist.patterns import Pattern, parse_pattern
from topiarist.pipelines.learn_report import LearnedLayer, LearnReport, learned_card
from topiarist.pipelines.masking import MaskedModel, Target, targets
from topiarist.pipelines.oneshot import resolve_method, resolve_patterns
from topiarist.pipelines.priors import given_masks, one_shot_masks, prior_identity
from topiarist.pipelines.processes import Processes
from topiarist.pipelines.recover import Recover, recover_weights
from topiarist.pipelines.trainer import MaskTrainer
from topiarist.report import peak_memory_bytes, reset_peak_memory
from topiarist.solvers import SOLVERS
from topiarist.sources import LoadedModel
from topiarist.store import Checkpoint, OutputFolder, locate

STATE = "learning_state.safetensors"
MASKS = "masks.safetensors"
STATE_BYTES = 13
"""Of the state on disk, per masked weight at 2:4: fp32 logits, bf16 moments, the prior's bit."""
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
        **asdict(recipe),
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
    if out is not None and processes.once(lambda: Path(out).is_dir() and not any(Path(out).iterdir())):
        raise CheckpointError(f"{out} exists and is empty: name a folder that does not exist, or remove it")
    if out is not None:
        fingerprint = {
            "model": checkpoint.digest() if checkpoint else _digest(source.model),
            "method": "learn",
            "patterns": {k: None if p is None else str(p) for k, p in job.patterns.items()},
            "data": calibration,
            **settings,
        }
        opened = processes.once(lambda: _opened(Path(out), fingerprint, checkpoint, wanted))
        if opened.complete:
            return LearnReport.from_folder(opened.folder)
        output = opened
    state = _read_state(output.folder / STATE) if output is not None and processes.first else None
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
        with masked.running(recompute=activation_checkpointing), _scalars(tensorboard) as scalars:
            run.loop(trainer, every, stop, output, scalars)
        report.history = trainer.history
        final = masked.masks()
        report.layers = _layers(wanted, final, trainer.flips_by_layer())
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
        if processes.first:
            _write(output, checkpoint, source, tokenizer, wanted, final, replaced, report, job.windows)
        processes.once(lambda: None)  # nobody returns before the folder is whole
    if isinstance(model, nn.Module):
        _mask_in_place(wanted, final, replaced)
    return report


@dataclass(frozen=True)
class Job:
    """What is to be learned and from what, checked before any work is done."""

    recipe: Preset
    patterns: Mapping[str, Pattern | None]
    blocks: list[list[Target]]
    windows: Windows
    training: Tensor
    watching: Tensor
    batch_size: int
    notes: list[str]

    @property
    def targets(self) -> list[Target]:
        return [target for block in self.blocks for target in block]


def prepare(
    source: LoadedModel,
    checkpoint: Checkpoint | None,
    *,
    data: TextFiles | Tensor | Sequence[str],
    pattern: Pattern,
    preset: str | Preset,
    steps: int | None,
    lean: bool,
    skip: Sequence[str],
    last_block_dense: bool,
    batch_size: int | None,
    held_out: int,
    processes: int,
    tokenizer: Any,
) -> Job:
    """Resolve the arguments of `learn`. Raises a TopiaristError for every one that does not fit."""
    recipe = _recipe(preset, steps, lean)
    names = block_names(source.model, source.family)
    dense = [*skip, f"^{re.escape(names[-1])}\\."] if last_block_dense else list(skip)
    patterns, unmatched = resolve_patterns(source, pattern, None, dense)
    blocks = targets(source, patterns)
    if not any(blocks):
        raise TopiaristError("every layer is skipped: nothing to learn")
    notes = [f"--skip {expression!r} matches no layer" for expression in unmatched]
    windows, recipe = _windows(source, checkpoint, data, tokenizer, recipe, notes)
    training, watching = _split(windows.tokens, held_out)
    size = _batch_size(batch_size, recipe.sequences, processes)
    if len(training) < recipe.sequences:
        raise CalibrationError(
            f"training text holds {len(training)} sequences of {windows.window} tokens beside the {len(watching)} that "
            f"are held out, a step takes {recipe.sequences}: add text"
        )
    return Job(recipe, patterns, blocks, windows, training, watching, size, notes)


def _recipe(preset: str | Preset, steps: int | None, lean: bool) -> Preset:
    if isinstance(preset, str) and preset not in PRESETS:
        raise TopiaristError(f"unknown preset {preset!r}; choose one of {', '.join(PRESETS)}")
    recipe = PRESETS[preset] if isinstance(preset, str) else preset
    recipe = recipe if steps is None else replace(recipe, steps=steps)
    if recipe.steps < 1:
        raise TopiaristError(f"learning takes at least one step, got {recipe.steps}")
    return replace(recipe, second_moment="group") if lean else recipe


def open_model(
    model: str | Path | nn.Module,
    out: str | Path | None,
    device: str | torch.device | None,
    trust_remote_code: bool,
    *,
    planning: bool = False,
) -> tuple[LoadedModel, Checkpoint | None, str]:
    """The whole model in memory, its checkpoint if it is on disk, its name."""
    if isinstance(model, nn.Module):
        name = str(getattr(getattr(model, "config", None), "name_or_path", "") or type(model).__name__)
        return LoadedModel(model), None, name
    if out is None and not planning:
        raise CheckpointError("learning the masks of a checkpoint needs an output folder")
    checkpoint = Checkpoint(locate(model))
    if out is not None and Path(out).resolve() == checkpoint.folder.resolve():
        raise CheckpointError(f"{out} is the model itself; choose another output folder")
    if "quantization_config" in checkpoint.config:
        raise UnsupportedModel(f"{checkpoint.folder} is quantised; learn on the original weights, then quantise")
    local = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    loaded = load_model(checkpoint.folder, device=device or local, trust_remote_code=trust_remote_code)
    return LoadedModel(loaded), checkpoint, str(model)


def _windows(
    source: LoadedModel,
    checkpoint: Checkpoint | None,
    data: TextFiles | Tensor | Sequence[str],
    tokenizer: Any,
    recipe: Preset,
    notes: list[str],
) -> tuple[Windows, Preset]:
    """All sequences of the text, and the recipe with the length they have."""
    config: Any = source.model.config
    limit = int(getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or 2048)
    if isinstance(data, Tensor):
        if data.ndim != 2 or data.numel() == 0:
            raise CalibrationError(f"training tokens must be (num, window), got shape {tuple(data.shape)}")
        digest = hashlib.sha256(data.long().numpy().tobytes()).hexdigest()
        windows = Windows(data.long(), digest, frozenset())
    else:
        if recipe.length > limit:
            notes.append(f"sequences of {limit} tokens, the model's limit, instead of the preset's {recipe.length}")
        tokenizer = tokenizer or load_tokenizer(checkpoint.folder if checkpoint else config.name_or_path)
        windows = evaluation_windows(data, tokenizer, window=min(recipe.length, limit))
    if windows.window > limit:
        raise CalibrationError(f"sequences of {windows.window} tokens are longer than the model's limit of {limit}")
    if int(windows.tokens.max()) >= config.vocab_size:
        raise CalibrationError(
            f"training token {int(windows.tokens.max())} is outside the model's vocabulary of {config.vocab_size}: is "
            "this the model's own tokenizer?"
        )
    return windows, replace(recipe, length=windows.window)


def _split(tokens: Tensor, held_out: int) -> tuple[Tensor, Tensor]:
    """(training, held-out) sequences; those held out are spread evenly, so that they resemble the rest."""
    num = len(tokens)
    count = min(held_out, max(1, num // 10))
    if count < 1 or num <= count:
        raise CalibrationError(f"training text holds {num} sequences: too few to train on some and watch others")
    chosen = torch.zeros(num, dtype=torch.bool)
    chosen[[(2 * i + 1) * num // (2 * count) for i in range(count)]] = True
    return tokens[~chosen].contiguous(), tokens[chosen].contiguous()


def _batch_size(asked: int | None, sequences: int, processes: int) -> int:
    if sequences % processes:
        raise CalibrationError(f"{sequences} sequences a step cannot be divided among {processes} processes")
    share = sequences // processes
    if asked is None:
        return math.gcd(share, 2)
    if asked < 1 or share % asked:
        raise CalibrationError(f"batch size {asked} does not divide the {share} sequences of a step and process")
    return asked


def _digest(model: nn.Module) -> str:
    total = hashlib.sha256()
    for name, parameter in model.named_parameters():
        total.update(f"{name} {weight_digest(parameter)}".encode())
    return total.hexdigest()


@dataclass(frozen=True)
class _Opened:
    """An output folder, small enough to be told to other processes."""

    folder: Path
    fingerprint: dict[str, Any]
    complete: bool


def _opened(out: Path, fingerprint: dict[str, Any], checkpoint: Checkpoint | None, wanted: Sequence[Target]) -> _Opened:
    output = OutputFolder(out, fingerprint)
    if output.complete:
        (out / STATE).unlink(missing_ok=True)  # killed between the last file and this
    else:
        weights = sum(target.parameter.numel() for target in wanted)
        # A new state is whole before the old one goes.
        output.begin(2 * STATE_BYTES * weights + (checkpoint.weight_bytes() if checkpoint else 4 * weights))
    return _Opened(out, fingerprint, output.complete)


def _read_state(path: Path) -> tuple[dict[str, Tensor], dict[str, str]] | None:
    if not path.is_file():
        return None
    with safe_open(path, framework="pt") as reader:
        return {key: reader.get_tensor(key) for key in reader.keys()}, dict(reader.metadata())  # noqa: SIM118


class _Scalars:
    """TensorBoard, or nothing."""

    def __init__(self, folder: str | Path | None) -> None:
        self.writer: Any = None
        if folder is not None:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise TopiaristError("TensorBoard is not installed: pip install 'topiarist[logging]'") from None
            self.writer = SummaryWriter(str(folder))

    def __enter__(self) -> _Scalars:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.writer is not None:
            self.writer.close()

    def write(self, entry: Mapping[str, Any]) -> None:
        if self.writer is not None:
            for key in ("loss", "hard_loss", "flips", "certainty"):
                if entry[key] is not None:
                    self.writer.add_scalar(key, entry[key], entry["step"])


_scalars = _Scalars


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

    def prior_masks(self, prior: Any, state: tuple[dict[str, Tensor], Any] | None, seed: int) -> dict[str, Tensor]:
        """The prior's masks: from a saved state, a file, or a one-shot method on some training sequences.

        The first process finds them and tells the others.
        """
        job, wanted = self.job, self.job.targets
        masks: dict[str, Tensor] = {}

        def find() -> list[str]:
            if state is not None:
                masks.update({t.name: t.unpacked(state[0][f"{t.name} prior"]) for t in wanted})
            elif isinstance(prior, dict):
                masks.update(prior)
            else:
                order = torch.randperm(len(job.training), generator=torch.Generator().manual_seed(seed))
                sample = job.training[order[: job.recipe.prior_samples]]
                found, warned = one_shot_masks(
                    self.source, job.blocks, job.patterns, sample, resolve_method(prior), progress=self.progress
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

    def loop(self, trainer: MaskTrainer, every: int, stop: bool, output: _Opened | None, scalars: _Scalars) -> None:
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

    def _look(self, trainer: MaskTrainer, output: _Opened | None, scalars: _Scalars) -> None:
        """Evaluate, then save: what is saved is known to be finite."""
        try:
            entry = trainer.evaluate()
        except NumericalError as error:
            kept = f"; the last good state stays in {output.folder}" if output is not None and trainer.history else ""
            raise NumericalError(f"{error}{kept}: lower the learning rate, or use another seed") from error
        if self.processes.first:
            scalars.write(entry)
            if output is not None:
                OutputFolder(output.folder, output.fingerprint).write_state(STATE, *trainer.state())
        perplexity = math.exp(min(entry["hard_loss"], 700.0))
        self.progress(f"hard mask {perplexity:.2f}, {entry['flips']:.2%} changed", trainer.step, trainer.preset.steps)


def _layers(wanted: Sequence[Target], masks: Mapping[str, Tensor], flips: Sequence[float]) -> list[LearnedLayer]:
    return [
        LearnedLayer(
            target.label,
            target.matrix_names,
            list(target.parameter.shape),
            str(target.pattern),
            1.0 - float(masks[target.name].sum()) / masks[target.name].numel(),
            flipped,
        )
        for target, flipped in zip(wanted, flips, strict=True)
    ]


def _write(
    opened: _Opened,
    checkpoint: Checkpoint | None,
    source: LoadedModel,
    tokenizer: Any,
    wanted: Sequence[Target],
    masks: Mapping[str, Tensor],
    replaced: Mapping[str, Tensor] | None,
    report: LearnReport,
    windows: Windows,
) -> None:
    """The pruned checkpoint, its masks and its papers. The state goes last."""
    output = OutputFolder(opened.folder, opened.fingerprint)
    save_masks(
        output.folder / MASKS,
        masks,
        weights={target.name: target.parameter for target in wanted},
        pattern={target.name: target.pattern for target in wanted},
        base_model=report.model,
        transposed={target.name for target in wanted if target.transposed},
    )
    dense = output.folder.with_name(output.folder.name + ".dense.tmp")
    if checkpoint is None:  # transformers knows the names and the shards of a model object, so it writes it
        shutil.rmtree(dense, ignore_errors=True)
        model: Any = source.model
        try:
            model.save_pretrained(dense)
            if tokenizer is not None:
                tokenizer.save_pretrained(dense)
        except OSError as error:
            shutil.rmtree(dense, ignore_errors=True)
            raise CheckpointError(f"cannot write {dense}: {error}; the learned state is kept") from error
        checkpoint = Checkpoint(dense)
    write_masked(output, checkpoint, MaskFile(output.folder / MASKS), replaced=replaced)
    lines = [f"{h:016x}" for h in sorted(windows.line_hashes)]
    output.write_text("README.md", learned_card(report, __about__.__version__))
    output.write_text("pruning_run.json", json.dumps(report.run, indent=2) + "\n")
    output.write_text("pruning_calibration.json", json.dumps({"digest": windows.digest, "line_hashes": lines}) + "\n")
    config = {**checkpoint.config, "pruning_config": report.pruning_config(__about__.__version__)}
    output.finish(checkpoint.folder, config, report.to_dict())
    shutil.rmtree(dense, ignore_errors=True)
    (output.folder / STATE).unlink(missing_ok=True)


@torch.no_grad()
def _mask_in_place(
    wanted: Sequence[Target], masks: Mapping[str, Tensor], replaced: Mapping[str, Tensor] | None
) -> None:
    for target in wanted:
        parameter = target.parameter
        if replaced is not None:
            parameter.copy_(replaced[target.name])
        parameter.masked_fill_(~masks[target.name].to(parameter.device), 0.0)
