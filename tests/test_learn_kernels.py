"""All paths give the same numbers, and nothing depends on how the work is split."""

import dataclasses
import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from topiarist.core.patterns import NM, Unstructured, parse_pattern
from topiarist.masklearn import kernels, native, noise
from topiarist.masklearn.candidates import candidates
from topiarist.masklearn.layer import Annealing
from topiarist.masklearn.relax import Bernoulli, Categorical, TopN
from topiarist.masklearn.relaxation import Draw, Prior

needs_compiler = pytest.mark.skipif(native.load() is None, reason="no C++ compiler")
RECORDED = [0.9921393, 0.9534005, 0.0481385, 0.0063218, 0.5083727, 0.7201622, 0.5805369, 0.1909281]
DRAW = Draw(noise.noise_key(3, 1, 4), kappa=150.0, tau=0.7, lam=1e-2, first_row=3, first_group=2, share=0.5)
CASES = [("2:4", (40, 1200)), ("2:4", (17, 20)), ("1:4", (8, 576)), ("4:8", (4, 96)), ("3:6", (5, 30))]


def problem(pattern, shape, weight_dtype=torch.float32, logits_dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    relaxation = Categorical(parse_pattern(pattern))
    W, G = (torch.randn(shape, generator=generator).to(weight_dtype) for _ in range(2))
    pi = relaxation.init_logits(relaxation.pattern.mask(W.float().abs()), Prior(gap=None, alpha=2.0), seed=0, layer=0)
    return relaxation, W, G, pi.to(logits_dtype)


@pytest.fixture
def plain(monkeypatch):
    """Calls a function with the C++ path switched off."""

    def call(function, *args):
        with monkeypatch.context() as patch:
            patch.setattr(native, "load", lambda: None)
            return function(*args)

    return call


@needs_compiler
@pytest.mark.parametrize("pattern, shape", CASES)
@pytest.mark.parametrize("weight", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("logits", [torch.float32, torch.bfloat16])
def test_cpp_equals_plain(pattern, shape, weight, logits, plain):
    relaxation, W, G, pi = problem(pattern, shape, weight, logits)
    assert native.usable(W, pi)
    ours, oracle = kernels.effective(relaxation, W, pi, DRAW), plain(kernels.effective, relaxation, W, pi, DRAW)
    bound = 2e-6 if weight == torch.float32 else 2**-8
    assert ((ours.float() - oracle.float()).abs() <= bound * W.float().abs() + 1e-30).all()
    if weight == torch.bfloat16:
        assert (ours != oracle).float().mean() < 0.01  # rounding to bf16 hides nearly all of it
    ours, oracle = kernels.gradient(relaxation, W, pi, G, DRAW), plain(kernels.gradient, relaxation, W, pi, G, DRAW)
    assert (ours - oracle).abs().max() < 5e-6 * oracle.abs().max()
    hard = dataclasses.replace(DRAW, straight_through=True)
    for draw in (None, hard):
        assert torch.equal(
            kernels.effective(relaxation, W, pi, draw), plain(kernels.effective, relaxation, W, pi, draw)
        )


@needs_compiler
@pytest.mark.parametrize(
    "relaxation, shape",
    [
        (TopN(NM(2, 4)), (40, 1200)),
        (TopN(NM(8, 16)), (5, 48)),
        (TopN(NM(1, 3)), (4, 30)),
        (Bernoulli(Unstructured(0.5)), (7, 300)),
        (Bernoulli(Unstructured(0.8), density_weight=50.0), (33, 20)),
    ],
    ids=lambda value: getattr(value, "name", None),
)
@pytest.mark.parametrize("weight", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("logits", [torch.float32, torch.bfloat16])
def test_cpp_equals_plain_for_the_others(relaxation, shape, weight, logits, plain):
    generator = torch.Generator().manual_seed(0)
    W, G = (torch.randn(shape, generator=generator).to(weight) for _ in range(2))
    prior = Prior(gap=None, alpha=2.0)
    pi = relaxation.init_logits(relaxation.pattern.mask(W.float().abs()), prior, seed=0, layer=0).to(logits)
    ours, oracle = kernels.effective(relaxation, W, pi, DRAW), plain(kernels.effective, relaxation, W, pi, DRAW)
    bound = 1e-5 if weight == torch.float32 else 2**-7
    assert ((ours.float() - oracle.float()).abs() <= bound * W.float().abs() + 1e-30).all()
    ours, oracle = kernels.gradient(relaxation, W, pi, G, DRAW), plain(kernels.gradient, relaxation, W, pi, G, DRAW)
    assert (ours - oracle).abs().max() < 1e-3 * oracle.abs().max()  # TopN's 1 / (1 - a) magnifies fp32 rounding
    steep = dataclasses.replace(DRAW, tau=1e-3, kappa=1e3, lam=0.0)
    ours, oracle = kernels.effective(relaxation, W, pi, steep), plain(kernels.effective, relaxation, W, pi, steep)
    apart = (ours.float() - oracle.float()).abs() > 1e-2 * W.float().abs()
    assert apart.float().mean() < 0.01 and ours.isfinite().all()
    assert kernels.gradient(relaxation, W, pi, G, steep).isfinite().all()
    rows = slice(2, 4)
    part = dataclasses.replace(DRAW, first_row=DRAW.first_row + 2)
    alone = kernels.effective(relaxation, W[rows], pi[rows], part)
    assert torch.equal(alone, kernels.effective(relaxation, W, pi, DRAW)[rows])


@needs_compiler
def test_cpp_takes_extreme_and_broken_numbers(plain):
    relaxation, W, _, pi = problem("2:4", (4, 16))
    for tau, kappa in ((1e-3, 1e4), (1e3, 1.0)):
        draw = dataclasses.replace(DRAW, tau=tau, kappa=kappa)
        ours, oracle = kernels.effective(relaxation, W, pi, draw), plain(kernels.effective, relaxation, W, pi, draw)
        assert torch.allclose(ours, oracle, atol=1e-5)
    pi[1] = float("nan")
    broken = kernels.effective(relaxation, W, pi, DRAW)
    assert broken[1].isnan().all() and not broken[0].isnan().any()  # a diverged run must be seen
    assert kernels.effective(relaxation, torch.full_like(W, float("nan")), pi, DRAW).isnan().all()


@pytest.mark.parametrize("threads", [1, 2])
def test_nothing_depends_on_threads_chunks_or_shards(threads, plain, monkeypatch):
    relaxation, W, G, pi = problem("2:4", (64, 96))
    whole, grad = kernels.effective(relaxation, W, pi, DRAW), kernels.gradient(relaxation, W, pi, G, DRAW)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(kernels.effective(relaxation, W, pi, DRAW), whole)
        rows = slice(20, 50)
        part = dataclasses.replace(DRAW, first_row=DRAW.first_row + 20)
        assert torch.equal(kernels.effective(relaxation, W[rows], pi[rows], part), whole[rows])
        assert torch.equal(kernels.gradient(relaxation, W[rows], pi[rows], G[rows], part), grad[rows])
        # A shard along the inputs: groups 8 .. 20 of every row.
        part = dataclasses.replace(DRAW, first_group=DRAW.first_group + 8)
        columns = kernels.effective(relaxation, W[:, 32:80].contiguous(), pi[:, :, 8:20].contiguous(), part)
        assert torch.allclose(columns, whole[:, 32:80], atol=1e-6)
    finally:
        torch.set_num_threads(before)
    at_once = plain(kernels.effective, relaxation, W, pi, DRAW)
    monkeypatch.setattr(kernels, "CHUNK", 500)
    assert torch.equal(plain(kernels.effective, relaxation, W, pi, DRAW), at_once)


@pytest.mark.parametrize(
    "relaxation", [Categorical(NM(2, 4)), TopN(NM(2, 4)), Bernoulli(Unstructured(0.5))], ids=lambda r: r.name
)
@pytest.mark.parametrize("split", [1, 4])
def test_masked_linear_is_a_linear_with_the_effective_weight(relaxation, split):
    """Forward, the inputs' gradient and the logits' gradient; however the batch is split, the mask is one."""
    generator = torch.Generator().manual_seed(0)
    W, x = torch.randn(16, 48, generator=generator), torch.randn(8, 3, 48, generator=generator)
    bias, dy = torch.randn(16, generator=generator), torch.randn(8, 3, 16, generator=generator)
    pi = relaxation.init_logits(relaxation.pattern.mask(W.abs()), Prior(), seed=0, layer=0).requires_grad_()
    x.requires_grad_()
    out = torch.cat([kernels.masked_linear(part, W, pi, bias, relaxation, DRAW) for part in x.chunk(split)])
    out.backward(dy)
    effective = relaxation.effective(W, pi.detach(), DRAW)
    assert torch.allclose(out, x @ effective.T + bias, atol=1e-5)
    assert torch.allclose(x.grad, dy @ effective, atol=1e-5)
    G = dy.flatten(0, 1).T @ x.detach().flatten(0, 1)
    if split == 1 or DRAW.lam == 0:
        expected = relaxation.gradient(W, pi.detach(), G, DRAW)
        assert torch.allclose(pi.grad, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("native_path", [True, False])
def test_under_autocast_and_on_one_vector_it_is_a_linear_too(native_path, monkeypatch):
    if not native_path:
        monkeypatch.setattr(native, "load", lambda: None)
    relaxation, W, _, pi = problem("2:4", (16, 48))
    effective = kernels.effective(relaxation, W, pi, DRAW)
    for x in (torch.randn(8, 48), torch.randn(48)):
        results = []
        for masked in (True, False):
            leaf, logits = x.clone().requires_grad_(), pi.clone().requires_grad_()
            with torch.autocast("cpu", torch.bfloat16):
                if masked:
                    out = kernels.masked_linear(leaf, W, logits, None, relaxation, DRAW)
                else:
                    out = torch.nn.functional.linear(leaf, effective)
            out.float().square().sum().backward()
            results.append((out, leaf.grad))
        assert results[0][0].dtype == torch.bfloat16 and results[0][1].dtype == torch.float32
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results, strict=True))
    x, leaf = torch.randn(48), pi.clone().requires_grad_()
    kernels.masked_linear(x, W, leaf, None, relaxation, DRAW).sum().backward()
    assert torch.allclose(leaf.grad, kernels.gradient(relaxation, W, pi, x.expand(16, 48), DRAW), rtol=1e-5)


def test_draws_of_a_step_share_the_density_penalty():
    relaxation, W = Bernoulli(Unstructured(0.5)), torch.randn(8, 64)
    pi = relaxation.init_logits(relaxation.pattern.mask(W.abs()), Prior(gap=0.1), seed=0, layer=0)
    nothing = torch.zeros_like(W)

    def of(samples):
        draw = dataclasses.replace(DRAW, lam=0.0, share=Annealing().draw(0, 2, layer=0, samples=samples).share)
        return samples * kernels.gradient(relaxation, W, pi, nothing, draw)

    once, four = of(1), of(4)
    assert once.abs().max() > 0 and torch.allclose(once, four)


def test_nothing_of_the_mask_is_saved_for_backward():
    relaxation, W, _, pi = problem("2:4", (256, 256))
    x = torch.randn(4, 256, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        kernels.masked_linear(x, W, pi.requires_grad_(), None, relaxation, DRAW)
    assert set(saved) <= {t.data_ptr() for t in (x, W, pi)}


def test_recorded_numbers_of_the_plain_path():
    """Pinned for the paths that cannot run on every machine (Triton): W = 1, deterministic prior 1100."""
    relaxation = Categorical(NM(2, 4))
    prior = torch.tensor([[1, 1, 0, 0, 1, 1, 0, 0]], dtype=torch.bool)
    pi = relaxation.init_logits(prior, Prior(gap=0.02), seed=0, layer=0)
    M = relaxation.soft_mask(pi, Draw(noise.noise_key(7, 0, 0), kappa=100.0, tau=1.0))
    assert torch.allclose(M, torch.tensor([RECORDED]), atol=1e-6)


TRITON_SCRIPT = """
import torch
from topiarist.masklearn import noise, triton_kernel
from topiarist.masklearn.relax import relaxation_for
from topiarist.masklearn.relaxation import Draw, Prior
CASES = [("2:4", "categorical", (3, 600)), ("1:4", "categorical", (2, 64)), ("4:8", "categorical", (2, 96)),
         ("2:4", "topn", (3, 600)), ("1:4", "topn", (2, 64)), ("4:8", "topn", (2, 96)), ("3:5", "topn", (2, 85)),
         ("0.5", "bernoulli", (3, 1100)), ("0.8", "bernoulli", (5, 48))]
torch.manual_seed(0)
for pattern, name, shape in CASES:
    relaxation = relaxation_for(pattern, name)
    bound = 1e-3 if name == "topn" else 1e-5  # it divides by 1 - a
    W, G = torch.randn(shape), torch.randn(shape)
    pi = relaxation.init_logits(relaxation.pattern.mask(W.abs()), Prior(gap=None), seed=0, layer=0)
    draw = Draw(noise.noise_key(3, 1, 4), kappa=150.0, tau=0.7, lam=1e-2, first_row=3, first_group=2, share=0.5)
    ours, oracle = triton_kernel.forward(relaxation, W, pi, draw), relaxation.effective(W, pi, draw)
    assert (ours - oracle).abs().max() < bound, (pattern, name)
    ours, oracle = triton_kernel.backward(relaxation, W, pi, G, draw), relaxation.gradient(W, pi, G, draw)
    assert (ours - oracle).abs().max() < bound * oracle.abs().max(), (pattern, name)
"""


COMPILE_SCRIPT = """
import triton
from triton.backends.compiler import GPUTarget
from topiarist.masklearn import triton_kernel
from topiarist.masklearn.relax import Bernoulli, Categorical, TopN
shapes = {Categorical: (6, 4, 0, 8), TopN: (8, 8, 4, 8), Bernoulli: (1, 1, 0, 1)}  # classes, of, keep, padded
kernels = [(kernel, kind) for kind, both in triton_kernel.KERNELS.items() for kernel in both]
for kernel, kind in [*kernels, (triton_kernel._bernoulli_sums, Bernoulli)]:
    constants = dict(zip(("CLASSES", "OF", "KEEP", "PADDED"), shapes[kind]), BLOCK=128)
    types = dict.fromkeys(("weight", "grad"), "*bf16") | dict.fromkeys(("logits", "out", "S"), "*fp32")
    types |= dict.fromkeys(("kappa", "tau", "lam"), "fp32")
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in kernel.arg_names}
    source = triton.compiler.ASTSource(kernel, signature, constexprs=constants)
    assert triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize(
    ("script", "settings"),
    [(TRITON_SCRIPT, {"TRITON_INTERPRET": "1"}), (COMPILE_SCRIPT, {"TRITON_BACKENDS_IN_TREE": "1"})],
    ids=["equals plain in the interpreter", "compiles for an H100 that is not there"],
)
def test_triton(script, settings):
    """In a process of its own: the interpreter is chosen when triton is first imported."""
    environment = {**os.environ, **settings, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("environment", [{"PATH": "/nowhere", "CXX": ""}, {"CXX": "false"}], ids=["none", "broken"])
def test_without_a_compiler_there_is_one_warning_and_the_same_answer(environment, monkeypatch):
    relaxation, W, _, pi = problem("2:4", (8, 64))
    oracle = relaxation.effective(W, pi, DRAW)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    native.load.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match="plain torch"):
            assert torch.equal(kernels.effective(relaxation, W, pi, DRAW), oracle)
    finally:
        native.load.cache_clear()


def test_candidates_table_is_bytes():
    """The C++ kernel reads it as such."""
    assert candidates(Categorical(NM(2, 4)).pattern).element_size() == 1


def test_activation_checkpointing_draws_the_same_mask():
    relaxation, W, _, pi = problem("2:4", (32, 48))
    x, dy = torch.randn(8, 48, requires_grad=True), torch.randn(8, 32)
    grads = []
    for wrap in (lambda f, *a: f(*a), lambda f, *a: checkpoint(f, *a, use_reentrant=False)):
        leaf = pi.clone().requires_grad_()
        out = wrap(lambda x, leaf: kernels.masked_linear(x, W, leaf, None, relaxation, DRAW).relu(), x, leaf)
        grads.append(torch.autograd.grad(out, (x, leaf), dy))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
