"""Every solver on every kind of pattern and Gram: what must hold for all of them, then what each one promises."""

from __future__ import annotations

import warnings

import problems
import pytest
import torch
from reference import alps as reference_alps
from reference import baselines, brute
from torch import Tensor

from topiarist import Gram, parse_pattern
from topiarist.core import linalg
from topiarist.core.errors import CalibrationWarning, NumericalError, NumericalWarning, PatternError
from topiarist.solvers import ALPS, ISC, SOLVERS, Magnitude, SparseGPT, Wanda, admm

METHODS = {name: solver() for name, solver in SOLVERS.items()} | {
    "alps-best": ALPS(preset="best"),
    "wanda+refit": Wanda(refit=True),
}
PATTERNS = ["0.5", "0.9", "0.7/row", "2:4", "1:4", "4:8", "0.25/columns", "2:4/transposable"]
OUT, IN = 24, 64

pytestmark = pytest.mark.filterwarnings(
    "ignore::topiarist.core.errors.CalibrationWarning", "ignore::topiarist.core.errors.NumericalWarning"
)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gram_of(kind: str) -> Gram:
    x = randn(400, IN, seed=1) @ (torch.eye(IN) + 0.3 * randn(IN, IN, seed=2))
    if kind == "rank-deficient":
        x = x[:20]
    elif kind == "dead":
        x[:, [0, 1, 2, 3, 17, 40]] = 0
    elif kind == "outliers":
        x[:, [5, 33]] *= 50
    gram = Gram(IN)
    gram.add(x)
    return gram


def weight() -> Tensor:
    """Coarsely quantised, so that many magnitudes tie."""
    return (randn(OUT, IN, seed=3) * 4).round() / 4


def fp64_error(W: Tensor, new: Tensor, gram: Gram) -> float:
    return brute.error(W, new, gram.matrix)


@pytest.mark.parametrize("kind", ["well-conditioned", "rank-deficient", "dead", "outliers"])
@pytest.mark.parametrize("text", PATTERNS)
@pytest.mark.parametrize("method", METHODS)
def test_what_holds_for_all(method, text, kind):
    if text == "2:4/transposable" and (kind in ("rank-deficient", "dead") or method == "alps-best"):
        pytest.skip("slow, and the projection does not look at the Gram")
    solver, pattern, W, gram = METHODS[method], parse_pattern(text), weight(), gram_of(kind)
    W_before, H_before = W.clone(), gram.matrix
    solution = solver(W, gram, pattern)
    assert pattern.holds(solution.mask)
    assert int(solution.mask.sum()) == pattern.num_kept((OUT, IN))
    assert (solution.weight[~solution.mask] == 0).all() and not torch.signbit(solution.weight[~solution.mask]).any()
    assert solution.weight.shape == W.shape and solution.weight.dtype == W.dtype
    assert solution.error == pytest.approx(fp64_error(W, solution.weight, gram), rel=1e-4, abs=1e-7)
    assert solution.error < 1
    assert torch.equal(W, W_before) and torch.equal(gram.matrix, H_before), "inputs are not changed"
    again = solver(W, gram, pattern)
    assert torch.equal(solution.weight, again.weight) and solution.error == again.error
    if kind == "dead" and method != "magnitude":
        assert (solution.weight[:, gram.dead] == 0).all()


@pytest.mark.parametrize("text", ["0.5", "2:4", "4:8", "0.25/columns"])
@pytest.mark.parametrize("method", METHODS)
def test_without_correlation_every_method_is_magnitude(method, text):
    if method.startswith("wanda") and text == "0.5":
        pytest.skip("Wanda compares within rows")
    W, pattern, gram = randn(OUT, IN), parse_pattern(text), Gram.from_matrix(1000 * torch.eye(IN))
    solver = SparseGPT(block_size=IN) if method == "sparsegpt" else METHODS[method]
    solution = solver(W, gram, pattern)
    best = W * pattern.mask(W.abs())
    if method.startswith("alps"):
        # Iterative, and in low precision on some machines: near-ties may fall either way.
        assert solution.error <= 1.005 * fp64_error(W, best, gram)
    else:
        assert torch.equal(solution.mask, best != 0)
    assert torch.allclose(solution.weight, W * solution.mask, atol=1e-2 if method.startswith("alps") else 1e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("text", ["0.5/row", "2:4"])
def test_rows_do_not_know_their_place(method, text):
    W, gram, pattern, order = randn(OUT, IN), gram_of("outliers"), parse_pattern(text), torch.randperm(OUT)
    straight, shuffled = METHODS[method](W, gram, pattern), METHODS[method](W[order], gram, pattern)
    assert torch.equal(straight.mask[order], shuffled.mask)
    assert torch.allclose(straight.weight[order], shuffled.weight, atol=1e-4)


@pytest.mark.parametrize("method", ["wanda", "alps", "alps-best", "wanda+refit"])
@pytest.mark.parametrize("text", ["0.5", "2:4"])
def test_scaling_an_input_changes_nothing(method, text):
    W, gram, pattern = randn(OUT, IN), gram_of("well-conditioned"), parse_pattern(text)
    scale = 2.0 ** torch.randint(-6, 7, (IN,), generator=torch.Generator().manual_seed(5))
    scaled = Gram.from_matrix(gram.matrix * scale * scale[:, None])
    plain, other = METHODS[method](W, gram, pattern), METHODS[method](W / scale, scaled, pattern)
    assert torch.equal(plain.mask, other.mask)
    assert torch.allclose(plain.weight, other.weight * scale, atol=1e-4)
    assert plain.error == pytest.approx(other.error, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_any_float_dtype(method, dtype):
    W, gram = weight().to(dtype), gram_of("well-conditioned")
    solution, exact = (
        METHODS[method](W, gram, parse_pattern("2:4")),
        METHODS[method](W.float(), gram, parse_pattern("2:4")),
    )
    assert solution.weight.dtype == dtype
    assert torch.equal(solution.mask, exact.mask)
    assert torch.equal(solution.weight, exact.weight.to(dtype))


@pytest.mark.parametrize("method", METHODS)
def test_together_equals_one_by_one(method):
    gram = gram_of("outliers")
    weights = [randn(OUT, IN, seed=1), randn(8, IN, seed=2), randn(40, IN, seed=3)]
    patterns = [parse_pattern(text) for text in ("0.5", "2:4", "0.9")]
    together = METHODS[method].together(weights, gram, patterns)
    for W, pattern, solution in zip(weights, patterns, together, strict=True):
        alone = METHODS[method](W, gram, pattern)
        assert torch.equal(alone.weight, solution.weight) and alone.error == solution.error


def test_no_state_leaks_between_calls():
    solver, gram, other = ALPS(), gram_of("well-conditioned"), gram_of("outliers")
    first = solver(weight(), gram, parse_pattern("0.9"))
    solver(randn(OUT, IN), other, parse_pattern("2:4"))
    assert torch.equal(solver(weight(), gram, parse_pattern("0.9")).weight, first.weight)
    assert solver == ALPS()


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt", "alps"])
@pytest.mark.parametrize("text", ["0.7", "2:4"])
def test_a_refit_never_hurts(method, text):
    W, pattern, gram = randn(OUT, IN), parse_pattern(text), gram_of("outliers")
    plain = SOLVERS[method]()(W, gram, pattern)
    refitted = SOLVERS[method](refit=True, refit_damping=0.0)(W, gram, pattern)
    assert torch.equal(plain.mask, refitted.mask)
    assert refitted.error <= plain.error * (1 + 1e-5)


@pytest.mark.parametrize("solver", [Wanda(refit=True, refit_damping=1e-3), ALPS(refit_steps=200)])
def test_the_gradient_on_the_kept_support_vanishes(solver):
    W, gram, pattern = randn(OUT, IN), gram_of("well-conditioned"), parse_pattern("0.5")
    ridge = solver.ridge if isinstance(solver, ALPS) else solver.refit_damping
    H = gram.matrix + ridge * torch.diag(gram.diagonal)
    solution = solver(W, gram, pattern)
    before, after = ((W * solution.mask - W) @ H)[solution.mask], ((solution.weight - W) @ H)[solution.mask]
    # The last products of ALPS are in low precision on some machines.
    assert after.norm() < 0.02 * before.norm()


@pytest.mark.parametrize("settings", [{"iterations": 1}, {"iterations": 2}, {"iterations": 3}, {"rho_every": 500}])
def test_the_residual_of_a_single_level_of_rho_is_exact(settings):
    W, gram = randn(OUT, IN), gram_of("well-conditioned")
    solver = ALPS(refit_steps=200, **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NumericalWarning)
        solution = solver(W, gram, parse_pattern("2:4"))
    best = linalg.masked_least_squares(W, gram.matrix, solution.mask, damping=solver.ridge, steps=200)
    assert solution.error == pytest.approx(fp64_error(W, best, gram), rel=2e-3)


def test_alps_takes_no_more_steps_than_asked(monkeypatch):
    steps = []
    monkeypatch.setattr(
        admm.State, "step", lambda state, *given, own=admm.State.step: steps.append(1) or own(state, *given)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NumericalWarning)
        ALPS(iterations=7, rho_every=500)(randn(OUT, IN), gram_of("well-conditioned"), parse_pattern("2:4"))
    assert len(steps) == 6  # the last one ends the search


def test_magnitude_does_not_look_at_the_data():
    W, gram, pattern = randn(OUT, IN), gram_of("dead"), parse_pattern("0.5")
    assert bool(gram.dead.any())
    assert torch.equal(Magnitude()(W, gram, pattern).weight, Magnitude().without_data(W, pattern).weight)


@pytest.mark.slow
def test_better_methods_come_out_better():
    problem = problems.make(128, 192, seed=11, tokens=4096)
    for text in ("0.5", "0.7", "0.9", "2:4", "4:8"):
        names = ["magnitude", "wanda", "sparsegpt", "alps", "alps-best"]
        errors = [METHODS[name](problem.weight, problem.gram, parse_pattern(text)).error for name in names]
        assert errors == sorted(errors, reverse=True), text


@pytest.mark.slow
def test_close_to_the_true_optimum_of_small_problems():
    ratios = []
    for seed in range(8):
        x = randn(100, 8, seed=seed) @ (torch.eye(8) + 0.4 * randn(8, 8, seed=seed + 10))
        W, gram = randn(4, 8, seed=seed + 20), Gram.from_matrix(x.T @ x)
        best, _ = brute.best_nm(W, gram.matrix, 2, 4)
        ratios.append(ALPS(preset="best")(W, gram, parse_pattern("2:4")).error / best)
    assert min(ratios) >= 1 - 1e-5, "nothing beats the enumeration"
    assert sum(ratios) / len(ratios) <= 1.3 and max(ratios) <= 2


@pytest.mark.slow
@pytest.mark.parametrize("text", ["0.5", "0.7", "0.9", "2:4", "4:8"])
def test_alps_against_the_transcription(text):
    problem = problems.make(256, 384, seed=12, tokens=8192)
    W, H = problem.weight, problem.gram.matrix
    kind = {"nm": tuple(map(int, text.split(":")))} if ":" in text else {"sparsity": float(text)}
    original, mask, _ = reference_alps.alps(W, H, **kind)
    theirs = fp64_error(W, original * mask, problem.gram)
    assert ALPS()(W, problem.gram, parse_pattern(text)).error <= 1.02 * theirs
    assert ALPS(preset="best")(W, problem.gram, parse_pattern(text)).error <= 0.97 * theirs


@pytest.mark.parametrize("text", ["2:4", "4:8"])
def test_sparsegpt_equals_the_transcription(text):
    problem = problems.make(96, 256, seed=13, tokens=4096)
    keep, of = map(int, text.split(":"))
    theirs, mask = baselines.sparsegpt(problem.weight, problem.gram.matrix, nm=(keep, of))
    ours = SparseGPT()(problem.weight, problem.gram, parse_pattern(text))
    assert (ours.mask == mask).float().mean() > 0.999
    assert ours.error == pytest.approx(fp64_error(problem.weight, theirs, problem.gram), rel=1e-2)


def test_sparsegpt_unstructured_matches_but_for_its_miscount():
    problem = problems.make(96, 256, seed=13, tokens=4096)
    theirs, mask = baselines.sparsegpt(problem.weight, problem.gram.matrix, sparsity=0.7)
    ours = SparseGPT()(problem.weight, problem.gram, parse_pattern("0.7"))
    assert 0 <= int(ours.mask.sum()) - int(mask.sum()) <= 4, "one weight too many is pruned in each block of columns"
    assert ours.error == pytest.approx(fp64_error(problem.weight, theirs, problem.gram), rel=1e-2)


@pytest.mark.parametrize("text", ["2:4", "0.7", "0.7/row", "0.5/columns"])
def test_isc_counts_exactly_and_knows_its_units(text):
    """Twice the units of an input and half its weights: no mask changes (the published form, 1 / U_jj, would)."""
    problem = problems.make(64, 128, seed=13, tokens=4096)
    pattern, W, H = parse_pattern(text), problem.weight, problem.gram.matrix
    solver = ISC(damping=1e-9)
    ours = solver(W, problem.gram, pattern)
    assert int(ours.mask.sum()) == pattern.num_kept((64, 128))
    scale = torch.where(torch.arange(128) % 3 == 0, 2.0, 1.0)
    other = solver(W / scale, Gram.from_matrix(H * scale * scale[:, None], tokens=4096), pattern)
    assert (other.mask == ours.mask).float().mean() > 0.999


def test_isc_equals_its_formula_in_the_first_block():
    """w^2 (H_jj + 1 / U_jj^2), of the undamped H; with one block of columns it decides the whole mask."""
    problem = problems.make(16, 48, seed=13, tokens=4096)
    W, H = problem.weight, problem.gram.matrix
    U = torch.linalg.cholesky(torch.linalg.inv(H.double() + 0.01 * H.diagonal().mean() * torch.eye(48)), upper=True)
    score = W.double().square() * (H.double().diagonal() + 1 / U.diagonal().square())
    found = ISC(block_size=48)(W, problem.gram, parse_pattern("0.5"))
    assert torch.equal(found.mask, parse_pattern("0.5").mask(score.sqrt()))


def test_magnitude_and_wanda_match_their_scripts_where_those_count_right():
    problem = problems.make(32, 64, seed=14, tokens=1024)
    W, gram = problem.weight, problem.gram
    ours = Magnitude()(W, gram, parse_pattern("2:4"))
    assert torch.equal(ours.mask, baselines.magnitude(W, nm=(2, 4))[1])
    ours = Wanda()(W, gram, parse_pattern("0.5"))
    assert torch.equal(ours.mask, baselines.wanda(W, gram.matrix, gram.tokens, sparsity=0.5)[1])


def test_nothing_to_explain_is_no_error():
    solution = ALPS()(torch.zeros(8, 16), Gram.from_matrix(torch.eye(16)), parse_pattern("2:4"))
    assert solution.error == 0.0 and (solution.weight == 0).all()
    dead = ALPS()(torch.randn(8, 16), Gram.from_matrix(torch.zeros(16, 16)), parse_pattern("2:4"))
    assert dead.error == 0.0 and (dead.weight == 0).all() and (dead.mask.sum(1) == 8).all()


def test_bad_input_is_refused_by_name():
    gram, W = gram_of("well-conditioned"), randn(OUT, IN)
    bad = W.clone()
    bad[3, 4] = float("nan")
    with pytest.raises(NumericalError, match="NaN or Inf in the weight"):
        ALPS()(bad, gram, parse_pattern("2:4"))
    with pytest.raises(ValueError, match="32 inputs does not fit a Gram of 64"):
        ALPS()(W[:, :32], gram, parse_pattern("2:4"))
    with pytest.raises(PatternError, match="divisible"):
        ALPS()(W, gram, parse_pattern("2:5"))
    with pytest.raises(ValueError, match="should be 'fast' or 'best'"):
        ALPS(preset="quick")


def test_few_tokens_and_an_unsettled_support_are_said(monkeypatch):
    with pytest.warns(CalibrationWarning, match="20 calibration tokens for 64 inputs"):
        Wanda()(weight(), gram_of("rank-deficient"), parse_pattern("2:4"))
    problem = problems.make(64, 128, seed=1, tokens=1024)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ALPS()(problem.weight, problem.gram, parse_pattern("0.7"))
    monkeypatch.setattr("topiarist.solvers.alps.UNSETTLED", 0.001)
    with pytest.warns(NumericalWarning, match="2 iterations with .* still moving"):
        ALPS(iterations=3)(problem.weight, problem.gram, parse_pattern("0.7"))


@pytest.mark.parametrize("rho", [0.15, 0.25, 0.45])
def test_the_resolvent_stands_in_for_the_true_one(rho):
    from topiarist.solvers.alps import Resolvent

    problem = problems.make(8, 128, seed=3, tokens=2048)
    scale = problem.gram.diagonal.sqrt()
    Hs = problem.gram.matrix / scale / scale[:, None]
    exact = rho * linalg.inverse(Hs + rho * torch.eye(128))
    got = Resolvent(Hs, 0.45, torch.float32).at(rho)
    assert torch.linalg.matrix_norm(got - exact, 2) < (1e-4 if rho == 0.45 else 0.12)


@pytest.mark.skipif(linalg.search_dtype(torch.device("cpu")) != torch.bfloat16, reason="no products in bf16 here")
@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() != "AVX512", reason="torch rounds elsewhere without AVX-512"
)
@pytest.mark.parametrize("text", ["2:4", "1:4", "4:8", "7:16", "2:6", "0.7", "0.5/row", "0.25/columns"])
@pytest.mark.parametrize("shape", [(3, 48), (200, 144)])
def test_the_kernels_step_is_that_of_plain_torch_to_the_bit(text, shape, monkeypatch):
    W = (randn(*shape, seed=7) * 4).round() / 4  # sizes tie
    fused = admm.State(W, parse_pattern(text), 1.12, torch.bfloat16)
    if fused._kernels is None:
        pytest.skip("no C++ compiler here")
    monkeypatch.setattr(admm, "_kernels", lambda: None)
    plain = admm.State(W, parse_pattern(text), 1.12, torch.bfloat16)
    for step in range(4):
        Z = (0.5 * randn(*shape, seed=step)).bfloat16()
        growth = (1.0, 0.8)[step % 2]
        assert torch.equal(fused.step(Z, growth), plain.step(Z, growth))
        assert torch.equal(fused.D, plain.D) and torch.equal(fused.U, plain.U)
    assert torch.equal(fused.Y, plain.Y) and torch.equal(fused.relaxed(Z), plain.relaxed(Z))
