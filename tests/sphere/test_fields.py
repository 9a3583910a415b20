"""Claim: the fields are what their formulas say, in every dtype, batched, with heads and matrices, on every backend; a
step is one call of the operator; and what has no energy says so."""

import math

import pytest
import torch

from macaron_ops.ops import use_backend
from macaron_ops.sphere import Perceptron, SelfAttention, Sum
from macaron_ops.splitting import to_sphere
from tests.rule import assert_by_rule

WEIGHTINGS = ("softmax", "unnormalized")


def points(*shape, dtype=torch.float64):
    return to_sphere(torch.randn(*shape, dtype=dtype))


def matrices(heads, d, e, dtype=torch.float64):
    lead = () if heads == 1 else (heads,)
    return [torch.randn(*lead, rows, d, dtype=dtype) / math.sqrt(d) for rows in (e, e, d)]


def attention_by_hand(x, beta, matrices, weighting, causal=False):
    """With every n x n matrix written out; shares nothing with the package."""
    total = 0
    Q, K, V = (m if m.dim() == 3 else m[None] for m in matrices)
    for q, k, v in zip(Q, K, V, strict=True):
        weights = (beta * (x @ q.T) @ (x @ k.T).mT).exp()
        if causal:
            weights = weights.tril()
        z = weights.sum(-1, keepdim=True) if weighting == "softmax" else x.shape[-2]
        total = total + (weights / z) @ (x @ v.T)
    return total


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_attention_is_its_formula(weighting, heads, causal):
    x, given = points(2, 9, 4), matrices(heads, 4, 3)
    field = SelfAttention(2.0, *given, heads=heads, weighting=weighting, causal=causal)
    u = attention_by_hand(x, 2.0, given, weighting, causal)
    torch.testing.assert_close(field.vectors(x), u, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(field(x), u - (u * x).sum(-1, keepdim=True) * x, rtol=1e-12, atol=1e-13)
    for direction, v in (("tangent", field(x)), ("ambient", u)):
        torch.testing.assert_close(field.step(x, 0.3, direction), to_sphere(x + 0.3 * v), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("beta", [0.5, 8.0, -3.0])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_vectors_are_right_in_narrow_dtypes(weighting, beta, dtype):
    x = points(2, 70, 3, dtype=torch.float32).to(dtype)
    eye = torch.eye(3)
    exact = attention_by_hand(x.double(), beta, [eye.double()] * 3, weighting)
    eager = attention_by_hand(x, beta, [eye.to(dtype)] * 3, weighting)
    assert_by_rule("u", SelfAttention(beta, weighting=weighting).vectors(x), eager, exact)


@pytest.mark.parametrize("beta", [60.0, -60.0])
def test_unnormalised_vectors_keep_their_digits_where_their_squares_overflow(beta):
    x = points(12, 3, dtype=torch.float32)
    exact = SelfAttention(beta, weighting="unnormalized").vectors(x.double())
    found = SelfAttention(beta, weighting="unnormalized").vectors(x)
    scale = torch.linalg.vector_norm(exact, dim=-1, keepdim=True)
    assert scale.max() ** 2 > torch.finfo(torch.float32).max
    seen = scale > scale.max() * 1e-30
    assert ((found.double() - exact).abs() <= 1e-4 * scale)[seen.expand_as(exact)].all()  # beta * eps of the scores


def test_one_step_of_attention_is_one_call_of_the_operator(monkeypatch):
    from macaron_ops.sphere import fields

    calls = []
    original = fields.sphere_attend_step
    monkeypatch.setattr(fields, "sphere_attend_step", lambda *a, **k: calls.append(1) or original(*a, **k))
    monkeypatch.setattr(fields, "normalize_step", None)
    x = points(5, 3, dtype=torch.float32)
    (2.0 * SelfAttention(1.0)).step(x, 0.1)
    assert calls == [1]


def test_backends_agree():
    x = points(4, 33, 3, dtype=torch.float32)
    field = SelfAttention(4.0)
    with use_backend("reference"):
        reference = field.vectors(x)
    torch.testing.assert_close(field.vectors(x), reference, rtol=1e-5, atol=1e-6)


def test_a_sum_is_a_sum_and_a_multiple_a_multiple():
    x, one = points(6, 3), SelfAttention(1.5, weighting="unnormalized")
    two = Perceptron(torch.randn(4, 3).double(), torch.randn(4).double(), torch.randn(4).double(), "tanh")
    field = one - 2.0 * two + -one
    assert isinstance(field, Sum) and len(field.fields) == 3
    torch.testing.assert_close(field.vectors(x), -2.0 * two.vectors(x), rtol=0, atol=1e-14)
    torch.testing.assert_close(field.energy(x), -2.0 * two.energy(x), rtol=0, atol=1e-14)
    torch.testing.assert_close(field.step(x, 0.2), (-2.0 * two).step(x, 0.2), rtol=0, atol=1e-14)
    torch.testing.assert_close((-(3.0 * one)).step(x, 0.2), one.step(x, -0.6))


def test_fields_are_differentiable_in_points_and_parameters():
    x = points(4, 3).requires_grad_()
    given = [m.requires_grad_() for m in matrices(2, 3, 2)]
    beta = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    a, b, w = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((5, 3), (5,), (5,)))

    def f(x, beta, Q, K, V, a, b, w):
        return (SelfAttention(beta, Q, K, V, heads=2) + Perceptron(a, b, w, "gelu"))(x)

    assert torch.autograd.gradcheck(f, (x, beta, *given, a, b, w))

    def unnormalised(x, beta):
        return SelfAttention(beta, weighting="unnormalized").energy(x)

    assert torch.autograd.gradcheck(unnormalised, (x, beta))


def test_memory_is_linear_in_the_particles():
    """30,000 particles: an n x n matrix would be 3.6 GB, more than is allowed here."""
    import resource

    x = points(30_000, 3, dtype=torch.float32)
    field = SelfAttention(1.0)
    field.energy(x[:10])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    field.step(x, 0.1), field.vectors(x), field.energy(x)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 4 * 30_000**2 / 10


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SelfAttention(math.inf), "beta: expected a finite number; got inf"),
        (lambda: SelfAttention(torch.tensor(math.nan)), "beta: expected a finite number; got nan"),
        (lambda: SelfAttention(1.0, weighting="linear"), "weighting: expected one of 'softmax', 'unnormalized'"),
        (lambda: SelfAttention(1.0, heads=0), "heads: expected an integer of at least 1; got 0"),
        (lambda: SelfAttention(1.0, torch.eye(3), heads=2), r"Q: expected shape \(2, e, d\); got \(3, 3\)"),
        (lambda: SelfAttention(1.0, torch.ones(2, 3)), r"Q, K: expected one number of rows e.*got \[2, 3\]"),
        (lambda: SelfAttention(1.0, V=torch.ones(2, 3)), r"V: expected shape \(d, d\); got \(2, 3\)"),
        (lambda: SelfAttention(1.0, torch.eye(3), V=torch.eye(2)), "Q, K, V: expected one number of coordinates d"),
        (lambda: SelfAttention(1.0, torch.eye(3)).vectors(torch.ones(4, 2)), "x: expected d = 3 coordinates"),
        (lambda: SelfAttention(1.0).vectors(torch.ones(0, 3)), "x: expected shape .* n and d of at least 1"),
        (lambda: SelfAttention(1.0).step(torch.ones(1, 3), 0.1, "difference"), "direction: expected one of 'tangent'"),
        (lambda: Perceptron(torch.ones(2, 3), torch.ones(3), torch.ones(2)), r"b: expected shape \(2\); got \(3,\)"),
        (lambda: Perceptron(torch.ones(2, 3), torch.ones(2), torch.ones(2), "swish"), "activation: expected one of"),
        (lambda: SelfAttention(1.0) * math.nan, "factor: expected a finite number"),
    ],
)
def test_wrong_input_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


SYMMETRIC = torch.tensor([[2.0, 1.0], [1.0, -1.0]])


@pytest.mark.parametrize(
    ("field", "message"),
    [
        (SelfAttention(1.0, causal=True), "causal=True has none"),
        (SelfAttention(0.0), "beta=0 has none"),
        (SelfAttention(1.0, V=SYMMETRIC), "unless Q\\^T K = V is symmetric"),
        (SelfAttention(1.0, K=SYMMETRIC.tril(), V=SYMMETRIC.tril()), "unless Q\\^T K = V is symmetric"),
        (Perceptron(torch.ones(1, 2), torch.ones(1), torch.ones(1), "gelu_tanh"), "Perceptron .* 'gelu_tanh' has none"),
        (SelfAttention(1.0) - SelfAttention(1.0, causal=True), "causal=True has none"),
    ],
)
def test_a_field_without_an_energy_says_so(field, message):
    with pytest.raises(ValueError, match=f"energy: .*{message}"):
        field.energy(points(4, 2, dtype=torch.float32))
