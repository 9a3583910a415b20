"""Claim: the grid solver on the circle solves the continuum equation: against exact characteristics, against the growth
rates that linear theory gives, keeping mass and sign; and the particles of the package's fields approach it as n grows.
"""

import math

import pytest
import torch
from scipy import special

from macaron_ops.sphere import (
    Perceptron,
    SelfAttention,
    circle_flow,
    circle_grid,
    circle_points,
    circle_quantiles,
    wasserstein_circle,
)
from macaron_ops.splitting import RUNGE_KUTTA, to_sphere


def wide(*values):
    return torch.tensor(values, dtype=torch.float64)


def bump(cells, concentration=1.5, at=2.0):
    """A von Mises density plus a quarter of the uniform one."""
    density = torch.exp(concentration * torch.cos(circle_grid(cells) - at))
    density = density / density.sum() + 0.25 / cells
    return density / density.sum() * cells / (2 * math.pi)


def perceptron(k=3, seed=0):
    draw = torch.Generator().manual_seed(seed)
    a = to_sphere(torch.randn(k, 2, dtype=torch.float64, generator=draw))
    b, w = (torch.randn(k, dtype=torch.float64, generator=draw) for _ in "bw")
    return Perceptron(a, 0.3 * b, 0.5 * w, "tanh")


def test_exact_characteristics_at_second_order():
    """u = <a, x> a turns every angle by d(theta)/dt = -sin(2 theta)/2 from a = (1, 0): tan(theta) falls as e^-t. The
    error in L1 falls by nearly 4 when the cells are halved."""
    field, time = Perceptron(wide(1.0, 0.0)[None], wide(0.0), wide(1.0), "identity"), 0.7

    def exact(cells, fine=64):
        """Cell means of rho0(theta0) d theta0/d theta, by the midpoint rule on a finer grid."""
        theta = circle_grid(cells * fine)
        before = torch.atan2(theta.sin() * math.exp(time), theta.cos())
        stretch = math.exp(time) / (theta.cos() ** 2 + math.exp(2 * time) * theta.sin() ** 2)
        return ((1 + 0.5 * torch.cos(before - 2.0)) / (2 * math.pi) * stretch).reshape(cells, fine).mean(-1)

    errors = []
    for cells in (128, 256, 512):
        start = (1 + 0.5 * torch.cos(circle_grid(cells) - 2.0)) / (2 * math.pi)
        found = circle_flow(field, start, time, step=0.2 / cells)
        errors.append((found - exact(cells)).abs().mean().item())
    assert errors[0] > 3.5 * errors[1] > 3.5**2 * errors[2]


@pytest.mark.parametrize("weighting", ["softmax", "unnormalized"])
@pytest.mark.parametrize("k", [1, 3])
def test_small_waves_grow_as_bessel_functions_say(weighting, k):
    """From 1 + e cos(k theta) the wave grows with the rate k^2 I_k(beta) / beta (over I_0(beta) for the softmax):
    put the wave in, exp(beta cos) = I_0 + 2 sum I_k cos(k .)."""
    beta, time, amplitude, cells = 3.0, 0.1, 1e-6, 256
    start = (1 + amplitude * torch.cos(k * circle_grid(cells))) / (2 * math.pi)
    found = circle_flow(SelfAttention(beta, weighting=weighting), start, time, step=0.0025)
    wave = (found * torch.cos(k * circle_grid(cells))).sum().item() * 4 * math.pi / cells
    rate = k**2 * special.iv(k, beta) / beta / (special.iv(0, beta) if weighting == "softmax" else 1.0)
    assert math.log(wave / amplitude) / time == pytest.approx(rate, rel=3e-3)


def test_mass_and_sign_are_kept_while_clusters_form():
    start = bump(200)
    found = circle_flow(SelfAttention(6.0) + perceptron(), start, 8.0)
    assert found.sum().item() == pytest.approx(start.sum().item(), rel=1e-13)
    assert found.min() >= 0 and found.max() > 20 * start.max()


@pytest.mark.parametrize("kind", ["softmax", "unnormalized", "perceptron", "heads"])
def test_particles_approach_the_grid(kind):
    """W2 between n particles, moved by the package's field with RK4, and the grid's density falls as 1/n: 8 times more
    particles, at least 5 times nearer."""
    field = {
        "softmax": lambda: SelfAttention(3.0),
        "unnormalized": lambda: -1.0 * SelfAttention(2.0, weighting="unnormalized"),
        "perceptron": lambda: SelfAttention(2.0) + perceptron(),
        "heads": lambda: SelfAttention(1.5, *torch.randn(3, 2, 2, 2, dtype=torch.float64), heads=2) + perceptron(),
    }[kind]()
    time, steps, start = 0.6, 60, bump(1024)
    density = circle_flow(field, start, time)
    grid = circle_points(circle_grid(len(density)))
    apart = []
    for n in (4, 32, 256):
        x = circle_points(circle_quantiles(start, n))
        for _ in range(steps):
            x = to_sphere(RUNGE_KUTTA["rk4"](lambda t, x: field(x), 0.0, x, time / steps))
        apart.append(wasserstein_circle(x, grid, y_masses=density))
    assert apart[0] > 5 * apart[1] > 25 * apart[2] > 0


def test_quantiles_carry_equal_masses():
    density = bump(64)
    angles = circle_quantiles(density, 7)
    mass = density / density.sum()
    ends = torch.cat([wide(0.0), mass.cumsum(0)])
    cell = (angles / (2 * math.pi) * 64).long()
    below = ends[cell] + (angles / (2 * math.pi) * 64 - cell) * mass[cell]
    torch.testing.assert_close(below, (torch.arange(7, dtype=torch.float64) + 0.5) / 7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"density": bump(64) - 1}, "density: expected finite numbers of at least 0"),
        ({"density": bump(64) * math.nan}, "density: expected finite numbers of at least 0"),
        ({"density": bump(8)[:3]}, "cells: expected at least 4; got 3"),
        ({"time": -1.0}, "time: expected a finite number of at least 0"),
        ({"step": 0.0}, "step: expected a number above 0"),
        ({"courant": 0.6}, r"courant: expected a number in \(0, 1/2\]; got 0.6"),
        ({"field": SelfAttention(1.0, causal=True)}, "field: expected attention without a causal mask"),
        ({"field": SelfAttention(800.0, weighting="unnormalized")}, "field: expected finite velocities"),
        ({"field": SelfAttention(1.0, V=torch.eye(3))}, "field: expected one on the circle, d = 2; got d = 3"),
    ],
)
def test_refusals(change, message):
    with pytest.raises(ValueError, match=message):
        circle_flow(**{"field": SelfAttention(1.0), "density": bump(64), "time": 1.0} | change)
