"""Models, opened: a folder or a hub id by its files, an object as it is."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from topiarist.checkpoints.dequantised import readable
from topiarist.checkpoints.finished import read_finished
from topiarist.checkpoints.reading import Checkpoint, locate, weight_digest
from topiarist.checkpoints.writing import REPORT, OutputFolder
from topiarist.core.errors import CheckpointError
from topiarist.core.products import quick_products
from topiarist.models.checks import check_folder, check_object, device_or_default
from topiarist.models.interface import OpenedModel
from topiarist.models.saving import save_model, write_model

NOTES = frozenset({"_name_or_path", "architectures", "dtype", "pruning_config", "torch_dtype", "transformers_version"})
"""Entries of a config that loading and saving change, and no forward of a model in memory depends on."""


class ObjectModel(OpenedModel):
    """A model object in memory: what is done to its blocks is done to it.

    origin: the folder that it was loaded from, whose name, digest and tokenizer it has.
    """

    def __init__(self, model: nn.Module, *, origin: OpenedModel | None = None) -> None:
        self.model, self._origin = model, origin
        self.device = next(model.parameters()).device
        config = getattr(model, "config", None)
        self.name = origin.name if origin else str(getattr(config, "name_or_path", "") or type(model).__name__)
        self.checkpoint = origin.checkpoint if origin else None

    def _tokenizer_folder(self) -> str | Path:
        return self._origin._tokenizer_folder() if self._origin else self.config.name_or_path

    def digest(self) -> str:
        """sha256 over the config, and names and values of all parameters and stored buffers; of a loaded folder, its files'."""
        if self._origin is not None:
            return self._origin.digest()
        ask = getattr(getattr(self.model, "config", None), "to_dict", dict)
        total = hashlib.sha256(json.dumps(_without_notes(ask()), sort_keys=True, default=str).encode())
        stored = self.model.state_dict()
        buffers = [(name, buffer) for name, buffer in self.model.named_buffers() if name in stored]
        for name, tensor in [*self.model.named_parameters(), *buffers]:
            total.update(f"{name} {weight_digest(tensor)}".encode())
        return total.hexdigest()

    @property
    def in_place(self) -> bool:
        """True, but for a folder's model."""
        return self._origin is None

    @property
    def address(self) -> str:
        """That of the folder, or what transformers noted in the config."""
        return self._origin.address if self._origin else str(getattr(self.config, "name_or_path", "") or "")

    def digest_before(self, out: str | Path | None) -> str:
        """Look for the digest of now in the report of `out`."""
        digest = self.digest()
        if self._origin is None and out is not None and (Path(out) / REPORT).is_file():
            written = read_finished(Path(out))
            if written.get("result_digest") == digest:
                return str(written.get("fingerprint", {}).get("model"))
        return digest

    def result_digest(self) -> str:
        """Its digest as it is now; empty for a folder's model."""
        return self.digest() if self._origin is None else ""

    def become(self, folder: Path) -> None:
        """Load the weights of the result into the object, unless it is a folder's model."""
        if self._origin is None:
            own = type(self.model).__module__.startswith("transformers_modules")  # code that runs already
            result = open_model(folder, device="cpu", trust_remote_code=own)
            self.model.load_state_dict(result.whole().model.state_dict())

    def begin(self, output: OutputFolder) -> list[dict[str, Any]]:
        """Begin the output; an object that was changed in part is gone, so that nothing is finished."""
        output.begin(self.nbytes)
        return []

    def write_block(
        self, output: OutputFolder, tensors: Callable[[], Mapping[str, Tensor]], info: Mapping[str, Any]
    ) -> None:
        """Nothing: the object holds its blocks."""

    def write_rest(self, output: OutputFolder, left_out: Container[str] = ()) -> Path | None:
        """Let transformers write the whole object."""
        return write_model(output, self.model, self.loaded_tokenizer)

    def write_changed(
        self, output: OutputFolder, model: Any, changed: Mapping[str, Tensor], scales: Mapping[str, Tensor]
    ) -> Path | None:
        """Let transformers, which knows the names, write the changed object whole."""
        return write_model(output, model, self.loaded_tokenizer)

    def check_packed(self, wanted: Container[str], out: str | Path | None) -> None:
        """Refuse an output: the object has its values in its own dtype."""
        if out is not None:
            raise CheckpointError(
                "a model object is quantised in place: save it, and give its folder to write packed files"
            )

    def as_folder(self) -> Any:
        """That of a folder's model; an object raises CheckpointError."""
        if self._origin is None:
            raise CheckpointError("this needs the files of a model: save the object, and give its folder")
        return self._origin.as_folder()

    def as_checkpoint(self, output: OutputFolder) -> Checkpoint:
        """The folder's files, or those that transformers writes."""
        if self._origin is not None:
            return self._origin.as_checkpoint(output)
        return Checkpoint(save_model(output, self.model, self.loaded_tokenizer))

    @property
    def nbytes(self) -> int:
        """Bytes of all parameters; of a loaded folder, those of its files."""
        return self._origin.nbytes if self._origin else sum(p.nbytes for p in self.model.parameters())

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the first floating parameter."""
        return next(p.dtype for p in self.model.parameters() if p.is_floating_point())

    def load(self, index: int, pruned: Checkpoint | None = None) -> nn.Module:
        """The block, which is in memory already."""
        return self.block(index)

    def check_output(self, out: str | Path | None) -> None:
        """Raise what the folder that the model was loaded from raises, if there is one."""
        (self._origin or super()).check_output(out)

    def whole(self) -> ObjectModel:
        """The model itself."""
        return self

    def fresh(self) -> Any:
        """A deep copy, in evaluation mode."""
        return copy.deepcopy(self.model).eval()


def _without_notes(entry: Any) -> Any:
    """A config's entries, also of its parts, without NOTES."""
    if not isinstance(entry, Mapping):
        return entry
    return {str(key): _without_notes(value) for key, value in entry.items() if key not in NOTES}


def shell(opened: OpenedModel) -> ObjectModel:
    """A model folder's modules and shapes without its weights, for a process that gets its share of them from another."""
    opened.model.tie_weights()  # what was made without memory has forgotten which parameters are one
    found = ObjectModel(opened.model, origin=opened)
    found.device = opened.device
    return found


def open_model(
    model: str | Path | nn.Module | OpenedModel,
    *,
    device: str | torch.device | None = None,
    trust_remote_code: bool = False,
    tokenizer: Any = None,
    stands_for: str | None = None,
) -> OpenedModel:
    """Open a folder, a hub id or a model object. Nothing of a folder but its headers is read yet.

    device: where forwards run; a GPU if there is one. An object stays where it is.
    trust_remote_code: whether code in the folder may run; it is refused, never asked about, otherwise.
    tokenizer: taken instead of the model's own. stands_for: what it is called instead, being made of that.
    Raises CheckpointError, UnsupportedModel or DeviceError for everything that cannot be opened rightly: no such folder,
    tensors that are missing or of another shape, adapters, offloaded weights, a device that is not here. Quantised weights
    are read as what they stand for, one at a time, where their format is known, and refused otherwise.
    """
    from topiarist.models.folder import FolderModel

    if isinstance(model, OpenedModel):
        return model
    where = device_or_default(device)
    if isinstance(model, nn.Module):
        check_object(model)
        opened: OpenedModel = ObjectModel(model)
    else:
        folder = locate(model)
        if not folder.is_dir():
            raise CheckpointError(f"{model} is a file: name the folder of a model")
        check_folder(folder)
        opened = FolderModel(
            readable(folder), device=where, trust_remote_code=trust_remote_code, name=stands_for or str(model)
        )
    opened._tokenizer, opened.intermediate = tokenizer, stands_for is not None
    return opened


@contextmanager
def evaluated(*models: nn.Module | None) -> Iterator[None]:
    """Nothing is dropped out inside, and products are quick; afterwards every module is in its own mode again."""
    given = [model for model in models if model is not None]
    training = [module for model in given for module in model.modules() if module.training]
    for model in given:
        model.eval()
    halves = any(parameter.itemsize == 2 for model in given for parameter in model.parameters())
    try:
        with quick_products() if halves else nullcontext():  # a mode costs every call some microseconds
            yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def at_rest(model: nn.Module) -> Iterator[None]:
    """The model as its inputs are measured: nothing is dropped out, and experts run one by one, so that each is seen."""
    config: Any = getattr(model, "config", None)
    experts = getattr(config, "_experts_implementation", None)
    with evaluated(model):
        if experts is not None:
            config._experts_implementation = "eager"
        try:
            yield
        finally:
            if experts is not None:
                config._experts_implementation = experts
