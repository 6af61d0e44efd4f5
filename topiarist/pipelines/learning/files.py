"""What a run of learning writes: its state, TensorBoard scalars, and the pruned checkpoint at the end."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from topiarist.checkpoints.writing import MASKS, OutputFolder
from topiarist.core.errors import TopiaristError
from topiarist.masklearn import relaxation_for
from topiarist.masks import MaskFile, save_masks
from topiarist.masks.applying import write_masked
from topiarist.models.opened import ObjectModel
from topiarist.pipelines.common.finish import base_model
from topiarist.pipelines.learning.masking import Target
from topiarist.pipelines.learning.report import LearnedLayer
from topiarist.pipelines.training.weights import STATE_BYTES as WEIGHT_STATE_BYTES

STATE = "learning"
PRIOR, SHARDS = "prior", "shards"
"""Of sharded runs instead; SHARDS: a folder with the states of their processes (sharding.py)."""
LOGIT_BYTES = 8
"""Of the state on disk, per logit at most: itself in fp32, its moments in bf16."""


def open_output(
    out: Path,
    fingerprint: dict[str, Any],
    nbytes: int,
    wanted: Sequence[Target],
    held: ExitStack,
    *,
    relaxation: str | None,
    recovers: bool,
) -> OutputFolder:
    """Begin the output or open it again, locked for as long as `held` is.

    nbytes: bytes of the dense model. Raises CheckpointError for another run's, and for a disk that is too small.
    """
    output = held.enter_context(OutputFolder(out, fingerprint))
    if not output.complete:
        output.begin(bytes_due(nbytes, wanted, relaxation, recovers=recovers))
    return output


def bytes_due(nbytes: int, wanted: Sequence[Target], relaxation: str | None, *, recovers: bool) -> int:
    """Bytes on disk that a run needs at most: the model, and states of which a new one is whole before the old one goes."""
    weights = sum(target.parameter.numel() for target in wanted)
    shapes = [relaxation_for(target.pattern, relaxation).logits_shape(target.rows_shape) for target in wanted]
    # A bit a weight for the prior's masks, and for the best ones.
    state = LOGIT_BYTES * sum(map(math.prod, shapes)) + -(-weights // 4)
    return nbytes + state + max(state, 2 * WEIGHT_STATE_BYTES * weights if recovers else 0)


def packed_prior(wanted: Sequence[Target], bits: Sequence[Any]) -> dict[str, Tensor]:
    """The prior's masks at one bit a weight, by the names that a saved state keeps them under."""
    return {f"{target.name} prior": torch.from_numpy(packed) for target, packed in zip(wanted, bits, strict=True)}


def keep_prior(output: OutputFolder, wanted: Sequence[Target], masks: Mapping[str, Tensor], notes: list[str]) -> None:
    """So that a resumed run of shards does not compute the prior and its warnings again."""
    bits = packed_prior(wanted, [target.packed(masks[target.name]) for target in wanted])
    output.state(PRIOR).save(bits, {"notes": json.dumps(notes)})


def summary_writer() -> Any:
    """TensorBoard's writer of event files. Raises TopiaristError if it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise TopiaristError("TensorBoard is not installed: pip install 'topiarist[logging]'") from None
    return SummaryWriter


class Scalars:
    """TensorBoard, or nothing.

    folder: for its event files; None writes nothing. Raises TopiaristError if TensorBoard is not installed.
    """

    def __init__(self, folder: str | Path | None) -> None:
        self.writer: Any = None if folder is None else summary_writer()(str(folder))

    def __enter__(self) -> Scalars:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.writer is not None:
            self.writer.close()

    def write(self, entry: Mapping[str, Any]) -> None:
        """Log loss, hard loss, flips and certainty of an evaluation, those that it has."""
        if self.writer is not None:
            for key in ("loss", "hard_loss", "flips", "certainty"):
                if entry[key] is not None:
                    self.writer.add_scalar(key, entry[key], entry["step"])


def layer_reports(wanted: Sequence[Target], masks: Mapping[str, Tensor], flips: Sequence[float]) -> list[LearnedLayer]:
    """A report for every target: its final sparsity, and the fraction of its weights that differ from the prior's."""
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


def write_weights(
    output: OutputFolder,
    source: ObjectModel,
    wanted: Sequence[Target],
    masks: Mapping[str, Tensor],
    replaced: Mapping[str, Tensor] | None,
) -> Path:
    """Write the pruned weights and their masks. Returns the folder of the dense model, whose config and tokenizer go along.

    source: with its dense weights.
    """
    save_masks(
        output.folder / MASKS,
        masks,
        weights={target.name: target.parameter for target in wanted},
        pattern={target.name: target.pattern for target in wanted},
        base_model=base_model(source, output.folder),
        transposed={target.name for target in wanted if target.transposed},
    )
    dense = source.as_checkpoint(output)
    write_masked(output, dense, MaskFile(output.folder / MASKS), replaced=replaced)
    return dense.folder


@torch.no_grad()
def mask_in_place(wanted: Sequence[Target], masks: Mapping[str, Tensor], replaced: Mapping[str, Tensor] | None) -> None:
    """Zero what the masks drop in the model's own parameters, after giving them `replaced` weights if there are any."""
    for target in wanted:
        parameter = target.parameter
        if replaced is not None:
            parameter.copy_(replaced[target.name])
        parameter.masked_fill_(~masks[target.name].to(parameter.device), 0.0)
