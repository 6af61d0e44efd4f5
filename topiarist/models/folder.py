"""A model folder: its blocks are read from the files when they are needed, and the whole of it never, unless asked for."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from topiarist.checkpoints.reading import Checkpoint
from topiarist.checkpoints.side_files import side_files
from topiarist.checkpoints.streaming import tensor_bytes
from topiarist.checkpoints.writing import OutputFolder, bytes_to_write
from topiarist.core.errors import CheckpointError, UnsupportedModel
from topiarist.data.record import RECORD, recorded_passages
from topiarist.models import building, checks
from topiarist.models.derive import base_model, is_unread
from topiarist.models.families import Matrix
from topiarist.models.names import DiskNames, summary
from topiarist.models.opened import ObjectModel, OpenedModel

SHOWN = 4
"""Kinds of unused tensors that a note names."""


class FolderModel(OpenedModel):
    """A checkpoint folder behind a model without memory: parameters and stored buffers come and go block by block.

    name: what reports call it; default the folder. Raises UnsupportedModel for quantised weights, and for code of its
    own unless `trust_remote_code`; CheckpointError where tensors are missing or of another shape.
    """

    checkpoint: Checkpoint

    def __init__(
        self, checkpoint: Checkpoint, *, device: torch.device, trust_remote_code: bool = False, name: str = ""
    ) -> None:
        self.checkpoint, self.device, self.trust_remote_code = checkpoint, device, trust_remote_code
        self.name = name or str(checkpoint.folder)
        checks.check_unquantised(checkpoint)
        self.model: Any = building.without_memory(checkpoint, trust_remote_code)
        self.names = DiskNames(self.model, checkpoint.files)
        if self._untied():
            checkpoint.config = building.untied_config(checkpoint.config)
            self.model = building.without_memory(checkpoint, trust_remote_code)
            self.names = DiskNames(self.model, checkpoint.files)
        self._tied = dict(getattr(self.model, "all_tied_weights_keys", None) or {})
        self._stored_dtype: dict[str, torch.dtype] = {}
        self._check_tensors()

    def _untied(self) -> bool:
        """Whether the files hold two different tensors where the config says that they are one.

        Merging an adapter that trained the head leaves such folders; transformers reads them as untied too.
        """
        for pair in (getattr(self.model, "all_tied_weights_keys", None) or {}).items():
            if all(name in self.names for name in pair):
                keys = [self.names.group(name).keys[0][0] for name in pair]
                if not torch.equal(*(self.checkpoint.read(key, mapped=True) for key in keys)):
                    return True
        return False

    def _check_tensors(self) -> None:
        """Every parameter and stored buffer comes from the files, with the shape that the config asks for."""
        folder, state = self.checkpoint.folder, self.model.state_dict()
        optional = building.optional_names(self.model)
        missing = [name for name in state if name not in self.names and not optional(name) and not self._partner(name)]
        checks.check_complete(folder, missing, self.checkpoint.files, self.names.unclaimed)
        shapes = self.names.shapes(self.checkpoint)
        checks.check_shapes(folder, ((n, shape, tuple(state[n].shape)) for n, shape in shapes.items() if n in state))
        floating = (name for name, value in state.items() if value.is_floating_point())
        checks.check_floating(self.checkpoint, sorted(self.names.keys(floating)))

    def _partner(self, name: str) -> str | None:
        """A parameter on disk that the named one is tied to."""
        group = {target for target, source in self._tied.items() if source == self._tied.get(name, name)}
        return next((n for n in (self._tied.get(name, name), *sorted(group)) if n in self.names), None)

    def _tokenizer_folder(self) -> Path:
        return self.checkpoint.folder

    def digest(self) -> str:
        """sha256 over config and weight files."""
        return self.checkpoint.digest()

    def begin(self, output: OutputFolder) -> list[dict[str, Any]]:
        """Begin the output; blocks that an earlier try finished are taken over.

        Raises DamagedWeights for NaN or Inf in what is copied, which no forward need come upon; blocks are checked as they
        are loaded.
        """
        done = self.names_in_blocks()
        checks.check_finite_files(self.checkpoint, [name for name in self.checkpoint.files if name not in done])
        output.begin(bytes_to_write(self.nbytes))
        return output.done()

    def write_block(
        self, output: OutputFolder, tensors: Callable[[], Mapping[str, Tensor]], info: Mapping[str, Any]
    ) -> None:
        """Write the block and its journal line."""
        output.write_block(tensors(), info)

    def write_rest(self, output: OutputFolder, left_out: Container[str] = ()) -> None:
        """Gather the blocks and copy all other tensors of the files."""
        done = self.names_in_blocks()
        output.gather(self.checkpoint, [n for n in self.checkpoint.files if n not in done and n not in left_out])

    def write_changed(
        self, output: OutputFolder, model: Any, changed: Mapping[str, Tensor], scales: Mapping[str, Tensor]
    ) -> None:
        """Write the files' tensors, changed parameters under their names, dtypes and ties.

        Raises CheckpointError for a parameter that the files lack.
        """
        wanted = {id(parameter) for parameter in changed.values()}
        values = dict(model.named_parameters(remove_duplicate=False))
        names = {name for name, parameter in values.items() if id(parameter) in wanted and name in self.names}
        held = {id(values[name]) for name in names}  # files may know a tied parameter by its other name
        if lacking := sorted(name for name, parameter in changed.items() if id(parameter) not in held):
            raise CheckpointError(
                f"{self.checkpoint.folder} has no {lacking[0]}: it is not the folder that was trained"
            )
        whole = {target for name in names for target in self.names.group(name).targets}
        stored = self.stored({name: values[name].detach() for name in sorted(whole)}, restored=True) | dict(scales)
        files = self.checkpoint.as_stored if scales else self.checkpoint
        output.done()
        output.write_files(
            {name: files.stored(name) for name in files.files},
            lambda name: [tensor_bytes(stored[name])] if name in stored else files.chunks(name),
        )

    def check_packed(self, wanted: Container[str], out: str | Path | None) -> None:
        """Raise UnsupportedModel for matrices that are not stored as `NAME.weight` of (out, in)."""
        named = [
            (f"{path}.{matrix.name}", self._has_a_place(path, matrix))
            for index, path in enumerate(self.block_names)
            for matrix in self.matrices(index)
        ]
        placed = [place for name, place in named if name in wanted]
        if lost := [name for name, place in named if name in wanted and not place]:
            raise UnsupportedModel(
                f"{self.config.model_type} stores {len(lost)} of {len(placed)} matrices transposed or stacked ({lost[0]}, "
                "...), which compressed-tensors has no place for: skip them by --skip, or load the model and quantise the "
                "object, which gives it the values alone"
            )

    def _has_a_place(self, path: str, matrix: Matrix) -> bool:
        """Whether the files have a matrix of the block `path` as `P.weight` of (out, in), alone or above others."""
        shapes = {name: self.checkpoint.shape(name) for name in self.names.keys([f"{path}.{matrix.path}"])}
        if matrix.transposed and matrix.expert is None:
            return False
        return all(n.endswith(".weight") and len(s) == 2 and s[1] == matrix.shape[1] for n, s in shapes.items())

    def as_folder(self) -> Any:
        """The folder itself."""
        return self

    def as_checkpoint(self, output: OutputFolder) -> Checkpoint:
        """The files as they are."""
        return self.checkpoint

    @property
    def nbytes(self) -> int:
        """Bytes of the weight files."""
        return self.checkpoint.weight_bytes()

    @property
    def dtype(self) -> torch.dtype:
        """What the config states, else the dtype of the first floating tensor of the files."""
        return self.checkpoint.dtype()

    def check_output(self, out: str | Path | None) -> None:
        """Raise CheckpointError if there is no output folder, or if it is the model's own or something else's."""
        if out is None:
            raise CheckpointError("a checkpoint needs an output folder")
        if Path(out).resolve() == self.checkpoint.folder.resolve():
            raise CheckpointError(f"{out} is the model itself; choose another output folder")
        super().check_output(out)
        list(side_files(self.checkpoint.folder))  # refused before any work, not at the end
        recorded_passages(self.beside(RECORD))

    def whole(self) -> ObjectModel:
        """What transformers loads, on the device.

        Raises CheckpointError if weights are missing or it cannot load them, DamagedWeights for NaN or Inf in them.
        """
        import transformers

        folder = self.checkpoint.folder
        # The tensors are handed over, so that adapters beside them, or a second set of weights, play no part.
        state = {name: self.checkpoint.read(name) for name in self.checkpoint.files}
        self.checkpoint.close()
        generation = building.generation_config(folder)
        try:
            model, about = type(self.model).from_pretrained(
                None, config=self.model.config, state_dict=state, dtype=self.dtype, output_loading_info=True
            )
        except (ValueError, KeyError, OSError, RuntimeError) as error:
            why = " ".join(str(error).split())
            raise CheckpointError(f"transformers {transformers.__version__} cannot load {folder}: {why}") from error
        checks.check_complete(folder, about["missing_keys"], self.checkpoint.files)
        checks.check_finite(model)
        if self.trust_remote_code:
            building.restore_computed(model, self.model)
        if generation is not None:
            model.generation_config = generation
        return ObjectModel(model.to(self.device).eval(), origin=self)

    def fresh(self) -> Any:
        """The model loaded anew from the files."""
        return self.whole().model

    @property
    def unused(self) -> str:
        """Kinds of tensors of the files that the model does not use, as text; "" if there are none."""
        kinds = summary(self.names.unclaimed)
        return ", ".join(kinds[:SHOWN]) + (f" and {len(kinds) - SHOWN} more kinds" if len(kinds) > SHOWN else "")

    def unpruned(self) -> list[str]:
        """What the base class says, and the tensors of the files that the model does not use."""
        note = [f"tensors that the model does not use are copied as they are: {self.unused}"] if self.unused else []
        return super().unpruned() + note

    def _names_below(self, path: str) -> list[str]:
        """Parameters and stored buffers of one module, by full name."""
        return [f"{path}.{name}" for name in self.model.get_submodule(path).state_dict()]

    def parameter(self, name: str) -> Tensor:
        """One parameter as its module would hold it, in the files' dtype. Raises CheckpointError if the files lack it."""
        if name not in self.names:
            raise CheckpointError(f"{self.checkpoint.folder} has no {name}")
        return self._read(name, self.checkpoint, mapped=False)[name]

    def stored(self, parameters: Mapping[str, Tensor], *, restored: bool = False) -> dict[str, Tensor]:
        """Parameters, whole groups of them, as the files hold them: names, shapes and dtypes.

        restored: values that are the files' own but for the rounding to the model's dtype are those again; zeros stay.
        """
        stored = self.names.write(parameters)
        for key in stored.keys() - self._stored_dtype.keys():
            self._stored_dtype[key] = self.checkpoint.read(key, mapped=True).dtype
        found = {key: stored[key].to("cpu", self._stored_dtype[key]).contiguous() for key in sorted(stored)}
        for key in found if restored else ():
            if (rounded := stored[key].cpu()).dtype != found[key].dtype:
                own = self.checkpoint.read(key, mapped=True)
                same = (own.to(rounded.dtype) == rounded) & (rounded != 0)  # which may be a pruned weight's
                found[key] = torch.where(same, own, found[key])
        return found

    def _read(self, name: str, checkpoint: Checkpoint, mapped: bool) -> dict[str, Tensor]:
        def read(key: str) -> Tensor:
            tensor = checkpoint.read(key, mapped=mapped)
            self._stored_dtype[key] = tensor.dtype
            return tensor

        return self.names.read(name, read)

    def _fill(self, names: Sequence[str], checkpoint: Checkpoint, *, mapped: bool = False) -> None:
        done: set[str] = set()
        for name in names:
            if name in done:
                continue
            if name not in self.names:
                self._tie(name)
                continue
            for target, tensor in self._read(name, checkpoint, mapped).items():
                self._put(target, tensor.to(self.device, self._get(target).dtype))
                done.add(target)

    def _tie(self, name: str) -> None:
        """Let a parameter without a tensor of its own be the one that it is tied to, if that is loaded."""
        partner = self._partner(name)
        if partner is not None and not self._get(partner).is_meta:
            path, _, leaf = name.rpartition(".")
            self.model.get_submodule(path)._parameters[leaf] = self._get(partner)

    def _get(self, name: str) -> Tensor:
        path, _, leaf = name.rpartition(".")
        return getattr(self.model.get_submodule(path), leaf)

    def _put(self, name: str, tensor: Tensor) -> None:
        path, _, leaf = name.rpartition(".")
        module = self.model.get_submodule(path)
        if leaf in module._buffers:
            module._buffers[leaf] = tensor
        else:
            module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)

    def _empty(self, names: Iterable[str]) -> None:
        for name in names:
            if (tensor := self._get(name)).is_floating_point():
                self._put(name, tensor.to("meta"))

    def _embedding_names(self) -> list[str]:
        """What stands in the base model outside its blocks: no head, and no tower that text does not pass."""
        base = base_model(self.model)
        path = next(name for name, module in self.model.named_modules() if module is base)
        names = self._names_below(path) if path else list(self.model.state_dict())
        # A model says that it is where its first parameter is, and may place tensors by that: a tower's will do.
        first = next(name for name, _ in self.model.named_parameters())
        around = [n for n in names if not n.startswith(self.family.blocks + ".")]
        return [n for n in around if n == first or not is_unread(self.model, n, self.family.blocks)]

    def embedding_parameters(self) -> list[Tensor]:
        """What `load_embeddings` fills, as it is now: on the meta device while nothing is loaded."""
        return [self._get(name) for name in self._embedding_names()]

    def load_embeddings(self) -> None:
        """Map what stands around the blocks from the files, and move computed buffers to the device."""
        # A table of embeddings may be larger than a block, and few of its rows are used.
        self._fill(self._embedding_names(), self.checkpoint, mapped=True)
        for module in self.model.modules():  # buffers that are computed, not stored
            for key, buffer in module._buffers.items():
                if buffer is not None and buffer.device != self.device and not buffer.is_meta:
                    module._buffers[key] = buffer.to(self.device)

    def release_embeddings(self) -> None:
        """Put what stands around the blocks back on the meta device."""
        self._empty(self._embedding_names())

    def load(self, index: int, pruned: Checkpoint | None = None) -> nn.Module:
        """Fill one block from the checkpoint, or from the shard of an earlier try that pruned it.

        Raises DamagedWeights for NaN or Inf in it.
        """
        self._fill(self._names_below(self.block_names[index]), pruned or self.checkpoint)
        block = self.block(index)
        checks.check_finite(block, self.block_names[index])
        return block

    def release(self, index: int) -> None:
        """Put the block back on the meta device, but for parameters that later blocks share."""
        later = set(self.shared.values())  # pruned once, and read by later blocks too
        self._empty(n for n in self._names_below(self.block_names[index]) if n not in later)

    def block_on_disk(self, index: int) -> dict[str, Tensor]:
        """The loaded block as the checkpoint stores it: its names, shapes and dtypes."""
        names = self._names_below(self.block_names[index])
        return self.stored({name: self._get(name) for name in names}, restored=True)

    def names_in_blocks(self) -> set[str]:
        """The checkpoint's names of everything that belongs to a block."""
        return self.names.keys(name for path in self.block_names for name in self._names_below(path))
