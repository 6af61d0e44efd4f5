"""The settings of SparseLLM, and the table of everything that `--method` and `tp.prune(method=...)` take."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat

from topiarist.core.options import Part, Registered, options
from topiarist.solvers import SOLVERS, Solver, SparseGPT


@options
class SparseLLM:
    """Prunes the feed-forward network of every block as a whole, everything else by the local solver.

    Minimises beta ||Wd p - Y||^2 + gamma ||p - act(s) z||^2 + alpha (||z - Wu X||^2 + ||s - Wg X||^2) over sparse weights and
    auxiliary activations p, z, s in turns (SparseLLM, arXiv 2402.17946; the steps are in `solvers/auxiliary.py`): weights
    are refitted to the auxiliaries and pruned by the local solver, then the auxiliaries move. Y is the dense network's
    output. At the end the last matrix is refitted to what the pruned first ones really give (`down_refit`; with `epochs` = 0
    that is all that is done, for most of the gain). Cost: about epochs + 2 times the local solver, and as many passes over
    the tokens in fp32.

    Differs from the authors' code in: 1. the attention of the block is pruned first, and the network's inputs and target are
    taken after that (`recompute_after_attention`). 2. The epoch with the smallest error of the network itself wins
    (`keep_best`), measured on calibration windows that fitted nothing; the plain local solution is among those it may be.
    3. The gate moves by Gauss-Newton steps instead of two gradient steps (`gate_rate` = 0.01 has theirs). 4. Refits have a
    ridge towards the dense weights instead of a pseudo-inverse, and OPT's second matrix is refitted like any other. 5. All
    sums and auxiliaries are fp32 or better, every solve starts from the undamped Gram. 6. No block is an exception. 7. What
    they run and do not use (the auxiliaries of the last epoch) is left out: `epochs` is their number of passes less one.
    8. `down_refit`, which is not in the paper.
    """

    local: Annotated[Solver, Registered(SOLVERS, "local solver", base=(Solver,))] = SparseGPT()
    """The solver of every single matrix."""
    epochs: NonNegativeInt = 3
    """Rounds of auxiliary updates after the plain local solution; 0 leaves only `down_refit`."""
    alpha: PositiveFloat = 0.1
    """Price of pre-activations that differ from what the first matrices give."""
    beta: PositiveFloat = 1.0
    """Price of an output that differs from the target."""
    gamma: PositiveFloat = 1.0
    """Price of activations that differ from those of the pre-activations. Only ratios of the three matter."""
    gate_steps: NonNegativeInt = 2
    gate_rate: PositiveFloat | None = None
    """Rate of plain gradient steps on the gate; None: Gauss-Newton."""
    ridge: NonNegativeFloat = 0.01
    """Of the refits to auxiliaries, towards the dense weights; 1 raises each input's own energy by inputs / tokens of it."""
    down_refit: bool = True
    """At the end, refit the last matrix to the target on the activations of the already pruned first ones, and prune it."""
    down_ridge: NonNegativeFloat = 4.0
    """Of that refit, which has only real activations to go by."""
    recompute_after_attention: bool = True
    """Take the network's inputs after the rest of the block was pruned, not before."""
    target: Literal["current", "dense"] = "current"
    """`current`: the dense network's output for the inputs as they are now; `dense`: for those of the dense block."""
    keep_best: bool = True
    """Keep the best epoch, the plain local solution included; otherwise the last."""
    held_out: Part = 0.1
    """Share of the calibration windows that fit nothing and only choose the epoch; 0: all fit, and choose."""

    @property
    def needs_dense_inputs(self) -> bool:
        """Whether the network's inputs are needed as they are before the rest of the block is pruned."""
        return self.target == "dense" or not self.recompute_after_attention


Method = Solver | SparseLLM
METHODS: dict[str, type[Solver] | type[SparseLLM]] = {**SOLVERS, "sparsellm": SparseLLM}
"""What prunes a model: solvers work matrix by matrix, SparseLLM block by block."""
