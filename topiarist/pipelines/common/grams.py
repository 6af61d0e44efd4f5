"""The Grams of one block: summed slot by slot while it runs, brought together from all processes when it has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from jaxtyping import Float
from torch import Tensor

from topiarist.core.errors import UnsupportedModel
from topiarist.core.gram import Gram
from topiarist.core.slots import PairwiseSum
from topiarist.models.families import Matrix
from topiarist.pipelines.training.processes import Processes


@dataclass
class GramGroup:
    """Matrices that read one input, and its Gram."""

    matrices: list[Matrix]
    gram: Gram
    asked: list[Tensor] | None = None
    """Weights for the solver to approximate on this Gram, if not the matrices' own."""
    owner: int = 0
    """The process that has the Gram's sums, and solves."""

    @property
    def work(self) -> float:
        """Flops of a solver up to a constant: a factorisation, and products with every weight."""
        width = self.matrices[0].shape[1]
        return width**3 + 30.0 * width**2 * sum(m.shape[0] for m in self.matrices)


def owners(work: Sequence[float], size: int) -> list[int]:
    """The process of `size` that does each piece of work, so that all have about as much: the largest pieces first."""
    found, load = [0] * len(work), [0.0] * size
    for piece in sorted(range(len(work)), key=lambda piece: -work[piece]):
        found[piece] = load.index(min(load))
        load[found[piece]] += work[piece]
    return found


@dataclass
class GramCollector:
    """Accumulates one Gram for every distinct input of `matrices` while a block runs."""

    matrices: Sequence[Matrix]
    by_attention: frozenset[str] = frozenset()
    """Names of matrices in whose Gram each token counts by the attention that it is given (`watch_attention`)."""
    groups: list[GramGroup] = field(default_factory=list)
    _waiting: list[tuple[GramGroup, Tensor]] = field(default_factory=list)
    """Inputs of a forward whose attention is not known yet."""
    _group_of: dict[Matrix, GramGroup] = field(default_factory=dict)
    _inputs: list[tuple[Tensor, GramGroup]] = field(default_factory=list)
    _sums: list[PairwiseSum] = field(default_factory=list)
    """Of the slots that ended, by group."""
    _counted: list[int] = field(default_factory=list)
    """Tokens in `_sums`."""
    _slots: int = 0
    attention_unseen: bool = False
    """Whether a forward ended without `on_attention`: tokens then count alike."""

    def on_input(self, matrix: Matrix, x: Float[Tensor, "*batch in"]) -> None:
        """Note that `matrix` reads x; the first matrix of a group brings its tokens."""
        group, waits = self._group_of.get(matrix), matrix.name in self.by_attention
        if group is None:
            alike = (g for seen, g in self._inputs if seen is x and waits == (g.matrices[0].name in self.by_attention))
            group = next(alike, None)
            if group is None:
                group = GramGroup([], Gram(matrix.shape[1], device=x.device))
                self.groups.append(group)
            group.matrices.append(matrix)
            self._group_of[matrix] = group
            self._inputs.append((x, group))
        if group.matrices[0] is not matrix:
            return
        if waits:
            self._waiting.append((group, x))
        else:
            group.gram.add(x)

    def on_attention(self, received: Float[Tensor, "batch tokens"]) -> None:
        """Note what attention the tokens of the inputs that wait were given: x x^T counts so many times."""
        for group, x in self._waiting:
            group.gram.add(x.float() * received.sqrt()[..., None] if x.shape[:-1] == received.shape else x)
        self._waiting.clear()

    @property
    def waits(self) -> bool:
        """Whether an input waits for `on_attention`."""
        return bool(self._waiting)

    def end_of_forward(self) -> None:
        """Inputs of one forward are compared by identity, so they are held until it ends and dropped here."""
        self.attention_unseen |= self.waits
        for group, x in self._waiting:
            group.gram.add(x)
        self._waiting.clear()
        self._inputs.clear()

    def end_of_slot(self) -> None:
        """Move the sums of a slot's batches to where slots are added pairwise."""
        for number, group in enumerate(self.groups):
            if number == len(self._sums):
                self._sums.append(PairwiseSum(empty=self._slots))
                self._counted.append(0)
            reached = group.gram.tokens > self._counted[number]
            self._sums[number].push(group.gram.take() if reached else None)
            self._counted[number] = group.gram.tokens
        self._slots += 1

    def of_all(self, processes: Processes, owner: int | None = None) -> list[GramGroup]:
        """The groups of all processes, in the order in which one alone would have met them, after the last slot.

        Every group has an owner, the given one or chosen so that all have about the same work; its sums are there alone,
        its number of tokens everywhere. Raises UnsupportedModel if what shares an input here does not share it in another
        process.
        """
        groups, having = self._merged(processes)
        chosen = owners([group.work for group in groups], processes.size)
        for group, balanced in zip(groups, chosen, strict=True):
            group.owner = balanced if owner is None else owner
        sums = {id(group): total.total for group, total in zip(self.groups, self._sums, strict=True)}
        self._sums.clear()
        for group, those in zip(groups, having, strict=True):
            own, gram = sums.pop(id(group), None), group.gram
            if group.owner != processes.rank:
                gram.drop()
            total = processes.add_pairwise(own, group.owner, gram.num_sums, gram.device, those)
            if total is not None:
                gram.put(total)
        return groups

    def _merged(self, processes: Processes) -> tuple[list[GramGroup], list[list[bool]]]:
        """The groups of all processes with all their tokens, and which processes have sums of each."""
        by_name = {matrix.name: matrix for matrix in self.matrices}
        groups: dict[str, GramGroup] = {}
        having: dict[str, list[bool]] = {}
        of_each = processes.gather([([m.name for m in g.matrices], g.gram.tokens) for g in self.groups])
        for rank, its in enumerate(of_each):
            for names, tokens in its:
                lead, matrices = names[0], [by_name[name] for name in names]
                if lead not in groups:
                    own = self._group_of.get(matrices[0])
                    groups[lead] = own or GramGroup(
                        matrices, Gram(matrices[0].shape[1], device=matrices[0].tensor.device)
                    )
                    groups[lead].gram.tokens = 0
                    having[lead] = [False] * processes.size
                if groups[lead].matrices != matrices:
                    raise UnsupportedModel(
                        f"{', '.join(names)} do not share an input in all windows, so processes cannot add their sums: use one"
                    )
                groups[lead].gram.tokens += tokens
                having[lead][rank] = True
        return list(groups.values()), list(having.values())
