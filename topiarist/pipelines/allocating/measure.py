"""What allocation rules measure on a dense model: the sizes of its inputs, block by block, and the curvature of its loss.

Several processes divide the windows, and measure the same to the bit whatever their number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from topiarist.allocate import Owl, Rule, Scores, Sensitivity
from topiarist.allocate.scores import outlier_ratio, probe, random_signs
from topiarist.core.errors import NumericalError
from topiarist.core.losses import next_token_loss
from topiarist.core.slots import PairwiseSum
from topiarist.models.derive import check_has_text_loss
from topiarist.models.families import Matrix, block_names
from topiarist.models.hooks import watch_inputs
from topiarist.models.opened import ObjectModel, OpenedModel
from topiarist.pipelines.common.options import Progress
from topiarist.pipelines.common.stream import BlockStream
from topiarist.pipelines.training.processes import Processes


def measure(
    rule: Rule,
    source: OpenedModel,
    tokens: Int[Tensor, "num window"],
    names: Sequence[str],
    *,
    batch_size: int,
    seed: int,
    progress: Progress,
    processes: Processes,
) -> Scores:
    """The scores of the layers `names` that a rule asks for, on calibration windows (num, window); in all processes."""
    if isinstance(rule, Owl):
        return outliers(rule, source, tokens, names, batch_size, progress, processes)
    assert isinstance(rule, Sensitivity)
    tokens = tokens[: rule.sequences, : rule.tokens]
    if rule.estimate == "input_trace":
        return input_traces(source, tokens, names, progress, processes)
    return loss_traces(rule, source, tokens, names, seed, progress, processes)


class InputSquares:
    """Sum over tokens of x^2 for every input channel, and the mean of x^2 of every forward by itself."""

    def __init__(self, width: int) -> None:
        self._slot = torch.zeros(width, dtype=torch.float64)
        self._sums = PairwiseSum()
        self.means: list[float] = []

    def add(self, x: Float[Tensor, "*batch in"]) -> None:
        """Count the inputs of one forward."""
        squares = x.reshape(-1, x.shape[-1]).float().square().sum(0, dtype=torch.float64).cpu()
        self._slot += squares
        self.means.append(float(squares.sum()) / max(x.numel(), 1))

    def end_of_slot(self) -> None:
        """Move the sums of a slot's forwards to where slots are added pairwise."""
        self._sums.push(self._slot)
        self._slot = torch.zeros_like(self._slot)

    @property
    def sums(self) -> Float[Tensor, " in"]:
        """Over the tokens of all slots, fp64."""
        total = self._sums.total
        assert total is not None
        return total

    @classmethod
    def of_all(cls, parts: Sequence[tuple[Float[Tensor, " in"], list[float]]]) -> InputSquares:
        """The (sums, means) of all processes, by rank, as one process would have them."""
        whole = cls(len(parts[0][0]))
        for sums, means in parts:
            whole._sums.push(sums)
            whole.means += means
        return whole


def dense_inputs(
    source: OpenedModel,
    tokens: Int[Tensor, "num window"],
    names: Sequence[str],
    batch_size: int,
    progress: Progress,
    processes: Processes,
) -> Iterator[dict[str, tuple[Matrix, InputSquares]]]:
    """Run the dense model over the windows, block by block; of every block the wanted matrices and their inputs."""
    stream, wanted = BlockStream.of(source, tokens, batch_size=batch_size, processes=processes), set(names)
    paths = source.block_names
    for index, path in enumerate(paths):
        progress("measuring the dense model", index, len(paths))
        block = source.load(index)
        matrices = [m for m in source.matrices(index) if f"{path}.{m.name}" in wanted]
        seen = {m: InputSquares(m.shape[1]) for m in matrices}
        with watch_inputs(matrices, lambda matrix, x, seen=seen: seen[matrix].add(x)):
            for slot in stream.slots:
                for batch in slot:
                    stream.advance_batch(index, block, batch)
                for squares in seen.values():
                    squares.end_of_slot()
        everyone = zip(*processes.gather([(squares.sums, squares.means) for squares in seen.values()]), strict=True)
        yield {f"{path}.{m.name}": (m, InputSquares.of_all(parts)) for m, parts in zip(seen, everyone, strict=True)}
        source.release(index)


def outliers(
    rule: Owl,
    source: OpenedModel,
    tokens: Int[Tensor, "num window"],
    names: Sequence[str],
    batch_size: int,
    progress: Progress,
    processes: Processes,
) -> Scores:
    """The outlier ratio of every block, stated for each of its layers, or of every layer."""
    values: dict[str, float] = {}
    for block in dense_inputs(source, tokens, names, batch_size, progress, processes):
        for group in [block] if rule.level == "block" else [{name: found} for name, found in block.items()]:
            weights = [m.weight for m, _ in group.values()]
            norms = [squares.sums.sqrt().to(source.device) for _, squares in group.values()]
            if group:
                values.update(dict.fromkeys(group, outlier_ratio(weights, norms, rule.threshold)))
    return Scores(values, {})


def input_traces(
    source: OpenedModel,
    tokens: Int[Tensor, "num window"],
    names: Sequence[str],
    progress: Progress,
    processes: Processes,
) -> Scores:
    """Mean of x^2 over the inputs of every layer: the trace, by weight, of the Hessian of its own squared output error."""
    blocks = dense_inputs(source, tokens, names, 1, progress, processes)
    return Scores.of_samples({n: squares.means or [0.0] for block in blocks for n, (_, squares) in block.items()})


def loss_traces(
    rule: Sensitivity,
    source: OpenedModel,
    tokens: Int[Tensor, "num window"],
    names: Sequence[str],
    seed: int,
    progress: Progress,
    processes: Processes,
) -> Scores:
    """Trace, divided by the number of weights, of every layer's block of the Hessian of the mean next-token loss.

    `hutchinson`: a sample is the mean over the probes of one sequence. `fisher`: a sample is window * g^2, g the
    gradient of one sequence's mean loss; the factor puts it in the units of the Hessian if tokens are independent.
    Processes take sequences in turn, each with a whole copy of the model.
    The model runs in fp32: bf16 needs steps so large that they are a fifth off. Raises NumericalError if it is not finite.
    """
    check_has_text_loss(source.model, "a rule by curvature")
    model = source.fresh().float()
    matrices = layers_of(model, source, names)
    weights = [m.tensor for m in matrices.values()]
    sizes = [w.numel() for w in weights]
    scale = rule.step * (sum(float(w.square().sum()) for w in weights) / sum(sizes)) ** 0.5
    own: dict[int, list[float]] = {}
    passes = rule.probes if rule.estimate == "hutchinson" else 1
    for number in range(processes.rank, len(tokens), processes.size):
        window = tokens[number]
        gradients = loss_gradients(model, list(matrices.values()), window[None].to(source.device))
        total = torch.zeros(len(weights), dtype=torch.float64)
        for index in range(passes):
            progress("measuring the loss's curvature", number * passes + index, len(tokens) * passes)
            if rule.estimate == "fisher":
                drawn = [len(window) * float(g.square().sum(dtype=torch.float64)) for g in gradients()]
            else:
                place = (seed * 1_000_003 + number) * 1_000_003 + index
                generator = torch.Generator().manual_seed(place % (1 << 64))  # a generator takes no more
                drawn = probe(gradients, weights, [random_signs(w.shape, generator) for w in weights], scale)
            total += torch.tensor(drawn, dtype=torch.float64) / passes
        own[number] = [value / size for value, size in zip(total.tolist(), sizes, strict=True)]
    drawn_by_all = {number: values for its in processes.gather(own) for number, values in its.items()}
    by_sequence = [drawn_by_all[number] for number in range(len(tokens))]
    scores = Scores.of_samples(dict(zip(matrices, zip(*by_sequence, strict=True), strict=True)))
    if broken := [name for name, value in scores.values.items() if not torch.isfinite(torch.tensor(value))]:
        raise NumericalError(f"the trace of {broken[0]} is not finite: the model's loss overflows on this text")
    return scores


def layers_of(model: nn.Module, source: OpenedModel, names: Sequence[str]) -> dict[str, Matrix]:
    """The matrices of a whole model by full name, for those named."""
    whole, wanted = ObjectModel(model), set(names)
    found = {
        f"{path}.{m.name}": m
        for index, path in enumerate(block_names(model, source.family))
        for m in whole.matrices(index)
    }
    return {name: matrix for name, matrix in found.items() if name in wanted}


def loss_gradients(
    model: Any, matrices: Sequence[Matrix], tokens: Int[Tensor, "batch window"]
) -> Callable[[], list[Tensor]]:
    """A function that gives the gradients of the mean next-token loss on (batch, window) tokens, at the weights as they
    are when it is called; of a matrix that no token reached it is zero.
    """
    model.requires_grad_(False)
    parameters: dict[int, nn.Parameter] = {}
    for matrix in matrices:
        parameter = getattr(matrix.module, matrix.parameter).requires_grad_(True)
        parameters[id(parameter)] = parameter

    def gradients() -> list[Tensor]:
        loss = next_token_loss(model(input_ids=tokens, use_cache=False).logits, tokens)
        by_id = dict(
            zip(parameters, torch.autograd.grad(loss, list(parameters.values()), materialize_grads=True), strict=True)
        )
        return [_part(by_id, matrix) for matrix in matrices]

    return gradients


def _part(gradients: Mapping[int, Tensor], matrix: Matrix) -> Tensor:
    whole = gradients[id(getattr(matrix.module, matrix.parameter))]
    return whole if matrix.expert is None else whole[matrix.expert]
