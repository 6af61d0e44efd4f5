"""What a run did: the part that all runs share, and that of one-shot pruning."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from topiarist.checkpoints.reading import read_json
from topiarist.checkpoints.writing import REPORT
from topiarist.core.errors import CheckpointError, TopiaristError
from topiarist.results.first_version import REPORT_VERSION, renewed

R = TypeVar("R", bound="RunReport")
RUN = "pruning_run.json"
NOT_WRITTEN = ("run", "output", "result", "recipe")
"""Fields of a report that are not in its file: what differs from run to run, and what is no text."""


@contextmanager
def as_written(folder: Path) -> Iterator[None]:
    """What is read from a result's JSON files inside is what a run wrote. Raises CheckpointError where it is not."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, ValueError, IndexError, ArithmeticError) as error:
        if isinstance(error, TopiaristError):
            raise
        raise CheckpointError(
            f"the report of {folder}, or what was measured, is damaged ({type(error).__name__}: {str(error)[:100]}): run the "
            "same command again in a new folder"
        ) from error


@dataclass(kw_only=True)
class RunReport:
    """The result of a run. `to_dict` holds only what repeats; seconds and memory stay in `run`."""

    pipeline: ClassVar[str]
    """What kind of run it was: prune, learn, shrink, ..."""
    derived: ClassVar[tuple[str, ...]] = ()
    """Properties that are written beside the fields, for readers without topiarist."""
    parts: ClassVar[Mapping[str, Callable[[Any], Any]]] = {}
    """Fields whose entries are values of their own: field -> how one is read back."""

    method: str
    settings: Mapping[str, Any]
    """Of the method."""
    pattern: str
    """What was asked for, in a word: 2:4, 0.7, mixed, keep 0.8."""
    model: str
    """What the user called the dense model."""
    base_model: str = ""
    """Where readers find it: a hub id, a path relative to the result, or nothing."""
    base_digest: str = ""
    """sha256 over its config and weights."""
    calibration: Mapping[str, Any] = field(default_factory=dict)
    """The text: num_windows, window_tokens, seed, digest of the tokens; empty for a run without text."""
    weights: Mapping[str, Any] = field(default_factory=dict)
    """Bytes of all weights `before` and `after`, and the `dtype` of most; of a run on a result, the `first` model of the chain
    (`model`, `bytes`)."""
    dense: list[dict[str, Any]] = field(default_factory=list)
    """What was left as it was, and why: what (a name without numbers), matrices, weights, why."""
    warnings: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)
    """The words of the command line that repeats this run."""
    not_in_command: list[str] = field(default_factory=list)
    """What was given as an object, and has a placeholder in the command."""
    recipe: Mapping[str, Any] = field(default_factory=dict)
    """The recipe of one stage that repeats this run; written beside the report."""
    result_digest: str = ""
    """Of a model object: its digest after the run."""
    run: dict[str, Any] = field(default_factory=dict)
    """Seconds by activity, peak memory, machine: differs from run to run."""
    output: str | None = None

    @classmethod
    def from_dict(cls: type[R], plain: Mapping[str, Any]) -> R:
        """Read a report back from `to_dict`; what it does not know is left out."""
        known = {entry.name: plain[entry.name] for entry in fields(cls) if entry.name in plain}
        known |= {name: [read(entry) for entry in known[name]] for name, read in cls.parts.items() if name in known}
        return cls(**known)

    @classmethod
    def from_folder(cls: type[R], folder: str | Path) -> R:
        """Read the report of a finished output folder. Raises CheckpointError if there is none."""
        folder = Path(folder)
        with as_written(folder):
            report = cls.from_dict(renewed(read_json(folder / REPORT)))
        report.run = read_json(folder / RUN) if (folder / RUN).is_file() else {}
        report.output = str(folder)
        return report

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON has it."""
        plain = {entry.name: getattr(self, entry.name) for entry in fields(self) if entry.name not in NOT_WRITTEN}
        plain |= {name: [asdict(part) for part in plain[name]] for name in self.parts}
        return {
            "report_version": REPORT_VERSION,
            "pipeline": self.pipeline,
            **{name: getattr(self, name) for name in self.derived},
            **plain,
        }

    def pruning_config(self, version: str) -> dict[str, Any]:
        """Provenance for config.json: small, and no key that any loader interprets."""
        return {
            "version": version,
            "pipeline": self.pipeline,
            "method": self.method,
            "settings": dict(self.settings),
            "pattern": self.pattern,
            "base_model": self.base_model,
            "base_digest": self.base_digest,
            "calibration": dict(self.calibration),
            **self.provenance(),
        }

    def provenance(self) -> dict[str, Any]:
        """What this kind of run adds to `pruning_config`."""
        return {}


@dataclass(frozen=True)
class LayerReport:
    """One pruned matrix."""

    name: str
    shape: tuple[int, int]
    pattern: str
    sparsity: float
    error: float
    """Relative reconstruction error on the calibration inputs."""
    tokens: int
    """Calibration tokens that reached it."""

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> LayerReport:
        """Read one back from JSON."""
        return cls(**{**plain, "shape": tuple(plain["shape"])})


@dataclass(frozen=True)
class BlockRefinement:
    """Relative squared error of a block's output on the held-out windows, before and after."""

    name: str
    before: float
    after: float
    best_epoch: int
    """0 if no epoch was better than the unrefined block, which is then kept."""


@dataclass(frozen=True)
class JointBlock:
    """A feed-forward network that was pruned as a whole."""

    name: str
    errors: Mapping[str, float]
    """Relative squared error of its output on the windows that choose, after every step: `local` is the local solver
    alone, then `epoch 1`, ..., `down_refit`."""
    best: str
    """The step that was kept."""


@dataclass(kw_only=True)
class Report(RunReport):
    """The result of `prune`."""

    pipeline: ClassVar[str] = "prune"
    derived: ClassVar[tuple[str, ...]] = ("sparsity", "mean_error")
    parts: ClassVar[Mapping[str, Callable[[Any], Any]]] = {
        "layers": LayerReport.from_dict,
        "refined": lambda plain: BlockRefinement(**plain),
        "joint": lambda plain: JointBlock(**plain),
    }

    layers: list[LayerReport] = field(default_factory=list)
    refined: list[BlockRefinement] = field(default_factory=list)
    """A BlockRefinement of every block, if refinement was asked for."""
    joint: list[JointBlock] = field(default_factory=list)
    """A JointBlock of every feed-forward network, if the method prunes them as a whole."""
    companion: Mapping[str, Any] = field(default_factory=dict)
    """Of a run with a low-rank companion: its rank, weights and bytes, and the matrices' errors with it."""
    allocation: Mapping[str, Any] = field(default_factory=dict)
    """Of a run whose patterns a rule chose: the rule, its scores and their standard errors."""
    quantized: Mapping[str, Any] = field(default_factory=dict)
    """Of a run that also quantised: `bits`, `group` (weights that share a scale; None: a row), and the `method`."""

    @property
    def sparsity(self) -> float:
        """Fraction of zeros over all pruned matrices."""
        total = sum(layer.shape[0] * layer.shape[1] for layer in self.layers)
        zeros = sum(layer.sparsity * layer.shape[0] * layer.shape[1] for layer in self.layers)
        return zeros / total if total else 0.0

    @property
    def mean_error(self) -> float:
        """Mean of the matrices' relative reconstruction errors."""
        return sum(layer.error for layer in self.layers) / len(self.layers) if self.layers else 0.0

    def by_kind(self) -> dict[str, list[LayerReport]]:
        """Group the matrices by what they are in a block: names without their numbers."""
        kinds: dict[str, list[LayerReport]] = {}
        for layer in self.layers:
            parts = [part for part in layer.name.split(".") if not part.isdigit()]
            kinds.setdefault(".".join(parts[-2:]), []).append(layer)
        return kinds

    def provenance(self) -> dict[str, Any]:
        """Sparsity of every matrix, and its pattern where they differ."""
        patterns = {layer.name: layer.pattern for layer in self.layers} if self.pattern == "mixed" else {}
        return {
            "sparsity": self.sparsity,
            "modules": {layer.name: round(layer.sparsity, 6) for layer in self.layers},
            **({"patterns": patterns} if patterns else {}),
            **({"quantized": dict(self.quantized)} if self.quantized else {}),
        }
