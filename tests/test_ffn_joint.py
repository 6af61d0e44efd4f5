"""The rounds on one feed-forward network: its row, the published scheme with its improvements off, never worse."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import tiny
import torch
from reference import baselines
from reference import sparsellm as published
from torch import nn

import topiarist as tp
from topiarist.models.families import FAMILIES
from topiarist.models.opened import ObjectModel
from topiarist.pipelines.common.stream import BlockStream
from topiarist.pipelines.pruning.ffn_joint import JointSolver
from topiarist.pipelines.pruning.network import Network, Weights
from topiarist.results.pages.figures import rounds

TOKENS = tiny.tiny_tokens(2, 32)
NETWORKS = sorted(name for name in FAMILIES if name not in ("mixtral", "olmoe", "qwen3_moe"))


def first_network(model) -> tuple[nn.Module, Network]:
    source = ObjectModel(model)
    block = source.load(0)
    network = Network.find(block, source.family.feed_forward, source.matrices(0))
    assert network is not None
    return block, network


def joint(network: Network, X: torch.Tensor, settings: tp.SparseLLM, pattern: str = "2:4") -> JointSolver:
    """A solver on inputs X (num, window, in) that aims at the dense network's outputs."""
    Y = torch.empty(*X.shape[:2], network.down.shape[0])
    network.outputs(X, Y)

    def solve(groups):
        for group in groups:
            yield (
                group,
                settings.local.together(group.asked, group.gram, [tp.parse_pattern(pattern)] * len(group.asked)),
            )

    return JointSolver(
        settings, network, X, Y, solve, lambda width: SimpleNamespace(values=torch.empty(*X.shape[:2], width))
    )


def inputs(width: int, num: int = 20, window: int = 40) -> torch.Tensor:
    """Correlated tokens with channels of different size."""
    generator = torch.Generator().manual_seed(7)
    mixing = torch.eye(width) + 0.3 * torch.randn(width, width, generator=generator)
    scales = torch.linspace(0.5, 1.5, width)
    return (torch.randn(num, window, width, generator=generator) @ mixing * scales).contiguous()


def output_error(network: Network, X: torch.Tensor, matrices: list[torch.Tensor]) -> float:
    """Relative squared error of the network's outputs with `matrices` (those of `network.matrices`) in place of its own."""
    X, dense = X.reshape(-1, X.shape[-1]), network.weights
    target = network(X, dense)
    got = network(X, Weights(torch.cat(matrices[:-1]), matrices[-1]))
    return float((got - target).square().sum() / target.square().sum())


def no_warning(message: str, category: type[Warning]) -> None:
    raise AssertionError(message)


@pytest.mark.parametrize("family", NETWORKS)
def test_every_row_describes_what_the_block_does(family: str):
    """The network, computed from the row, is what the block hands on, and its activations are what `down` reads."""
    model = tiny.tiny_model(family)
    block, network = first_network(model)
    seen = {}
    hooks = [
        network.first[0].module.register_forward_pre_hook(lambda _, args: seen.update(X=args[0])),
        network.down.module.register_forward_hook(lambda _, args, out: seen.update(p=args[0], Y=out)),
    ]
    with torch.no_grad():
        model(TOKENS)
    for hook in hooks:
        hook.remove()
    X, p, Y = (seen[key].reshape(-1, seen[key].shape[-1]) for key in ("X", "p", "Y"))
    weights = network.weights
    torch.testing.assert_close(network.activate(X @ weights.first.T + network.biases[0]), p, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(network(X, weights), Y, rtol=1e-4, atol=1e-4)
    stream = BlockStream(ObjectModel(model), TOKENS, batch_size=1, device=torch.device("cpu"))
    found = stream.inputs(0, block, network.first[0]).values
    torch.testing.assert_close(found.view(-1, found.shape[-1]), X, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["opt", "llama"])
@pytest.mark.parametrize("passes", [1, 2, 4])
def test_the_published_scheme_with_improvements_switched_off(family: str, passes: int):
    _, network = first_network(tiny.tiny_model(family))
    X, price = inputs(32), {"alpha": 0.5, "beta": 1.5, "gamma": 1.0}
    settings = tp.SparseLLM(
        epochs=passes - 1, gate_rate=0.01, ridge=1e-9, down_refit=False, keep_best=False, held_out=0.0, **price
    )
    solutions, record = joint(network, X, settings).run("", no_warning)
    assert record.best == ("local" if passes == 1 else f"epoch {passes - 1}")

    def prune(W, H):
        return baselines.sparsegpt(W, H, nm=(2, 4))[0].double()

    columns = X.view(-1, 32).T.double()
    dense = [matrix.weight.double() for matrix in network.matrices]
    if family == "opt":
        b1, b2 = (bias.double() for bias in network.biases)
        expected = published.opt(dense[0], b1, dense[1], b2, columns, prune, passes, **price)
    else:
        expected = published.swiglu(*dense, columns, prune, passes, **price, lr=0.01)
    for solution, wanted in zip(solutions, expected, strict=True):
        # Rounding, other on every processor, turns close choices of a mask, and each moves the rest of its row.
        # The two schemes agree where the masks do; with alpha at 0.6 more than 2 % of the masks would differ.
        turned = solution.mask != (wanted != 0)
        assert turned.float().mean() < 0.02
        alike = ~turned.any(1)
        assert alike.float().mean() > 0.8
        difference = solution.weight[alike].double() - wanted[alike]
        assert difference.norm() < 0.03 * wanted[alike].norm()
    ours = output_error(network, X, [solution.weight for solution in solutions])
    assert ours == pytest.approx(output_error(network, X, [wanted.float() for wanted in expected]), rel=0.1)


@pytest.mark.parametrize("family", ["opt", "llama", "gemma", "phi3", "gpt2"])
@pytest.mark.parametrize("pattern", ["2:4", "0.7"])
@pytest.mark.parametrize("down_refit", [False, True])
def test_no_epoch_makes_a_network_worse(family: str, pattern: str, down_refit: bool):
    _, network = first_network(tiny.tiny_model(family))
    X = inputs(32)
    settings = tp.SparseLLM(epochs=2, down_refit=down_refit)
    solutions, record = joint(network, X, settings, pattern).run("", no_warning)
    assert list(record.errors) == ["local", "epoch 1", "epoch 2", *["down_refit"] * down_refit]
    assert record.errors[record.best] == min(record.errors.values())
    if down_refit:
        alone = joint(network, X, tp.SparseLLM(epochs=0), pattern).run("", no_warning)[1]
        assert alone.best == "down_refit" and alone.errors["local"] == record.errors["local"]
    # The errors told are those of the block's own arithmetic on the windows held out.
    for solution in solutions:
        assert tp.parse_pattern(pattern).holds(solution.mask)
        assert not (torch.signbit(solution.weight) & (solution.weight == 0)).any()
    error = output_error(network, X[-2:], [solution.weight for solution in solutions])
    assert error == pytest.approx(record.errors[record.best], rel=1e-4)


def test_every_family_with_dense_blocks_has_a_row():
    assert all(row.feed_forward for name, row in FAMILIES.items() if name != "mixtral")


def test_lines_of_the_page_are_relative_to_the_local_solver():
    blocks = [
        {"name": "a", "errors": {"local": 0.2, "epoch 1": 0.1, "epoch 2": 0.3}, "best": "epoch 1"},
        {"name": "b", "errors": {"local": 0.4, "epoch 1": 0.3}, "best": "epoch 1"},
        {"name": "dead", "errors": {"local": 0.0, "epoch 1": 0.0}, "best": "local"},
    ]
    found = rounds(blocks)
    assert found is not None and (found.low, found.high) == (0.5, pytest.approx(1.5))
    assert [len(points) for _, points in found.lines] == [3, 2] and found.median == found.lines[0][1]
    assert rounds([]) is None and rounds([{"name": "a", "errors": {"local": 0.2}, "best": "local"}]) is None
