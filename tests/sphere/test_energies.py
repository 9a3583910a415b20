"""Claim: energies and fields are on one scale: along every field that has one, ``dE/dt`` is the mean of the squared
speeds, and the normalised Euler step of any size ascends wherever the theorem says so, and not where it does not."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from macaron_ops.sphere import ACTIVATIONS, Perceptron, SelfAttention
from macaron_ops.splitting import to_sphere

D, N = 4, 7


def double(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def symmetric(heads, e=None):
    """Q, K, V with Q^T K = V symmetric of each head: indefinite, or with e rows of K = Q positive semidefinite."""
    if e is None:
        V = double(heads, D, D)
        V = (V + V.mT) / 2
        return None, V, V
    Q = double(heads, e, D) / math.sqrt(D)
    return Q, Q, Q.mT @ Q


def attention(heads, *, e=None, beta=1.7, weighting="unnormalized"):
    matrices = (m if m is None or heads > 1 else m[0] for m in symmetric(heads, e))
    return SelfAttention(beta, *matrices, heads=heads, weighting=weighting)


def perceptron(activation):
    return Perceptron(double(6, D), double(6), double(6), activation)


FIELDS = {
    "attention": lambda: SelfAttention(2.0, weighting="unnormalized"),
    "attention, negative beta": lambda: SelfAttention(-3.0, weighting="unnormalized"),
    "attention, matrices": lambda: attention(1),
    "three heads": lambda: attention(3),
    "three heads of low rank": lambda: attention(3, e=2),
    "descent": lambda: -attention(2),
    **{name: lambda name=name: perceptron(name) for name, act in ACTIVATIONS.items() if act.primitive},
    "heads and perceptrons": lambda: attention(2) + 0.7 * perceptron("gelu") - perceptron("relu"),
}


def slope(field, x, v, h=1e-5):
    """dE/dt along v, by a central difference on the sphere."""
    return (field.energy(to_sphere(x + h * v)) - field.energy(to_sphere(x - h * v))) / (2 * h)


@pytest.mark.parametrize("name", FIELDS)
def test_energy_grows_by_the_mean_squared_speed(name):
    field, x = FIELDS[name](), to_sphere(double(3, N, D))
    v = field(x)
    expected = v.square().sum((-1, -2)) / N
    # Where descent is asked for, the field and its energy have both changed sign.
    torch.testing.assert_close(slope(field, x, v), expected, rtol=1e-6, atol=1e-9)
    assert expected.min() > 1e-3


@pytest.mark.parametrize("name", FIELDS)
def test_vectors_are_n_times_the_gradient_of_the_energy(name):
    field, x = FIELDS[name](), to_sphere(double(N, D)).requires_grad_()
    (grad,) = torch.autograd.grad(field.energy(x), x)
    torch.testing.assert_close(field.vectors(x), N * grad, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("make", [lambda: SelfAttention(2.0), lambda: attention(1, weighting="softmax")])
def test_softmax_ascends_the_energy_in_the_metric_of_its_row_sums(make):
    field, x = make(), to_sphere(double(3, N, D))
    v = field(x)
    expected = (field.partition(x) * v.square().sum(-1)).sum(-1) / N**2
    torch.testing.assert_close(slope(field, x, v), expected, rtol=1e-6, atol=1e-9)


def test_a_gelu_energy_without_its_last_term_fails_the_identity():
    """The term Phi(z) counts; and the identity sees it."""
    right = ACTIVATIONS["gelu"]
    wrong = right._replace(primitive=lambda z: right.primitive(z) + torch.special.ndtr(z))
    a, b, w = double(6, D), double(6), double(6)
    x = to_sphere(double(3, N, D))
    v = Perceptron(a, b, w, "gelu")(x)
    expected = v.square().sum((-1, -2)) / N
    assert ((slope(Perceptron(a, b, w, wrong), x, v) - expected) / expected).abs().max() > 1e-2


@given(
    seed=st.integers(0, 2**31),
    n=st.integers(1, 9),
    d=st.integers(2, 5),
    e=st.integers(1, 5),
    beta=st.floats(0.01, 30.0),
    log_h=st.floats(-6.0, 6.0),
    weighting=st.sampled_from(["softmax", "unnormalized"]),
)
def test_the_ambient_euler_step_of_any_size_ascends(seed, n, d, e, beta, log_h, weighting):
    """S(x + h u) with Q^T K = V positive semidefinite: E does not fall, whatever h > 0."""
    generator = torch.Generator().manual_seed(seed)
    x = to_sphere(torch.randn(n, d, generator=generator, dtype=torch.float64))
    Q = torch.randn(e, d, generator=generator, dtype=torch.float64) / math.sqrt(d)
    field = SelfAttention(beta, Q, Q, Q.mT @ Q, weighting=weighting)
    before = field.energy(x)
    after = field.energy(field.step(x, 10.0**log_h, "ambient"))
    # Rounding: a score is beta |Q|^2 large, and E carries its error.
    assert after >= before * (1.0 - 1e-14 * (10.0 + beta * Q.square().sum()))


def test_an_indefinite_value_matrix_may_descend():
    V = torch.diag(torch.tensor([1.0, -1.0, 0.5], dtype=torch.float64))
    field = SelfAttention(1.0, K=V, V=V, weighting="unnormalized")
    x = to_sphere(double(200, 8, 3))
    changes = field.energy(field.step(x, 10.0, "ambient")) - field.energy(x)
    assert (changes < -1e-3).any()
    # ... and it is the step's size that does it: the flow itself ascends.
    assert (field.energy(field.step(x, 1e-4)) >= field.energy(x)).all()
