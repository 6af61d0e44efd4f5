"""The walk of a one-shot run over the blocks: prune one, keep it, run it, next."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from topiarist.checkpoints.reading import Checkpoint
from topiarist.checkpoints.writing import OutputFolder
from topiarist.core.meter import return_freed_memory
from topiarist.core.slots import check_slots
from topiarist.data import Windows
from topiarist.models.opened import OpenedModel
from topiarist.pipelines.common.options import Progress
from topiarist.pipelines.common.stream import BlockStream, check_flow
from topiarist.pipelines.pruning.block import BlockPruner
from topiarist.results.report import BlockRefinement, JointBlock, LayerReport


@runtime_checkable
class WalkOptions(Protocol):
    """What a walk asks of the options of its command."""

    @property
    def data(self) -> Any:
        """Text; None for a run without."""

    @property
    def seed(self) -> int:
        """Of the draw of windows."""
        ...

    @property
    def bos(self) -> str:
        """Whether a window begins with the model's start token: auto, always or never."""
        ...

    @property
    def spill(self) -> str | Path | None:
        """Folder for hidden states that do not fit in memory."""

    @property
    def windows_a_forward(self) -> int:
        """Windows a forward pass."""
        ...

    @property
    def true_sequential(self) -> bool:
        """Whether later matrices of a block see the already changed earlier ones."""
        ...


def calibration_of(options: WalkOptions, windows: Windows) -> dict[str, Any]:
    """What a report says of the text that a walk saw, and a fingerprint compares; {} for a run without text."""
    if options.data is None:
        return {}
    return {
        "num_windows": len(windows.tokens),
        "window_tokens": windows.window,
        "seed": options.seed,
        "digest": windows.digest,
        "batch_size": options.windows_a_forward,
        "true_sequential": options.true_sequential,
        **({} if options.bos == "never" else {"bos": options.bos}),
    }


class Walk:
    """The walk over the blocks, for a checkpoint on disk or a model in memory."""

    layer_report: type[LayerReport] = LayerReport
    written: Path | None = None
    """Where transformers put config and tokenizer of an object."""

    def __init__(
        self,
        source: OpenedModel,
        pruner: BlockPruner,
        tokens: Tensor,
        options: WalkOptions,
        progress: Progress,
    ) -> None:
        self.source, self.pruner, self.tokens, self.options, self.progress = source, pruner, tokens, options, progress
        self.names = source.block_names
        pruner.uncalled = "dense"
        for note in source.unpruned():
            pruner.warn(note, UserWarning)
        self.processes = pruner.processes
        if self.processes.size > 1:
            check_slots(-(-len(tokens) // options.windows_a_forward), self.processes.size)
        if len(tokens):  # refused, if at all, before anything is written
            check_flow(source, tokens, pruner.needs_states, spills=options.spill is not None)

    def _start(self) -> BlockStream | None:
        """The hidden states before the first block; None where nothing has to flow."""
        if not len(self.tokens):
            return None
        self.progress("reading the calibration text", 0, len(self.names))
        with self.pruner.meter.timed("forward"):
            spill = None if self.options.spill is None else Path(self.options.spill)
            return BlockStream.of(
                self.source,
                self.tokens,
                batch_size=self.options.windows_a_forward,
                spill=spill,
                needs_states=self.pruner.needs_states,
                processes=self.processes,
            )

    def _prune_block(self, stream: BlockStream | None, index: int) -> list[LayerReport]:
        self.progress("pruning", index, len(self.names))
        block = self._dense_block(stream, index)
        matrices = self.source.matrices(index)
        if stream is None:
            return self.pruner.prune_without_data(block, matrices, self.names[index])
        if not stream.reaches(index):
            self.pruner.warn(f"{self.names[index]} is not called for text, so it stays dense", UserWarning)
            return []
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

    def run(self, output: OutputFolder | None) -> list[LayerReport]:
        """Change the blocks in order, each on what the changed ones before it give out; a report a matrix.

        output: where the main process writes, a folder's model block by block. Blocks that an earlier try finished are
        read back from it and only run forward. None: the object's own blocks are changed, and nothing is written.
        """
        done = [] if output is None else self.processes.on_main(partial(self.source.begin, output))
        every = len(done) == len(self.names)  # killed while it gathered the blocks: nothing has to flow
        stream = None if every else self._start()
        layers: list[LayerReport] = []
        for index in range(len(self.names)):
            if output is not None and index < len(done):
                self.progress("catching up", index, len(self.names))
                layers += self._take_over(done[index])
                if every:
                    continue
                if self.pruner.follows_dense:
                    self._dense_block(stream, index)
                with self.pruner.meter.timed("read"):
                    self.source.load(index, self._finished(output, done[index]))
            else:
                layers += self._prune_and_write(stream, index, output)
            self._advance(stream, index)
            self.source.release(index)
            return_freed_memory()
        if stream is not None:
            stream.close()
        if output is not None:
            self.progress("writing the model", len(self.names), len(self.names))
            with self.pruner.meter.timed("write"):
                self.written = self.processes.on_main(partial(self.source.write_rest, output, self._left_out()))
        self.progress("done", len(self.names), len(self.names))
        return layers

    def _take_over(self, line: Mapping[str, Any]) -> list[LayerReport]:
        """What an earlier try said of a block."""
        self.pruner.warned += line["warnings"]
        self.pruner.refined += [BlockRefinement(**refined) for refined in line["refined"]]
        self.pruner.joined += [JointBlock(**joint) for joint in line["joint"]]
        return [self.layer_report.from_dict(layer) for layer in line["layers"]]

    def _finished(self, output: OutputFolder, line: Mapping[str, Any]) -> Checkpoint:
        """The weights of a block that an earlier try wrote."""
        return output.block(line)

    def _left_out(self) -> Container[str]:
        """Tensors outside the blocks that are written with one."""
        return ()

    def _tensors(self, index: int) -> Mapping[str, Tensor]:
        """A finished block of a folder as it is written."""
        return self.source.as_folder().block_on_disk(index)

    def _prune_and_write(
        self, stream: BlockStream | None, index: int, output: OutputFolder | None
    ) -> list[LayerReport]:
        warned, refined, joined = len(self.pruner.warned), len(self.pruner.refined), len(self.pruner.joined)
        layers = self._prune_block(stream, index)
        if output is None:
            return layers
        info = {
            "layers": [asdict(layer) for layer in layers],
            "warnings": self.pruner.warned[warned:],
            "refined": [asdict(done) for done in self.pruner.refined[refined:]],
            "joint": [asdict(done) for done in self.pruner.joined[joined:]],
        }
        with self.pruner.meter.timed("write"):

            def write() -> None:
                if self.pruner.companion is not None:
                    self.pruner.companion.save(output, index)
                self.source.write_block(output, partial(self._tensors, index), info)

            self.processes.on_main(write)
        return layers
