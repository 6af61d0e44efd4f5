"""The folder that a run writes: blocks one by one while it works, an ordinary model when it is finished.

OUT while work goes on: `pruning_journal.jsonl` (first line: what the run is; then a line for every file of weights that
is whole), `pruning_run.lock`, and `run_state/`: the blocks done so far, and what else the run needs to go on after a
kill. At the end the blocks are gathered in ordinary files, each block's file going as soon as its tensors are in one.
Report and config come last, so that an unfinished folder never opens as a model.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from topiarist.checkpoints.access import check_name
from topiarist.checkpoints.atomic import TEMPORARY, disk_errors, fsync, save_tensors, write_atomically
from topiarist.checkpoints.finished import REPORT, check_files, described, read_finished
from topiarist.checkpoints.journal import complete_lines, differences, listed, sealed
from topiarist.checkpoints.locking import LOCK, FolderLock
from topiarist.checkpoints.reading import INDEX, Checkpoint, StoredTensor, file_digest
from topiarist.checkpoints.side_files import copy_side_files
from topiarist.checkpoints.states import KEPT, FileState, SavedState
from topiarist.checkpoints.streaming import SHARD_BYTES, Chunks, split, write_tensors
from topiarist.core.errors import CheckpointError, DamagedWeights, TopiaristError, UnsupportedModel

FORMAT = 2
"""Of journal and report. Format 1, of topiarist 0.1, is read but not resumed."""
JOURNAL = "pruning_journal.jsonl"
STATES = "run_state"
"""Folder of OUT, gone when the run is finished."""
STAGES = "stages"
"""Folder of OUT with the results of a recipe's earlier stages."""
MASKS = "masks.safetensors"
"""Beside a model whose masks were learned, or for another copy of its base."""
ADAPTER = "adapter"
"""Folder beside a pruned model with its low-rank companion."""
_CHECKED = (
    INDEX,
    MASKS,
    "pruning_spec.json",
    "pruning_allocation.json",
    "modeling_pruned.py",
    f"{ADAPTER}/adapter_model.safetensors",
)
"""Files beside weights and config without which a result is not what its report says."""


def bytes_to_write(weights: int) -> int:
    """Bytes of disk that a run needs which writes blocks and gathers them at the end: all, and one file twice."""
    return int(1.01 * weights) + min(weights, SHARD_BYTES)


def check_place(folder: Path) -> None:
    """Raise CheckpointError for an output folder that is no folder, or that holds something else than a run."""
    check_name(folder)
    if folder.parts[:1] == ("~",):  # as in --out=~/OUT, and in a recipe
        raise CheckpointError(
            f"{folder}: only a shell knows what ~ is, and here it was not asked; write the whole path"
        )
    if not folder.exists():
        if folder.is_symlink():
            raise CheckpointError(f"{folder} is a link that leads nowhere; remove it, or choose another output")
        return
    if not folder.is_dir():
        raise CheckpointError(f"{folder} exists and is not a folder; choose another output")
    ours = (f"{JOURNAL}{TEMPORARY}", LOCK, STAGES)
    run = any((folder / name).is_file() for name in (JOURNAL, REPORT))
    if not run and any(path.name not in ours for path in folder.iterdir()):
        raise CheckpointError(f"{folder} exists and is not a topiarist run; choose another output or empty it")


class OutputFolder:
    """Where a run writes.

    Raises CheckpointError for a folder that holds another run or something else, and for a finished run whose files are
    damaged. Nothing is created before the `with` block, inside which nobody else writes there:

        with OutputFolder(out, fingerprint) as output:
            if output.complete:
                return Report.from_folder(output.folder)
            output.begin(bytes_to_write(checkpoint.weight_bytes()))
            ...

    fingerprint: JSON values that say what run this is; one of other values is another run.
    """

    def __init__(self, folder: str | Path, fingerprint: Mapping[str, Any]) -> None:
        self.folder = Path(folder)
        self.fingerprint = json.loads(json.dumps({"format": FORMAT, **fingerprint}))
        self.complete = False
        self._lock = FolderLock(self.folder)
        self._look()

    def __enter__(self) -> OutputFolder:
        if not self.complete:
            self._lock.acquire()
            try:
                self._look()  # again: another run may have come and gone in between
                self._remove_strays()
            except BaseException:
                self._lock.release()
                raise
        elif self.states.exists() or (self.folder / LOCK).exists():  # killed between the last file and this
            shutil.rmtree(self.states, ignore_errors=True)
            with suppress(CheckpointError):  # who holds it removes it
                self._lock.acquire()
                self._lock.release()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: object) -> None:
        broken = isinstance(error, TopiaristError) and self._lock.made
        if broken and (isinstance(error, DamagedWeights | UnsupportedModel) or self._just_begun):
            shutil.rmtree(self.folder, ignore_errors=True)  # no run can go on from it
        self._lock.release()

    def __getstate__(self) -> dict[str, Any]:
        """Without the lock: other processes of the same run may write, and this one holds it for them."""
        return {**vars(self), "_lock": FolderLock(self.folder)}

    @property
    def _journal(self) -> Path:
        return self.folder / JOURNAL

    @property
    def _just_begun(self) -> bool:
        """Whether there is nothing yet but what says which run this is."""
        return all(path.name in (JOURNAL, LOCK) for path in self.folder.rglob("*") if path.is_file())

    @property
    def states(self) -> Path:
        """A folder for what is no part of the model; the run's end removes it."""
        return self.folder / STATES

    def state(self, name: str) -> SavedState:
        """A file of tensors in `states`."""
        return FileState(self.states / f"{name}.safetensors")

    def _look(self) -> None:
        """Read what is there."""
        self.blocks: list[dict[str, Any]] = []
        """Journal lines of finished blocks, in order."""
        self.files: dict[str, dict[str, Any]] = {}
        """Journal lines of finished files of the model, by name."""
        check_place(self.folder)
        if self._journal.is_file():
            if lines := complete_lines(self._journal):
                self._compare(lines[0])
                self.blocks = [line for line in lines[1:] if "block" in line]
                self.files = {line["file"]: line for line in lines[1:] if "file" in line}
        elif (self.folder / REPORT).is_file():
            report = read_finished(self.folder)
            self._compare(report.get("fingerprint", {}))
            check_files(self.folder, report.get("files", {}))
            self.complete = True

    def _compare(self, found: Mapping[str, Any]) -> None:
        if found.get("format") != FORMAT:
            raise CheckpointError(
                f"{self.folder} was written by another version of topiarist: its results can be read, but not resumed; "
                "choose another output, or delete it"
            )
        differing = list(differences(found, self.fingerprint))
        if differing:
            raise CheckpointError(
                f"{self.folder} holds another run: {listed(differing)}. Choose another output, or delete it"
            )

    def _remove_strays(self) -> None:
        """Remove what a kill left half-written: ours, and what libraries call theirs."""
        for place in (self.folder, self.folder / ADAPTER, self.states, self.states / "blocks"):
            for pattern in (f"*{TEMPORARY}", ".tmp*"):
                for stray in place.glob(pattern):
                    stray.unlink()

    def begin(self, expected_bytes: int) -> None:
        """Write the journal's first line. Raises CheckpointError if the disk cannot hold `expected_bytes`."""
        written = sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())
        free = shutil.disk_usage(self.folder).free
        if free + written < expected_bytes:
            raise CheckpointError(
                f"{self.folder} needs {expected_bytes / 1e9:.2f} GB, only {free / 1e9:.2f} GB are free: make room and run "
                "the same command again"
            )
        self._write_journal()  # anew, for a kill may have left half a line at its end

    def _write_journal(self) -> None:
        lines = [self.fingerprint, *self.blocks, *self.files.values()]
        write_atomically(self._journal, "".join(sealed(line) + "\n" for line in lines), cure=KEPT)

    def _append(self, line: Mapping[str, Any]) -> dict[str, Any]:
        plain = json.loads(json.dumps(line))  # as a resumed run will read it
        with disk_errors(f"cannot write to {self.folder}", cure=KEPT), self._journal.open("a") as journal:
            journal.write(sealed(plain) + "\n")
            journal.flush()
            os.fsync(journal.fileno())
        return plain

    def done(self) -> list[dict[str, Any]]:
        """Journal lines of the blocks that need not be done again, from the first on; the others are forgotten."""
        if self.files:  # gathered blocks are gone: either everything is as it was, or all begins anew
            if all(self._holds(line["file"], line) for line in self.files.values()) and all(
                map(self._kept, self.blocks)
            ):
                return self.blocks
            for name in self.files:
                (self.folder / name).unlink(missing_ok=True)
            whole = 0
        else:
            whole = next((i for i, line in enumerate(self.blocks) if not self._kept(line)), len(self.blocks))
        if whole < len(self.blocks) or self.files:
            self.blocks, self.files = self.blocks[:whole], {}
            self._write_journal()
        return self.blocks

    def tensor_bytes(self) -> dict[str, int]:
        """Bytes of every tensor in the finished files of the model, by name."""
        return {name: size for line in self.files.values() for name, size in line["tensors"].items()}

    def _gathered(self) -> set[str]:
        """The tensors that are in files of the model."""
        return set(self.tensor_bytes())

    def _kept(self, line: Mapping[str, Any]) -> bool:
        return self._gathered().issuperset(line["tensors"]) or self._holds(line["block"], line)

    def _holds(self, name: str, line: Mapping[str, Any]) -> bool:
        path = self.folder / name
        return path.is_file() and file_digest(path) == line["sha256"]

    def write_block(self, tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> None:
        """Write the next block: its tensors under their names on disk, then its journal line with `info`."""
        path = self.states / "blocks" / f"{len(self.blocks):05d}.safetensors"
        with disk_errors(f"cannot write to {self.folder}", cure=KEPT):
            path.parent.mkdir(parents=True, exist_ok=True)
        save_tensors(path, tensors, {"format": "pt"}, cure=KEPT)
        where = str(path.relative_to(self.folder))
        line = {"block": where, "sha256": file_digest(path), "tensors": list(tensors), **info}
        self.blocks.append(self._append(line))

    def block(self, line: Mapping[str, Any]) -> Checkpoint:
        """The weights of a finished block."""
        return Checkpoint.of_shard(self.folder / line["block"])

    def gather(self, checkpoint: Checkpoint, rest: Sequence[str]) -> None:
        """Write all blocks, and the tensors of `checkpoint` named in `rest`, as the files of a model.

        A block's file goes when its tensors are in place, so that the disk holds no second copy of a large model.
        """
        sources: dict[str, Any] = dict.fromkeys(rest, checkpoint)
        for line in self.blocks:
            if (self.folder / line["block"]).is_file():
                sources |= dict.fromkeys(line["tensors"], self.block(line))
            else:  # killed after it went
                sources |= dict.fromkeys(line["tensors"])
        for file in self.files:
            whole = Checkpoint.of_shard(self.folder / file)
            sources |= dict.fromkeys(whole.files, whole)

        def remove_gathered() -> None:
            gathered = self._gathered()
            for line in self.blocks:
                if gathered.issuperset(line["tensors"]):
                    (self.folder / line["block"]).unlink(missing_ok=True)

        stored = {name: source.stored(name) for name, source in sources.items()}
        self.write_files(stored, lambda name: sources[name].chunks(name), after=remove_gathered)

    def write_files(
        self, tensors: Mapping[str, StoredTensor], chunks: Chunks, *, after: Callable[[], None] = lambda: None
    ) -> None:
        """Write the files of a model from tensors that come one by one; files that an earlier try finished stay.

        chunks: gives the bytes of a tensor by its name. after: called when a file is whole.
        """
        for name, names in split(tensors).items():
            if name in self.files:
                continue
            digest = write_tensors(self.folder / name, {n: tensors[n] for n in names}, chunks, cure=KEPT)
            self._add_file(name, digest, {n: tensors[n].nbytes for n in names})
            after()

    def take_files(self, written: Path) -> None:
        """Move the weights of a model folder inside `states` to their place."""
        for path in sorted(set(Checkpoint(written).files.values())):
            shard = Checkpoint.of_shard(path)
            sizes = {name: shard.nbytes(name) for name in shard.files}
            with disk_errors(f"cannot write to {self.folder}", cure=KEPT):
                path.chmod(0o644)
                fsync(path)
                digest = file_digest(path)
                path.replace(self.folder / path.name)
                fsync(self.folder)
            self._add_file(path.name, digest, sizes)

    def _add_file(self, name: str, digest: str, sizes: Mapping[str, int]) -> None:
        size = (self.folder / name).stat().st_size
        line = {"file": name, "sha256": digest, "bytes": size, "tensors": dict(sizes)}
        self.files[name] = self._append(line)

    def finish(self, config: Mapping[str, Any], report: Mapping[str, Any], *, side_files: Path) -> None:
        """Write everything that makes the folder a model: index, side files, report, and config last.

        side_files: the model folder whose tokenizer, chat templates and code are copied.
        """
        with disk_errors(f"cannot write to {self.folder}", cure=KEPT):
            copy_side_files(side_files, self.folder)
        if len(self.files) > 1:
            weight_map = {name: file for file, line in self.files.items() for name in line["tensors"]}
            total = sum(size for line in self.files.values() for size in line["tensors"].values())
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            self.write_text(INDEX, json.dumps(index, indent=2) + "\n")
        about = json.dumps(config, indent=2) + "\n"
        raw = about.encode()
        files = {name: {"bytes": line["bytes"], "sha256": line["sha256"]} for name, line in self.files.items()}
        for name in _CHECKED:
            if (path := self.folder / name).is_file():
                files[name] = described(path)
        files["config.json"] = {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
        whole = {**report, "files": files, "fingerprint": self.fingerprint}
        self.write_text(REPORT, json.dumps(whole, indent=2) + "\n")
        self.write_text("config.json", about)
        self._journal.unlink()
        fsync(self.folder)
        shutil.rmtree(self.states, ignore_errors=True)
        self.complete = True

    def write_text(self, name: str, text: str) -> None:
        """Write a small file atomically."""
        write_atomically(self.folder / name, text, cure=KEPT)
