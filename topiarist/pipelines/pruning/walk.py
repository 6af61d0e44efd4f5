"""The walk of a one-shot run over the blocks: prune one, keep it, run it, next."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from torch import Tensor, nn

from topiarist.checkpoints.reading import Checkpoint
from topiarist.checkpoints.writing import OutputFolder
from topiarist.core.meter import return_freed_memory
from topiarist.models.folder import FolderModel
from topiarist.models.opened import OpenedModel
from topiarist.pipelines.common.stream import BlockStream
from topiarist.pipelines.pruning.block import BlockPruner
from topiarist.pipelines.pruning.options import Progress, PruneOptions
from topiarist.results.report import BlockRefinement, JointBlock, LayerReport

OUTER_SHARD_BYTES = 1 << 29
"""Tensors outside the blocks are copied in shards of about this size, so that copying needs little memory."""


class Walk:
    """The walk over the blocks, for a checkpoint on disk or a model in memory."""

    def __init__(
        self,
        source: OpenedModel,
        pruner: BlockPruner,
        tokens: Tensor,
        options: PruneOptions,
        progress: Progress,
    ) -> None:
        self.source, self.pruner, self.tokens, self.options, self.progress = source, pruner, tokens, options, progress
        self.names = source.block_names

    def _start(self) -> BlockStream | None:
        """The hidden states before the first block; None where nothing has to flow."""
        if not len(self.tokens):
            return None
        self.progress("reading the calibration text", 0, len(self.names))
        with self.pruner.meter.timed("forward"):
            spill = None if self.options.spill is None else Path(self.options.spill)
            return BlockStream(
                self.source,
                self.tokens,
                batch_size=self.options.windows_a_forward,
                device=self.source.device,
                spill=spill,
            )

    def _prune_block(self, stream: BlockStream | None, index: int) -> list[LayerReport]:
        self.progress("pruning", index, len(self.names))
        block = self._dense_block(stream, index)
        matrices = self.source.matrices(index)
        if stream is None:
            return self.pruner.prune_without_data(block, matrices, self.names[index])
        return self.pruner.prune(
            stream, index, block, matrices, self.names[index], sequential=self.options.true_sequential
        )

    def _dense_block(self, stream: BlockStream | None, index: int) -> nn.Module:
        with self.pruner.meter.timed("read"):
            block = self.source.load(index)
        if stream is not None and self.pruner.follows_dense:
            with self.pruner.meter.timed("dense"):
                stream.follow_dense(index, block, keep_entering=self.pruner.correct is not None)
        return block

    def _advance(self, stream: BlockStream | None, index: int) -> None:
        if stream is not None and index + 1 < len(self.names):
            with self.pruner.meter.timed("forward"):
                stream.advance(index, self.source.model.get_submodule(self.names[index]))

    def in_memory(self) -> list[LayerReport]:
        stream, layers = self._start(), []
        for index in range(len(self.names)):
            layers += self._prune_block(stream, index)
            self._advance(stream, index)
        self.progress("done", len(self.names), len(self.names))
        return layers

    def streamed(self, checkpoint: Checkpoint, output: OutputFolder) -> list[LayerReport]:
        """Prune to shards. Blocks that an earlier try finished are read back from its shards and only run forward."""
        assert isinstance(self.source, FolderModel)
        in_blocks = self.source.names_in_blocks()
        outer = checkpoint.grouped([key for key in checkpoint.files if key not in in_blocks], OUTER_SHARD_BYTES)
        total = len(outer) + len(self.names)
        output.begin(int(checkpoint.weight_bytes() * 1.01))
        for number, names in enumerate(outer):
            if output.shard_is_done(number) is None:
                with self.pruner.meter.timed("write"):
                    output.copy_shard(_shard_name(number, total), checkpoint, names)
        stream, layers = self._start(), []
        for index in range(len(self.names)):
            number = len(outer) + index
            if line := output.shard_is_done(number):
                self.progress("catching up", index, len(self.names))
                if self.pruner.follows_dense:
                    self._dense_block(stream, index)
                with self.pruner.meter.timed("read"):
                    self.source.load(index, Checkpoint.of_shard(output.folder / line["file"]))
                layers += [LayerReport.from_dict(layer) for layer in line["layers"]]
                self.pruner.warned += line["warnings"]
                self.pruner.refined += [BlockRefinement(**refined) for refined in line["refined"]]
                self.pruner.joined += [JointBlock(**joint) for joint in line.get("joint", [])]
            else:
                warned, refined = len(self.pruner.warned), len(self.pruner.refined)
                joined = len(self.pruner.joined)
                new = self._prune_block(stream, index)
                layers += new
                info = {
                    "layers": [asdict(layer) for layer in new],
                    "warnings": self.pruner.warned[warned:],
                    "refined": [asdict(done) for done in self.pruner.refined[refined:]],
                    "joint": [asdict(done) for done in self.pruner.joined[joined:]],
                }
                with self.pruner.meter.timed("write"):
                    output.write_shard(_shard_name(number, total), self.source.block_on_disk(index), info)
            self._advance(stream, index)
            self.source.release(index)
            return_freed_memory()
        self.progress("done", len(self.names), len(self.names))
        return layers


def _shard_name(number: int, total: int) -> str:
    return f"model-{number + 1:05d}-of-{total:05d}.safetensors"
