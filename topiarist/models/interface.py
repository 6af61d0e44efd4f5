"""What a pipeline asks of a model, whether it is a folder on disk or an object in memory."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from topiarist.checkpoints.reading import Checkpoint
from topiarist.checkpoints.references import MODEL, resolved
from topiarist.checkpoints.writing import OutputFolder, check_place
from topiarist.core.errors import CalibrationError
from topiarist.data import load_tokenizer
from topiarist.models.calls import Flow
from topiarist.models.derive import block_lists, family_of
from topiarist.models.families import Family, Matrix, block_names, matrices_of
from topiarist.models.positions import has_table, limit_of, stated_length

if TYPE_CHECKING:
    from topiarist.models.opened import ObjectModel

LOW_COVERAGE = 0.9
"""Share of the weights of blocks that are prunable, below which what stays dense is said."""
DEFAULT_WINDOW = 2048
"""Tokens of a window where neither the user nor the config says how many."""


class OpenedModel(ABC):
    """A causal language model as blocks of prunable matrices, one in use at a time."""

    model: Any
    """The module tree. Of a folder it is without memory but for what is loaded."""
    device: torch.device
    """Where forwards run."""
    name: str
    """What the user called it."""
    checkpoint: Checkpoint | None
    """The files it came from; None for an object."""
    trust_remote_code: bool = False
    """Whether code in the folder may run."""
    intermediate: bool = False
    """Whether it is what an earlier stage of a recipe gave, and bears the name of the model that the recipe starts from."""
    flow: Flow | None = None
    """How hidden states go through its blocks, once that was asked (probe.py)."""
    _tokenizer: Any = None

    @property
    def config(self) -> Any:
        """The transformers config, whole."""
        return self.model.config

    @property
    def text_config(self) -> Any:
        """The part of the config that is the language model's own; of most models all of it."""
        ask = getattr(self.config, "get_text_config", None)
        return ask(decoder=True) if ask is not None else self.config

    @cached_property
    def family(self) -> Family:
        """Where blocks, routers and experts are. Raises UnsupportedModel if no decoder blocks can be found."""
        return family_of(self.model)

    @cached_property
    def block_names(self) -> list[str]:
        """Full names of the decoder blocks, first to last."""
        return block_names(self.model, self.family)

    def block(self, index: int) -> nn.Module:
        """One block, loaded or not."""
        return self.model.get_submodule(self.block_names[index])

    def matrices(self, index: int) -> list[Matrix]:
        """The prunable matrices of one block, named relative to it; not those that an earlier block holds too."""
        path = self.block_names[index]
        return [m for m in matrices_of(self.block(index), self.family) if f"{path}.{m.path}" not in self.shared]

    @cached_property
    def shared(self) -> dict[str, str]:
        """Parameters of blocks that are those of an earlier block, by name: {name: that of the first}."""
        inside = self.family.blocks + "."
        tied = getattr(self.model, "all_tied_weights_keys", None) or {}
        return {name: first for name, first in tied.items() if name.startswith(inside) and first.startswith(inside)}

    def shapes(self) -> dict[str, tuple[int, int]]:
        """(out, in) of every prunable matrix by its full name, in order."""
        return {
            f"{path}.{matrix.name}": matrix.shape
            for index, path in enumerate(self.block_names)
            for matrix in self.matrices(index)
        }

    @property
    def coverage(self) -> float:
        """Share of the weights of all blocks, vectors apart, that `matrices` holds."""
        total = sum(
            parameter.numel()
            for index, path in enumerate(self.block_names)
            for name, parameter in self.block(index).named_parameters()
            if parameter.ndim > 1 and f"{path}.{name}" not in self.shared
        )
        return sum(out * width for out, width in self.shapes().values()) / max(total, 1)

    def left_dense(self) -> list[str]:
        """What of the blocks is no prunable matrix, and why: "mlp.gate (a router)", a line a kind."""
        return [f"{name} ({reason})" for name, reason in sorted(self.family.dense.items())]

    @property
    def stays_dense(self) -> dict[str, str]:
        """Full names of what of the blocks is never pruned, and why; a block may lack some of them."""
        dense = self.family.dense.items()
        return {f"{path}.{name.removesuffix('.weight')}": reason for path in self.block_names for name, reason in dense}

    @property
    def unused(self) -> str:
        """Kinds of tensors of the files that the model does not use, as text; "" if there are none."""
        return ""

    def unpruned(self) -> list[str]:
        """Sentences on what a user may think is pruned and is not: large parts of blocks, other inputs' towers."""
        found = []
        if self.coverage < LOW_COVERAGE:
            found.append(
                f"only {self.coverage:.0%} of the weights of the blocks are matrices that can be pruned; these stay dense: "
                f"{', '.join(self.left_dense())}"
            )
        others = [path for path in block_lists(self.model) if path != self.family.blocks]
        if others:
            found.append(f"only {self.family.blocks} is pruned; {', '.join(others)} stays dense")
        return found

    @property
    def limit(self) -> int | None:
        """Tokens that a window may have at most; None where the config names no limit, or nothing ends there."""
        return limit_of(self.text_config)

    @property
    def window(self) -> int:
        """Tokens of a window where the user does not say."""
        return min(DEFAULT_WINDOW, stated_length(self.text_config) or DEFAULT_WINDOW)

    def check_length(self, tokens: int, what: str, cure: str) -> None:
        """Refuse what is longer than a table of positions, and warn of what is longer than rotary ones were made for.

        what, cure: of so many tokens, for the line that says so. Raises CalibrationError.
        """
        limit = self.limit
        if limit is None or tokens <= limit:
            return
        if has_table(self.text_config):
            raise CalibrationError(f"{what} is longer than the {limit} positions of {self.name}: pass {cure}")
        warnings.warn(
            f"{what} is longer than the {limit} that {self.name} was made for; pass {cure} to stay within them",
            UserWarning,
            stacklevel=3,
        )

    @property
    def vocabulary(self) -> int:
        """Token ids are below this."""
        return int(self.text_config.vocab_size)

    def tokenizer(self, given: Any = None) -> Any:
        """The given tokenizer (an object or its folder), or the model's own. Raises CheckpointError if there is none."""
        if given is not None:
            self._tokenizer = given
        if not callable(self._tokenizer):  # none yet, a folder, or what is no tokenizer
            self._tokenizer = load_tokenizer(self._tokenizer_folder(), self.trust_remote_code, self._tokenizer)
        return self._tokenizer

    @property
    def loaded_tokenizer(self) -> Any:
        """The tokenizer that was given or loaded so far; None if nothing needed one."""
        return self._tokenizer

    @abstractmethod
    def _tokenizer_folder(self) -> str | Path: ...

    @property
    def in_place(self) -> bool:
        """Whether what is done to it is done to the caller's own object."""
        return False

    @property
    def folder(self) -> Path | None:
        """The folder that it came from; None for an object."""
        return None if self.checkpoint is None else self.checkpoint.folder

    @property
    def stored_config(self) -> Mapping[str, Any]:
        """What config.json of its folder holds, as it was opened; nothing for an object."""
        return {} if self.checkpoint is None else self.checkpoint.config

    @property
    def address(self) -> str:
        """How others refer to it: a hub id or a path; empty for an object that does not say where it is from."""
        return self.name

    @property
    def said(self) -> str:
        """What a command or a recipe calls it: its folder or hub id, or a placeholder for an object."""
        return MODEL if self.in_place else self.name

    def resolve(self, name: str) -> str:
        """Give a path that is relative to its folder as one that holds everywhere."""
        return name if self.folder is None else resolved(name, self.folder)

    @abstractmethod
    def digest(self) -> str:
        """sha256 over config and weights: what "the same model" means to a resume."""

    def digest_before(self, out: str | Path | None) -> str:
        """Give the digest; of an object that an earlier call changed and wrote to `out`, the one before that."""
        return self.digest()

    def result_digest(self) -> str:
        """Give the digest after a run, by which `digest_before` knows it again; empty for a folder, which no run changes."""
        return ""

    def become(self, folder: Path) -> None:
        """Take over the result of an earlier call, where results are in the caller's object."""
        return

    @abstractmethod
    def begin(self, output: OutputFolder) -> list[dict[str, Any]]:
        """Begin an output whose blocks are changed one by one. Returns the journal lines of those that need no work."""

    @abstractmethod
    def write_block(
        self, output: OutputFolder, tensors: Callable[[], Mapping[str, Tensor]], info: Mapping[str, Any]
    ) -> None:
        """Write a changed block, as `tensors` gives it, with what is known of it; an object keeps it, and writes at the end."""

    @abstractmethod
    def write_rest(self, output: OutputFolder, left_out: Container[str] = ()) -> Path | None:
        """Complete the weights of an output. Returns where transformers put config and tokenizer, for an object.

        left_out: tensors of the files that were written with a block.
        """

    @abstractmethod
    def write_changed(
        self, output: OutputFolder, model: Any, changed: Mapping[str, Tensor], scales: Mapping[str, Tensor]
    ) -> Path | None:
        """Write all weights, with changed ones in place of the old. Returns what `write_rest` returns.

        model: this model whole, with the changes. changed: its changed parameters by name. scales: changed ones of a
        quantised folder, by their names in the files; it stays quantised if there are any.
        """

    @abstractmethod
    def check_packed(self, wanted: Container[str], out: str | Path | None) -> None:
        """Raise UnsupportedModel or CheckpointError if matrices cannot be written as compressed-tensors packs them.

        wanted: their full names.
        """

    @abstractmethod
    def as_folder(self) -> Any:
        """Give the `FolderModel`. Raises CheckpointError for an object."""

    def beside(self, name: str) -> Path | None:
        """A file beside the weights; None for an object, and where there is no such file."""
        path = None if self.folder is None else self.folder / name
        return path if path is not None and path.is_file() else None

    @abstractmethod
    def as_checkpoint(self, output: OutputFolder) -> Checkpoint:
        """Its own files; those of an object are written among the states of `output` first."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of the weights."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Of the weights, as the config states it or the first of them has it."""

    @abstractmethod
    def load(self, index: int, pruned: Checkpoint | None = None) -> nn.Module:
        """The block, its weights in memory. pruned: those of an earlier try, instead of the model's own."""

    def release(self, index: int) -> None:
        """Give back what `load` took."""
        return

    def load_embeddings(self) -> None:
        """Bring what stands around the blocks, but for the head, into memory."""
        return

    def release_embeddings(self) -> None:
        """Give back what `load_embeddings` took."""
        return

    @abstractmethod
    def whole(self) -> ObjectModel:
        """The same model, all of it in memory; of a folder, loaded anew at every call."""

    @abstractmethod
    def fresh(self) -> Any:
        """All of the model in memory, apart from this one: it may be changed."""

    def check_output(self, out: str | Path | None) -> None:
        """Raise CheckpointError if a result cannot go there."""
        if out is not None:
            check_place(Path(out))
