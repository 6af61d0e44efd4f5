"""What a recovery starts from, checked before any work: student, teacher, masks, text."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jaxtyping import Bool, Int
from torch import Tensor, nn

from topiarist.checkpoints.dequantised import DequantisedCheckpoint
from topiarist.checkpoints.reading import claimed_patterns
from topiarist.core.errors import CalibrationError, CheckpointError, TopiaristError, UnsupportedModel
from topiarist.core.grammar import OptionError
from topiarist.core.patterns import parse_pattern
from topiarist.masks import zeros_of
from topiarist.models.opened import OpenedModel
from topiarist.pipelines.common.setup import check_window
from topiarist.pipelines.recovering.options import WINDOW, RecoverOptions
from topiarist.pipelines.recovering.scales import grids_of
from topiarist.pipelines.training.batches import check_sequences
from topiarist.pipelines.training.processes import Processes
from topiarist.pipelines.training.text import Sequences, TrainingText, training_text

PROBE = "The quick brown fox\n\n jumps over 13 lazy dogs; naïve café, 東京.\tfor (i = 0; i < n; ++i) {}"
"""Text that two tokenizers of one vocabulary and different rules are likely to cut differently."""
MANY_ZEROS = 0.3
"""A share of zeros that no matrix of a dense model has: rounding to 4 bits, which it may come from, leaves about a sixth."""


def held_masks(model: OpenedModel) -> dict[str, Bool[Tensor, "..."]]:
    """Masks (True = kept) of the weights of a pruned model in memory, by parameter name; {} if it has no zeros to hold.

    Raises CheckpointError if a matrix no longer keeps the pattern that its config claims: zeros came back.
    """
    claims = claimed_patterns(getattr(model.config, "pruning_config", None) or {})
    for index, path in enumerate(model.block_names):
        for matrix in model.matrices(index):
            claim = claims.get(f"{path}.{matrix.name}")
            if claim is not None and not parse_pattern(claim).holds(matrix.weight != 0):
                raise CheckpointError(
                    f"{model.name}: {path}.{matrix.name} no longer keeps its {claim} zeros, some came back (topiarist "
                    "inspect --verify says where): prune it again, or put its masks on again with topiarist apply"
                )
    return zeros_of(model.model)


def check_quantised(student: OpenedModel, options: RecoverOptions) -> None:
    """Raise UnsupportedModel for a quantised folder whose scales cannot learn, OptionError for options not made for them."""
    if not isinstance(student.checkpoint, DequantisedCheckpoint):
        return
    grids_of(student)
    check_scales_learn(student.name, options)


def check_scales_learn(name: str, options: RecoverOptions) -> None:
    """Raise OptionError for options not made for a quantised folder."""
    for asked, cure in ((options.kind == "lora", "use kind full"), (options.shard, "leave --shard out")):
        if asked:
            raise OptionError(
                f"{name} is quantised: its scales learn, which low-rank updates and shards are not made for; {cure}"
            )


def check_teacher(student: OpenedModel, teacher: OpenedModel, *, hidden: bool) -> None:
    """Raise UnsupportedModel unless the teacher's predictions can be compared with the student's.

    hidden: whether their hidden states are, too. Neither model needs its weights in memory.
    """
    own, other = (model.model.get_output_embeddings().weight.shape[0] for model in (student, teacher))
    if own != other:
        raise UnsupportedModel(
            f"the teacher {teacher.name} predicts {other:,} tokens, {student.name} {own:,}: name the dense model that it "
            "was pruned from"
        )
    claims = claimed_patterns(getattr(teacher.config, "pruning_config", None) or {})
    if claims:
        raise UnsupportedModel(
            f"the teacher {teacher.name} is itself pruned ({next(iter(claims.values()))}): name the dense model"
        )
    own, other = ((len(m.block_names), int(m.text_config.hidden_size)) for m in (student, teacher))
    if hidden and own != other:
        raise UnsupportedModel(
            f"loss kl+hidden compares block by block: {student.name} has {own[0]} of width {own[1]}, {teacher.name} "
            f"{other[0]} of width {other[1]}; use loss kl"
        )
    check_tokenizers(student, teacher)


def check_tokenizers(student: OpenedModel, teacher: OpenedModel) -> None:
    """Raise UnsupportedModel, naming the first token that differs, unless two models' tokenizers cut text alike.

    A model without a tokenizer passes: its tokens were made elsewhere.
    """
    own, other = tokenizer_of(student), tokenizer_of(teacher)
    if own is None or other is None:
        return
    mine, theirs = own.get_vocab(), other.get_vocab()
    differing = [token for token in set(mine) | set(theirs) if mine.get(token) != theirs.get(token)]
    cure = "name the dense model that it was pruned from"
    if differing:
        token = min(differing, key=lambda token: (mine.get(token, theirs.get(token)), token))
        raise UnsupportedModel(
            f"the teacher {teacher.name} has another tokenizer: token {token!r} is {theirs.get(token)} there and "
            f"{mine.get(token)} in {student.name}; {cure}"
        )
    if own(PROBE, add_special_tokens=False)["input_ids"] != other(PROBE, add_special_tokens=False)["input_ids"]:
        raise UnsupportedModel(f"the teacher {teacher.name} cuts text into other tokens than {student.name}; {cure}")


def check_divisible(
    opened: OpenedModel, dense: OpenedModel | None, options: RecoverOptions, processes: Processes
) -> None:
    """Raise TopiaristError unless the processes can divide the sequences of a step, and the models if they are to.

    Neither text nor weights need be read for it.
    """
    if options.sequences is not None:
        check_sequences(options.sequences, processes.size, "change --sequences")
    if not options.shard:
        return
    if processes.size == 1:
        raise TopiaristError(
            "shards need several processes: start with torchrun --nproc-per-node N -m topiarist recover"
        )
    if opened.in_place or (dense is not None and dense.in_place):
        raise TopiaristError("a model object cannot be sharded and given back: pass its folder, or shard=False")
    if options.kind == "lora":
        raise TopiaristError("low-rank updates are cut by masks of whole matrices: use kind full, or leave --shard out")


def tokenizer_of(model: OpenedModel) -> Any:
    """The model's own tokenizer; None if it has none."""
    try:
        return model.tokenizer()
    except CheckpointError:
        return None


def check_dense(teacher: OpenedModel) -> None:
    """Raise UnsupportedModel if a teacher in memory has the zeros of a pruned model, though it does not say so."""
    if zeros := zeros_of(teacher.model, least=MANY_ZEROS):
        name = next(iter(zeros))
        raise UnsupportedModel(
            f"the teacher {teacher.name} is itself pruned: {1 - float(zeros[name].float().mean()):.0%} of {name} are zeros; "
            "name the dense model"
        )


@contextmanager
def text_of(
    model: OpenedModel, options: RecoverOptions, processes: Processes, out: Path | None = None, **more: Any
) -> Iterator[TrainingText]:
    """The training text: of text that is far longer than the budget, no more than the budget takes.

    Raises CalibrationError for a window that is longer than the model's limit.
    """
    check_window(options.window_tokens, model)
    window = options.window_tokens or min(WINDOW, model.limit or WINDOW)
    with training_text(
        model, options.data, window_tokens=window, num_windows=options.tokens // window + options.held_out,
        seed=options.seed, tokenizer=options.tokenizer, bos=options.bos, processes=processes, out=out, **more,
    ) as text:  # fmt: skip
        yield text


def cut_text(
    text: TrainingText, options: RecoverOptions, sequences: int, teacher: OpenedModel | None
) -> tuple[Sequences, Int[Tensor, "held window"], int]:
    """Return (training sequences, held-out sequences, steps).

    sequences: a step. Raises CalibrationError for too little text or budget, and for sequences with more tokens than the
    teacher has positions.
    """
    if teacher is not None:
        teacher.check_length(text.window, f"a sequence of {text.window} tokens", f"--window {teacher.limit}")
    trained, held_out = text.split(options.held_out)
    if len(trained) < sequences:
        raise CalibrationError(
            f"training text holds {len(trained)} sequences of {text.window} tokens beside {len(held_out)} held-out ones, "
            f"a step takes {sequences}: add text, or shorten the window"
        )
    options.check_budget(sequences, text.window)
    return trained, held_out, options.tokens // (sequences * text.window)


def trained_parameters(model: Any, options: RecoverOptions) -> dict[str, nn.Parameter]:
    """Return the parameters that are trained as they are, by name: all but those that the options leave out."""
    embedded = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    if (head := model.get_output_embeddings()) is not None:
        embedded.add(id(head.weight))

    def wanted(parameter: nn.Parameter) -> bool:
        if id(parameter) in embedded:
            return options.embeddings
        return options.norms if parameter.ndim == 1 else options.kind == "full"

    return {name: p for name, p in model.named_parameters() if p.is_floating_point() and wanted(p)}
