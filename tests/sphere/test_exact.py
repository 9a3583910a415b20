"""Claim: simulations follow what theory gives in closed form: the orthonormal start, the six laws of speed, the time at
which particles have met."""

import math

import pytest
import torch

from macaron_ops.sphere import (
    NORMALIZATIONS,
    Normalization,
    SelfAttention,
    orthonormal_product,
    simulate,
    single_cluster_bound,
    speed_at_orthonormal,
    time_to_product,
)


def products(points):
    """The products of different particles, ``(frames, pairs)``."""
    n = points.shape[-2]
    i, j = torch.triu_indices(n, n, 1)
    return (points @ points.mT)[..., i, j]


N, BETA, END = 16, 4.0, 10.0


def worst(weighting, end, step, **options):
    """The largest difference of any product at any time."""
    path = simulate(
        SelfAttention(BETA, weighting=weighting),
        torch.eye(N, dtype=torch.float64),
        end,
        step,
        "rk4",
        every=10,
        **options,
    )
    gamma = orthonormal_product(path.times, N, BETA, weighting)
    assert path.times[-1] == end and gamma[-1] > 0.99
    return (products(path.points) - gamma[:, None]).abs().max()


@pytest.mark.parametrize(
    ("weighting", "end", "step", "options"),
    [
        ("softmax", END, 0.01, {}),
        # Its products close in at the rate 2 e^beta = 109: RK4 with steps of 0.01 is off by 1e-6.
        ("unnormalized", 1.0, 0.001, {}),
        ("unnormalized", END, 0.01, {"tolerance": 1e-14}),
    ],
)
def test_an_orthonormal_start_follows_its_equation(weighting, end, step, options):
    assert worst(weighting, end, step, **options) < 1e-9


def test_the_equation_tells_steps_that_are_too_large():
    assert 1e-7 < worst("unnormalized", END, 0.01) < 1e-5


@pytest.mark.parametrize("law", [*NORMALIZATIONS, "mix at 0"])
def test_the_laws_of_speed_at_an_orthonormal_start(law):
    n, beta, h = 5, 1.3, 1e-3
    law = Normalization("mix", radius=1.7, tau=0.0) if law == "mix at 0" else Normalization(law, radius=1.7, alpha=0.6)
    x0 = torch.eye(n, dtype=torch.float64)
    gamma = products(simulate(SelfAttention(beta), x0, 4 * h, h, "rk4", normalization=law).points).mean(-1)
    slope = (gamma * torch.tensor([-25, 48, -36, 16, -3])).sum() / (12 * h)  # one-sided, of order 4
    assert slope.item() == pytest.approx(speed_at_orthonormal(law, n, beta), rel=1e-6)


def test_radii_follow_their_laws():
    """pre: y grows by <theta, A>; peri by <theta, A> / |A|; the others keep it."""
    n, beta, h = 5, 1.3, 1e-4
    x0 = torch.eye(n, dtype=torch.float64)
    total, length = math.exp(beta) + n - 1, math.sqrt(math.exp(2 * beta) + n - 1)
    for name, expected in (("pre", math.exp(beta) / total), ("peri", math.exp(beta) / length), ("mix", 0.0)):
        law = Normalization(name, radius=2.0)
        radii = simulate(SelfAttention(beta), x0, h, h, "rk4", normalization=law).radii
        assert radii[0].allclose(torch.tensor(2.0, dtype=torch.float64))
        assert ((radii[1] - radii[0]) / h).mean().item() == pytest.approx(expected, abs=1e-4)
    assert simulate(SelfAttention(beta), x0, h, h, "rk4", normalization="ngpt").radii is None


def test_mix_is_post_until_tau_then_pre():
    x0 = torch.nn.functional.normalize(torch.randn(6, 3, dtype=torch.float64), dim=-1)
    field, law = SelfAttention(2.0), Normalization("mix", radius=1.5, tau=0.25)
    whole = simulate(field, x0, 0.5, 0.04, "rk4", normalization=law)
    assert 0.25 in whole.times.tolist()  # no step straddles the jump
    post = simulate(field, x0, 0.25, 0.04, "rk4").final
    pre = simulate(field, post, 0.25, 0.04, "rk4", normalization=Normalization("pre", radius=1.5))
    torch.testing.assert_close(whole.final, pre.final, rtol=0, atol=1e-8)
    torch.testing.assert_close(whole.radii[-1], pre.radii[-1], rtol=0, atol=1e-8)


@pytest.mark.parametrize("weighting", ["softmax", "unnormalized"])
@pytest.mark.parametrize(("n", "beta"), [(2, 0.5), (32, 9.0)])
def test_the_time_to_a_product_is_the_inverse_of_the_curve(weighting, n, beta):
    for product in (0.3, 0.999):
        t = time_to_product(product, n, beta, weighting)
        assert orthonormal_product([0.0, t], n, beta, weighting)[-1].item() == pytest.approx(product, abs=1e-11)


def test_the_bound_is_the_published_number():
    assert round(single_cluster_bound(), 4) == 0.5742


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: orthonormal_product([1.0, 0.5], 3, 1.0), "times: expected a list of rising times"),
        (lambda: orthonormal_product([1.0], 0, 1.0), "n: expected an integer of at least 1; got 0"),
        (lambda: orthonormal_product([1.0], 3, math.inf), "beta: expected a finite number"),
        (lambda: time_to_product(1.0, 3, 1.0), r"product: expected a number in \[0, 1\); got 1.0"),
        (lambda: Normalization("layer"), "normalization: expected one of 'post'"),
        (lambda: Normalization("pre", radius=0.0), "radius: expected a number above 0; got 0.0"),
    ],
)
def test_wrong_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
