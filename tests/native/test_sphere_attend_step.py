"""Claim: the native step of particles keeps the tolerance rule where there are many of them, on either side of the
border between its regimes, in linear memory; and what no score can move has a gradient of exactly 0."""

import pytest
import torch
import torch.nn.functional as F

import macaron_ops
from tests import twins
from tests.native.calls import Call, Drawn, check, lay
from tests.rule import assert_by_rule, assert_draws_by_rule

pytestmark = pytest.mark.skipif(
    not macaron_ops.backends()["native"].usable, reason="the native library cannot be used here"
)
DTYPES = [torch.float32, torch.bfloat16]
WEIGHTINGS = ["softmax", "unnormalized"]


def particles(n, d, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(n, d, dtype=torch.float64, generator=generator), dim=-1).to(dtype)


def results(step, x, beta=2.0, **options):
    """y and the gradient in x, for a gradient of y that is the same in every dtype."""
    x = x.detach().requires_grad_()
    y = step(x, 0.3, beta, **options)
    grad = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).bfloat16()
    return y.detach(), torch.autograd.grad(y, x, grad.to(y.dtype))[0]


def native(x, step=0.3, beta=2.0, **options):
    with macaron_ops.use_backend("native"):
        return macaron_ops.sphere_attend_step(x, step, beta, **options)


def in_blocks(x, step=0.3, beta=2.0, **options):
    """The definition, whose forward and backward are in blocks of rows: no n x n matrix in float64."""
    with macaron_ops.use_backend("reference"):
        return macaron_ops.sphere_attend_step(x, step, beta, **options)


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"weighting": "unnormalized"}], ids=repr)
@pytest.mark.parametrize(("n", "d"), [(4001, 3), (3001, 48)])
def test_many_particles(n, d, options):
    x = particles(n, d)
    found = [results(step, t, **options) for step, t in ((native, x), (twins.sphere_attend_step, x))]
    for name, *triple in zip(("y", "gradient of x"), *found, results(in_blocks, x.double(), **options), strict=True):
        assert_by_rule(name, *triple)


@pytest.mark.parametrize(("n", "beta"), [(200, 12.0), (300, 20.0), (600, 30.0), (1100, 30.0), (1100, 60.0)])
@pytest.mark.parametrize("d", [3, 9, 64])
def test_concentrated_weights(d, n, beta):
    """A few neighbours of a particle have most of its weight: the gradients of scores cancel."""

    def draw(seed):
        x = particles(n, d, seed=seed)
        pairs = (native, x), (twins.sphere_attend_step, x), (in_blocks, x.double())
        found = [results(step, t, beta=beta) for step, t in pairs]
        return {name: triple for name, *triple in zip(("y", "gradient of x"), *found, strict=True)}

    assert_draws_by_rule(draw)


@pytest.mark.parametrize("d", [3, 48])
def test_many_particles_in_bfloat16(d):
    x = particles(2001, d, torch.bfloat16)
    found = [results(step, x) for step in (native, twins.sphere_attend_step)]
    for name, *triple in zip(("y", "gradient of x"), *found, results(in_blocks, x.double()), strict=True):
        assert_by_rule(name, *triple)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("d", [8, 9])
def test_either_side_of_the_border_of_the_regimes(d, weighting, causal, dtype):
    options = {"step": 0.3, "weighting": weighting, "causal": causal}
    tensors = {"x": Drawn((37, d), "unit", "x"), "beta": Drawn((), "positive", "x")}
    check(Call("sphere_attend_step", tensors, options, dtype))


@pytest.mark.parametrize("direction", ["tangent", "difference", "ambient"])
@pytest.mark.parametrize("d", [3, 17, 48])
def test_what_nearly_vanishes_still_has_length_1(d, direction):
    """Most of x + step v cancels: a length that is not that of what it divides would show."""
    x = particles(50, d)
    u = -x + 1e-3 * particles(50, d, seed=2)
    if direction == "tangent":  # x + (u - <u, x> x) is small where <u, x> is 2 and u is not
        x, u = 2**0.5 * x, 2**0.5 * x + 1e-3 * particles(50, d, seed=2)
    with macaron_ops.use_backend("native"):
        y = macaron_ops.normalize_step(x, u, {"difference": 0.5003}.get(direction, 1.0003), direction=direction)
    torch.testing.assert_close(y.double().norm(dim=-1), torch.ones(50).double(), rtol=0, atol=5e-7)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_both_regimes_give_the_same(weighting, causal):
    """A ninth channel of zeros changes nothing but the regime."""
    x, grad = particles(301, 8), torch.randn(301, 8)
    found = []
    for channels in (0, 1):
        t = F.pad(x, (0, channels)).requires_grad_()
        y = native(t, weighting=weighting, causal=causal)
        found.append((y.detach(), torch.autograd.grad(y, t, F.pad(grad, (0, channels)))[0]))
    for small, blocked in zip(*found, strict=True):
        assert not blocked[:, 8].any()
        torch.testing.assert_close(small, blocked[:, :8], rtol=0, atol=1e-6 * float(small.abs().max()))


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("d", [3, 17])
def test_a_learned_beta(d, causal, weighting):
    """With queries, keys and values of their own, so that no two loops are one."""
    tensors = {name: Drawn((2, 20, d), "unit", "x") for name in ("x", "query", "key", "value")}
    tensors |= {"beta": Drawn((), "positive", "x"), "step": Drawn((d,), "positive", "x")}
    check(Call("sphere_attend_step", tensors, {"weighting": weighting, "causal": causal}))


@pytest.mark.parametrize("layout", ["transposed", "swapped", "every other", "inside"])
@pytest.mark.parametrize("d", [3, 17])
def test_strides_change_no_bit(d, layout):
    x, grad = particles(2 * 33, d).view(2, 33, d), torch.randn(2, 33, d)
    found = []
    for how in ("contiguous", layout):
        t = lay(x, how).requires_grad_()
        y = native(t, causal=True)
        found.append((y.detach(), torch.autograd.grad(y, t, lay(grad, how))[0]))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_what_is_hidden_changes_nothing():
    """A row of causal attention is the last row of attention among what it sees."""
    for d in (3, 17):
        x = particles(70, d)
        y = native(x, causal=True)
        for n in (1, 2, 16, 17, 33, 70):
            torch.testing.assert_close(y[n - 1], native(x[:n])[-1], rtol=0, atol=4 * torch.finfo(x.dtype).eps)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("direction", ["tangent", "difference", "ambient"])
@pytest.mark.parametrize("d", [3, 8, 9, 33])
def test_what_no_score_moves_has_no_gradient(d, direction, dtype):
    """A softmax over one key, or over equal values, is the same whatever the scores."""
    x, one = particles(37, d, dtype), particles(1, d, dtype)
    many, equal = particles(37, d, dtype, seed=2), one.expand(37, d)
    for query, key, value in ((x, one, one), (x, many, equal), (x[:1], x[:1], x[:1])):
        t = [s.detach().clone().requires_grad_() for s in (query, key)]
        beta = torch.tensor(1.5, dtype=dtype, requires_grad=True)
        y = native(x[: len(query)], 0.3, beta, query=t[0], key=t[1], value=value, direction=direction)
        assert not any(g.any() for g in torch.autograd.grad(y, [*t, beta], torch.randn_like(y)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [3, 8, 9, 33])
def test_the_first_causal_row_has_no_gradient_of_scores(d, dtype):
    x, key = particles(37, d, dtype), particles(37, d, dtype, seed=2)
    t = [s.requires_grad_() for s in (x.clone(), key.clone())]
    beta = torch.tensor(1.5, dtype=dtype, requires_grad=True)
    y = native(x, 0.3, beta, query=t[0], key=t[1], value=key.detach(), causal=True)
    grad = torch.zeros_like(y)
    grad[0] = torch.randn(d)
    assert not any(g.any() for g in torch.autograd.grad(y, [*t, beta], grad))


@pytest.mark.parametrize("direction", ["tangent", "difference", "ambient"])
def test_points_of_a_line_have_no_gradient(direction):
    """S(z) is 1 or -1 of the one channel."""
    x, u = torch.tensor([[1.0], [-1.0], [1.0]]).requires_grad_(), torch.tensor([[0.3], [0.7], [-1.1]]).requires_grad_()
    with macaron_ops.use_backend("native"):
        y = macaron_ops.normalize_step(x, u, 0.3, direction=direction)
    assert torch.equal(y.abs(), torch.ones_like(y))
    assert not any(g.any() for g in torch.autograd.grad(y, (x, u), torch.randn_like(y)))


def memory_of(n, d, causal):
    """Bytes of scratch in use at most, and of what is kept for backward."""
    kept = []
    x = particles(n, d).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
        torch.ops.macaron_ops_cpu.scratch_peak()  # starts its mark anew
        y = native(x, causal=causal)
    y.sum().backward()
    return torch.ops.macaron_ops_cpu.scratch_peak() + sum(kept)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("d", [3, 17])
def test_memory_is_linear(d, causal):
    """Four times as many particles, of which a matrix would be 16 times as large. The scratch of a call may be twice as
    large as asked, where that was there already."""
    few, many = (memory_of(n, d, causal) for n in (1024, 4096))
    assert many <= 8 * few
    assert many < 4096 * 4096 / 8  # less than a bit for each pair
