"""A model folder: its blocks are read from the files when they are needed, and the whole of it never, unless asked for."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from topiarist.checkpoints.reading import Checkpoint
from topiarist.core.errors import CheckpointError
from topiarist.models import checks, modeling_pruned
from topiarist.models.families import FAMILIES
from topiarist.models.opened import ObjectModel, OpenedModel


class FolderModel(OpenedModel):
    """A checkpoint folder behind a model without memory: parameters come and go block by block."""

    checkpoint: Checkpoint

    def __init__(
        self, checkpoint: Checkpoint, *, device: torch.device, trust_remote_code: bool = False, name: str = ""
    ) -> None:
        self.checkpoint, self.device, self.trust_remote_code = checkpoint, device, trust_remote_code
        self.name = name or str(checkpoint.folder)
        checks.check_unquantised(checkpoint)
        self.model: Any = self._without_memory()
        self._prefix = f"{self.model.base_model_prefix}."
        self._stored_dtype: dict[str, torch.dtype] = {}
        self._has_row = str(checkpoint.config.get("model_type")).removeprefix("pruned_") in FAMILIES
        if self._untied():
            self.model = self._without_memory()
        if self._has_row:
            self._check_tensors()

    def _without_memory(self) -> Any:
        """The model's modules, their parameters on the meta device."""
        from accelerate import init_empty_weights
        from transformers import AutoConfig, AutoModelForCausalLM

        checkpoint, trust = self.checkpoint, self.trust_remote_code
        modeling_pruned.register(checkpoint.config)
        try:
            config = AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=trust)
            config.tie_word_embeddings = checkpoint.config.get("tie_word_embeddings", config.tie_word_embeddings)
            config.return_dict = True  # outputs are read by name, whatever the config asks for
            checks.usable_attention(config)
            with init_empty_weights(include_buffers=False):
                model = AutoModelForCausalLM.from_config(config, dtype=checkpoint.dtype(), trust_remote_code=trust)
        except (ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError, OSError) as error:
            if checks.needs_remote_code(error) and not trust:
                raise checks.remote_code_error(checkpoint.folder) from error
            raise CheckpointError(f"transformers cannot build a model from {checkpoint.folder}: {error}") from error
        return model.eval().requires_grad_(False)

    def _tied(self) -> dict[str, str]:
        """Parameters that are another one by the config: their names, and the other's."""
        return dict(getattr(self.model, "all_tied_weights_keys", None) or {})

    def _untied(self) -> bool:
        """Whether the files hold two different tensors where the config says that they are one; it says so no longer then.

        Merging an adapter that trained the head leaves such folders; transformers reads them as untied too.
        """
        for target, source in self._tied().items():
            names = self._on_disk(target), self._on_disk(source)
            if all(names) and not torch.equal(*(self.checkpoint.read(str(n), mapped=True) for n in names)):
                self.checkpoint.config["tie_word_embeddings"] = False
                return True
        return False

    def _check_tensors(self) -> None:
        """Every parameter comes from the files, with the shape that the config asks for."""
        checkpoint, tied = self.checkpoint, self._tied()
        others = {**{source: target for target, source in tied.items()}, **tied}
        missing, shapes = [], []
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            try:
                parts = self.disk_parts(name)
            except CheckpointError:
                if name not in others or self._on_disk(others[name]) is None:
                    missing.append(name)
                continue
            if len(parts) == 1 and len(parts[0]) == 1:
                shapes.append((parts[0][0], checkpoint.shape(parts[0][0]), tuple(parameter.shape)))
        checks.check_complete(checkpoint.folder, missing, checkpoint.files)
        checks.check_shapes(checkpoint.folder, shapes)

    def _tokenizer_folder(self) -> Path:
        return self.checkpoint.folder

    def digest(self) -> str:
        return self.checkpoint.digest()

    @property
    def nbytes(self) -> int:
        return self.checkpoint.weight_bytes()

    @property
    def dtype(self) -> torch.dtype:
        return self.checkpoint.dtype()

    def check_output(self, out: str | Path | None) -> None:
        if out is None:
            raise CheckpointError("a checkpoint needs an output folder")
        if Path(out).resolve() == self.checkpoint.folder.resolve():
            raise CheckpointError(f"{out} is the model itself; choose another output folder")

    def whole(self) -> ObjectModel:
        from transformers import GenerationConfig

        folder = self.checkpoint.folder
        # The tensors are handed over, so that adapters beside them, or a second set of weights, play no part.
        state = {name: self.checkpoint.read(name) for name in self.checkpoint.files}
        try:
            model, about = type(self.model).from_pretrained(
                None, config=self.model.config, state_dict=state, dtype=self.dtype, output_loading_info=True
            )
        except (ValueError, KeyError, OSError, RuntimeError) as error:
            raise CheckpointError(f"transformers cannot load {folder}: {error}") from error
        checks.check_complete(folder, about["missing_keys"], self.checkpoint.files)
        with suppress(OSError):  # few folders have none
            model.generation_config = GenerationConfig.from_pretrained(folder)
        return ObjectModel(model.to(self.device).eval(), origin=self)

    def fresh(self) -> Any:
        return self.whole().model

    def _on_disk(self, name: str) -> str | None:
        """The checkpoint's name for a parameter: as it is, without the base model's prefix, or under an older name."""
        names = [name, name.removeprefix(self._prefix)]
        renames = self.family.renames if self._has_row else ()
        names += [n.replace(new, old) for n in list(names) for old, new in renames]
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
        stems = tuple(stem for i in range(len(self.block_names)) for stem in self._stems(i))
        return {key for key in self.checkpoint.files if key.startswith(stems)}
