"""Where blocks come from: a checkpoint on disk, read block by block, or a model that is already in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from topiarist.checkpoints.reading import Checkpoint
from topiarist.core.errors import CheckpointError, UnsupportedModel
from topiarist.models import modeling_pruned
from topiarist.models.families import Matrix, family_of, matrices_of


def device_or_default(device: str | torch.device | None) -> torch.device:
    """The device that was asked for; otherwise a GPU if there is one."""
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


@contextmanager
def eager_experts(model: nn.Module) -> Iterator[None]:
    """Experts run one by one while inside, so that each expert's input can be seen."""
    config: Any = getattr(model, "config", None)
    before = getattr(config, "_experts_implementation", None)
    if before is not None:
        config._experts_implementation = "eager"
    try:
        yield
    finally:
        if before is not None:
            config._experts_implementation = before


class LoadedModel:
    """A model object that is already in memory; it is pruned in place."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.device = next(model.parameters()).device
        self.family = family_of(getattr(getattr(model, "config", None), "model_type", type(model).__name__))

    def load_embeddings(self) -> None: ...
    def release_embeddings(self) -> None: ...
    def release(self, index: int) -> None: ...

    def load(self, index: int) -> nn.Module:
        return self.model.get_submodule(f"{self.family.blocks}.{index}")


class StreamedModel:
    """A checkpoint folder behind a model without memory: parameters come and go block by block."""

    def __init__(self, checkpoint: Checkpoint, *, device: torch.device, trust_remote_code: bool = False) -> None:
        from accelerate import init_empty_weights
        from transformers import AutoConfig, AutoModelForCausalLM

        self.checkpoint, self.device, self.trust_remote_code = checkpoint, device, trust_remote_code
        self.family = family_of(str(checkpoint.config.get("model_type")))
        if "quantization_config" in checkpoint.config:
            raise UnsupportedModel(f"{checkpoint.folder} is quantised; prune the original weights, then quantise")
        modeling_pruned.register(checkpoint.config)
        try:
            config = AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=trust_remote_code)
            with init_empty_weights(include_buffers=False):
                self.model: Any = AutoModelForCausalLM.from_config(
                    config, dtype=checkpoint.dtype(), trust_remote_code=trust_remote_code
                )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"transformers cannot build a model from {checkpoint.folder}: {error}") from error
        self.model.eval().requires_grad_(False)
        self._prefix = f"{self.model.base_model_prefix}."
        self._stored_dtype: dict[str, torch.dtype] = {}

    def _on_disk(self, name: str) -> str | None:
        """The checkpoint's name for a parameter: as it is, without the base model's prefix, or under an older name."""
        names = [name, name.removeprefix(self._prefix)]
        names += [n.replace(new, old) for n in list(names) for old, new in self.family.renames]
        return next((n for n in names if n in self.checkpoint), None)

    def disk_parts(self, name: str) -> list[list[str]]:
        """Tensors on disk that make up one parameter: [[name]] if stored whole, else one list an expert."""
        if whole := self._on_disk(name):
            return [[whole]]
        block, _, relative = name.removeprefix(self.family.blocks + ".").partition(".")
        if relative in self.family.experts:
            experts = self.model.get_parameter(name).shape[0]
            stem = f"{self.family.blocks}.{block}."
            parts = [
                [self._on_disk(stem + part.format(e=e)) for part in self.family.experts[relative]]
                for e in range(experts)
            ]
            if all(part is not None for row in parts for part in row):
                return parts  # pyright: ignore[reportReturnType]
        raise CheckpointError(f"tensor {name} is missing in {self.checkpoint.folder}; download it again")

    def _read(self, name: str, dtype: torch.dtype, checkpoint: Checkpoint, mapped: bool) -> Tensor:
        parts = self.disk_parts(name)
        pieces = [[checkpoint.read(part, mapped=mapped) for part in row] for row in parts]
        self._stored_dtype.update(
            (part, piece.dtype)
            for row, read in zip(parts, pieces, strict=True)
            for part, piece in zip(row, read, strict=True)
        )
        whole = len(parts) == 1 and len(parts[0]) == 1
        tensor = pieces[0][0] if whole else torch.stack([torch.cat(row) for row in pieces])
        wanted = self.model.get_parameter(name).shape
        if tensor.shape != wanted:
            raise CheckpointError(f"tensor {name} has shape {tuple(tensor.shape)}, config asks for {tuple(wanted)}")
        return tensor.to(self.device, dtype)

    def _fill(self, names: Sequence[str], checkpoint: Checkpoint, *, mapped: bool = False) -> None:
        for name in names:
            path, _, parameter = name.rpartition(".")
            module = self.model.get_submodule(path)
            tensor = self._read(name, getattr(module, parameter).dtype, checkpoint, mapped)
            module._parameters[parameter] = nn.Parameter(tensor, requires_grad=False)

    def _empty(self, names: Sequence[str]) -> None:
        for name in names:
            path, _, parameter = name.rpartition(".")
            module = self.model.get_submodule(path)
            module._parameters[parameter] = nn.Parameter(getattr(module, parameter).to("meta"), requires_grad=False)

    def _embedding_names(self) -> list[str]:
        """Parameters of the base model outside its blocks; the head is not among them."""
        return [
            name
            for name, _ in self.model.named_parameters()
            if name.startswith(self._prefix) and not name.startswith(self.family.blocks + ".")
        ]

    def embedding_parameters(self) -> list[Tensor]:
        return [self.model.get_parameter(name) for name in self._embedding_names()]

    def load_embeddings(self) -> None:
        # A table of embeddings may be larger than a block, and few of its rows are used.
        self._fill(self._embedding_names(), self.checkpoint, mapped=True)
        for module in self.model.modules():  # buffers are computed, not stored
            for key, buffer in module._buffers.items():
                if buffer is not None and buffer.device != self.device:
                    module._buffers[key] = buffer.to(self.device)

    def release_embeddings(self) -> None:
        self._empty(self._embedding_names())

    def block_parameters(self, index: int) -> list[str]:
        path = f"{self.family.blocks}.{index}"
        return [f"{path}.{name}" for name, _ in self.model.get_submodule(path).named_parameters()]

    def load(self, index: int, pruned: Checkpoint | None = None) -> nn.Module:
        """Fill one block from the checkpoint, or from the shard of an earlier try that pruned it."""
        self._fill(self.block_parameters(index), pruned or self.checkpoint)
        return self.model.get_submodule(f"{self.family.blocks}.{index}")

    def release(self, index: int) -> None:
        self._empty(self.block_parameters(index))

    def block_on_disk(self, index: int) -> dict[str, Tensor]:
        """The loaded block as the checkpoint stores it: its names, shapes, dtypes, tensors no module uses included."""
        stored: dict[str, Tensor] = {}
        for name in self.block_parameters(index):
            value = self.model.get_parameter(name)
            parts = self.disk_parts(name)
            if len(parts) == 1 and len(parts[0]) == 1:
                stored[parts[0][0]] = value
                continue
            for row, expert in zip(parts, value, strict=True):
                for part, piece in zip(row, expert.chunk(len(row)), strict=True):
                    stored[part] = piece
        stored = {key: value.to("cpu", self._stored_dtype[key]) for key, value in stored.items()}
        stems = self._stems(index)
        for key in self.checkpoint.files:
            if key not in stored and key.startswith(stems):
                stored[key] = self.checkpoint.read(key)
        return dict(sorted(stored.items()))

    def _stems(self, index: int) -> tuple[str, ...]:
        """How the checkpoint's names of one block may begin."""
        path = f"{self.family.blocks}.{index}."
        return path, path.removeprefix(self._prefix)

    def names_in_blocks(self) -> set[str]:
        """The checkpoint's names of everything that belongs to a block."""
        stems = tuple(stem for i in range(num_blocks(self)) for stem in self._stems(i))
        return {key for key in self.checkpoint.files if key.startswith(stems)}


Source = LoadedModel | StreamedModel
"""Where a pipeline gets its blocks: load, use, release, one at a time."""


def num_blocks(source: Source) -> int:
    return len(source.model.get_submodule(source.family.blocks))  # pyright: ignore[reportArgumentType]


def block_matrices(source: Source, index: int) -> list[Matrix]:
    """The prunable matrices of one block, named relative to it."""
    return matrices_of(source.model.get_submodule(f"{source.family.blocks}.{index}"), source.family)
