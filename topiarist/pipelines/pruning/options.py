"""What a one-shot run is asked for, as one value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import PositiveInt

from topiarist.allocate import ALLOCATIONS, Rule
from topiarist.core.errors import CalibrationError
from topiarist.core.grammar import OptionError
from topiarist.core.options import About, Registered, Settings, options
from topiarist.core.patterns import Pattern, parse_pattern
from topiarist.core.registry import name_of
from topiarist.pipelines.common.options import HOW, Bits, Group, OnePattern, TextOptions
from topiarist.pipelines.pruning.correct import Correct
from topiarist.pipelines.pruning.refine import Refine
from topiarist.pipelines.pruning.sparsellm import METHODS, Method, SparseLLM
from topiarist.quantization import GPTQ, Rounding
from topiarist.solvers import ALPS, GramSolver, Solver


def _no_rule(given: Any) -> bool:
    """Whether an allocation is a file or a mapping of patterns, not one of the rules."""
    if isinstance(given, Mapping):
        return given.get("name") not in ALLOCATIONS
    if not isinstance(given, str | Path):
        return given is None
    return str(given).partition(":")[0].strip() not in ALLOCATIONS


@options
class PruneOptions(TextOptions):
    """Everything that `prune` takes beside the model, the output folder and the progress bar."""

    method: Annotated[Method, Registered(METHODS, base=(Solver,))] = ALPS()
    """magnitude, wanda, sparsegpt, isc, alps or sparsellm; alps:preset=best sets a field."""
    pattern: OnePattern = None
    """2:4 keeps 2 of 4; 0.7 makes 70 % zeros; 0.7/row; default 2:4. With an allocation: how much is kept in all."""
    allocation: Annotated[
        Rule | Path | str | Mapping[str, Any] | None,
        Registered(ALLOCATIONS, "allocation rule", base=(Rule,), other=_no_rule), About(metavar="RULE|FILE"),
    ] = None  # fmt: skip
    """How much each layer gets: uniform, linear, owl, sensitivity or search (owl:threshold=7,level=matrix sets fields), or a
    JSON file of layer name -> pattern."""
    allocation_work: Annotated[Path | None, HOW] = None
    """Folder for what a rule takes long to get; search: default OUT.search."""
    bits: Bits | None = None
    """Also put the weights that stay on 8 or 4 bits, by GPTQ on the same inputs (8 bits without data: by rounding); OUT is
    written as `quantize` does."""
    group: Group = "auto"
    """With bits: consecutive weights that share a scale; auto: 128, or the largest of 64 and 32 that fits every matrix;
    channel: a whole row."""
    low_rank: PositiveInt | None = None
    """Rank of a companion to every pruned matrix, in closed form from the same inputs: a PEFT adapter in OUT/adapter."""
    skip: Sequence[str] = ()
    """Regular expression of layers that stay dense."""
    batch_size: PositiveInt | None = None
    """Windows a forward pass; default 8, or 1 with refine, whose steps these are."""
    true_sequential: bool = False
    """Later matrices of a block see the already pruned earlier ones."""
    correct: Annotated[Correct | None, Settings(Correct)] = None
    """Each matrix also makes good what those before it lost of the dense model (share=0.5 sets a field)."""
    refine: Annotated[Refine | None, Settings(Refine)] = None
    """After each block, train its kept weights towards the dense model's states (epochs=4 sets a field)."""
    spill: Annotated[Path | None, HOW] = None
    """Folder for hidden states that do not fit in memory."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bits is None:
            if self.group != "auto":
                raise OptionError("group is how quantised weights share scales: give bits=8 or bits=4 with it")
        elif self.refine is not None:
            raise OptionError("refine trains weights off the grid of bits: prune with refine, then quantize the result")
        elif isinstance(self.method, SparseLLM):
            raise OptionError(
                "sparsellm changes the weights of a network together, bits those of a matrix: prune, then quantize the result"
            )

        if self.low_rank is not None and (self.refine is not None or isinstance(self.method, SparseLLM)):
            other = "refine" if self.refine is not None else "sparsellm"
            raise OptionError(
                f"low_rank makes up for what a matrix lost, which {other} changes again afterwards: leave one of them out"
            )

    @property
    def windows_a_forward(self) -> int:
        """`batch_size`, or what suits the run: refinement takes a step a forward, and many small steps beat few large ones."""
        return self.batch_size or (8 if self.refine is None else 1)

    @property
    def base_pattern(self) -> Pattern:
        """The pattern of every layer, or of the whole with an allocation; 2:4 if none was given."""
        return parse_pattern("2:4") if self.pattern is None else self.pattern

    @property
    def quantizer(self) -> GPTQ | Rounding:
        """How the weights that stay are put on the grid of `bits`."""
        return Rounding() if self.data is None and self.bits == 8 else GPTQ()

    @property
    def rule(self) -> Rule | None:
        """The allocation if it is a rule; None if it is a file or a mapping."""
        return self.allocation if isinstance(self.allocation, Rule) else None

    def check_text(self) -> None:
        """Raise CalibrationError if there is no text and something needs it."""
        if self.data is not None:
            return
        wanting = without = ""
        if isinstance(self.method, SparseLLM) or self.method.needs_data:
            wanting, without = name_of(METHODS, self.method), " (only magnitude does without)"
        elif isinstance(self.method, GramSolver) and self.method.refit:
            wanting = "a refit"
        elif self.correct is not None:
            wanting = "error correction"
        elif self.refine is not None:
            wanting = "refinement"
        elif self.bits is not None and self.quantizer.needs_data:
            wanting, without = f"GPTQ to {self.bits} bits", " (only 8 bits do without)"
        elif self.low_rank is not None:
            wanting = "a low-rank companion"
        elif self.rule is not None and self.rule.measured_by:
            wanting = f"allocation {name_of(ALLOCATIONS, self.rule)}"
        if wanting:
            raise CalibrationError(
                f"{wanting} looks at what flows through the model: give calibration text, --data FILE on the command line "
                f"and data= in Python{without}"
            )
