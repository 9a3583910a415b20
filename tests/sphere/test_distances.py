"""Claim: the W2 distances are those of the definition: against every permutation, against one another on the circle,
against closed forms; they are metrics and know rotations."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from macaron_ops.sphere import sliced_wasserstein, uniform, von_mises_fisher, wasserstein, wasserstein_circle


def cloud(n, d, seed=0):
    return uniform(n, d, generator=torch.Generator().manual_seed(seed))


def weights(n, seed=0):
    return 0.05 + torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("cost", ["geodesic", "chordal"])
def test_against_every_permutation(cost):
    x, y = cloud(6, 3), cloud(6, 3, 1)
    angle = (x @ y.T).clamp(-1, 1).acos()
    pairs = angle if cost == "geodesic" else 2 * (angle / 2).sin()
    best = min(pairs.square()[range(6), list(p)].mean() for p in itertools.permutations(range(6)))
    assert wasserstein(x, y, cost=cost) == pytest.approx(best.sqrt().item(), rel=1e-12)


@given(st.integers(1, 12), st.integers(1, 12), st.booleans(), st.integers(0, 2**31))
def test_the_circle_agrees_with_the_linear_program(n, m, massive, seed):
    x, y = cloud(n, 2, seed), cloud(m, 2, seed + 1)
    masses = {"x_masses": weights(n, seed), "y_masses": weights(m, seed + 1)} if massive else {}
    expected = wasserstein(x, y, **masses)
    assert wasserstein_circle(x, y, **masses) == pytest.approx(expected, abs=1e-6)


def test_the_circle_agrees_with_the_assignment():
    x, y = cloud(300, 2), von_mises_fisher(300, torch.tensor([0.6, 0.8], dtype=torch.float64), 2.0)
    assert wasserstein_circle(x, y) == pytest.approx(wasserstein(x, y), rel=1e-12)


def test_a_rotation_of_the_circle_moves_by_its_angle():
    """Particles evenly spread by 2 pi / n, turned by less than half a space."""
    n, turn = 50, 0.05
    angle = 2 * math.pi * torch.arange(n, dtype=torch.float64) / n
    x, y = (torch.stack([a.cos(), a.sin()], -1) for a in (angle, angle + turn))
    assert wasserstein_circle(x, y) == pytest.approx(turn, rel=1e-9)


def test_equal_masses_are_copies():
    x, y = cloud(4, 3), cloud(6, 3, 1)
    copies = wasserstein(x.repeat_interleave(3, 0), y.repeat_interleave(2, 0))
    assert wasserstein(x, y) == pytest.approx(copies, rel=1e-8)
    sliced = sliced_wasserstein(x.repeat_interleave(3, 0), y.repeat_interleave(2, 0), generator=torch.Generator())
    assert sliced_wasserstein(x, y, generator=torch.Generator()) == pytest.approx(sliced, rel=1e-12)


@pytest.mark.parametrize("d", [2, 3, 5])
def test_sliced_is_below_the_chordal_distance_and_exact_for_diracs(d):
    """Two Diracs: <x - y, u>^2 has the mean |x - y|^2 / d."""
    x, y = cloud(60, d), von_mises_fisher(60, cloud(1, d)[0], 3.0)
    below = wasserstein(x, y, cost="chordal") / math.sqrt(d)
    assert 0 < sliced_wasserstein(x, y, projections=4000) <= 1.02 * below
    one, other = cloud(1, d), cloud(1, d, 1)
    expected = (one - other).norm().item() / math.sqrt(d)
    assert sliced_wasserstein(one, other, projections=20_000) == pytest.approx(expected, rel=0.02)


def test_a_metric():
    x, y, z = cloud(40, 3), cloud(40, 3, 1), von_mises_fisher(40, cloud(1, 3)[0], 1.0)
    for distance in (wasserstein, lambda a, b: sliced_wasserstein(a, b, generator=torch.Generator())):
        assert distance(x, x[torch.randperm(40)]) < 1e-7
        assert distance(x, y) == pytest.approx(distance(y, x), rel=1e-12)
        assert distance(x, z) <= distance(x, y) + distance(y, z)
    turn = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64)).Q
    assert wasserstein(x @ turn, y @ turn) == pytest.approx(wasserstein(x, y), rel=1e-12)


def test_samples_approach_their_measure():
    """Two clouds of n points of one measure on S^2 are apart by about n^-1/2 (sliced)."""
    apart = [
        sliced_wasserstein(cloud(n, 3), cloud(n, 3, 1), projections=32, generator=torch.Generator())
        for n in (100, 10_000, 1_000_000)
    ]
    assert apart[0] > 5 * apart[1] > 25 * apart[2] > 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: wasserstein(cloud(3, 2), cloud(3, 3)), "y: expected 2 coordinates, as x; got 3"),
        (lambda: wasserstein(cloud(3, 2), cloud(3, 2), cost="taxi"), "cost: expected one of 'geodesic', 'chordal'"),
        (lambda: wasserstein(2 * cloud(3, 2), cloud(3, 2)), "x: expected points on the unit sphere"),
        (lambda: wasserstein(cloud(5001, 2), cloud(5001, 2)), "x, y: expected at most 5000 particles; got 5001"),
        (lambda: wasserstein(cloud(500, 2), cloud(501, 2)), "x, y: expected at most 200000 pairs"),
        (
            lambda: wasserstein(cloud(3, 2), cloud(3, 2), x_masses=torch.ones(2)),
            r"x_masses: expected a tensor of shape",
        ),
        (lambda: wasserstein_circle(cloud(3, 3), cloud(3, 3)), "x: expected points of the circle"),
        (lambda: sliced_wasserstein(cloud(3, 3), cloud(3, 3).float()), "y: expected torch.float64 on cpu, as x"),
        (lambda: sliced_wasserstein(cloud(3, 3), cloud(3, 3), projections=0), "projections: expected an integer"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
