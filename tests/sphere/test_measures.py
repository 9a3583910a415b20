"""Claim: the samplers of initial measures draw from the measures that they name, in any dimension and up to a million
points, and the same cloud from a seed in every dtype."""

import math

import pytest
import torch
from scipy import special, stats

from macaron_ops.sphere import atomic, samples, uniform, von_mises_fisher

N = 20_000


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def along(d, dtype=torch.float64):
    mean = torch.arange(1.0, d + 1, dtype=dtype)
    return mean / mean.norm()


@pytest.mark.parametrize("d", [2, 3, 7])
def test_uniform_projections_have_their_beta_law(d):
    """(1 + <x, u>) / 2 is Beta((d-1)/2, (d-1)/2) for every direction u."""
    x = uniform(N, d, generator=generator())
    law = stats.beta((d - 1) / 2, (d - 1) / 2)
    for direction in (along(d), torch.eye(d, dtype=torch.float64)[0]):
        assert stats.kstest(((1 + x @ direction) / 2).numpy(), law.cdf).pvalue > 0.01


@pytest.mark.parametrize("concentration", [0.0, 0.3, 4.0, 500.0])
@pytest.mark.parametrize("d", [2, 3, 7])
def test_von_mises_fisher_has_its_radial_law_and_its_symmetry(d, concentration):
    """<x, mean> has the density exp(k w) (1 - w^2)^((d-3)/2), by its distribution function in the angle, where it is
    smooth; what is left of x is uniform on the sphere across the mean."""
    mean = along(d)
    x = von_mises_fisher(N, mean, concentration, generator=generator(1))
    angle = torch.acos((x @ mean).clamp(-1, 1))
    grid = torch.linspace(0, math.pi, 20_001, dtype=torch.float64)
    density = torch.exp(concentration * (grid.cos() - 1)) * grid.sin() ** (d - 2)
    cumulative = torch.cumulative_trapezoid(density, grid)
    cumulative = torch.cat([torch.zeros(1, dtype=torch.float64), cumulative / cumulative[-1]]).numpy()
    assert stats.kstest(angle.numpy(), lambda t: _interpolate(t, grid, cumulative)).pvalue > 0.01
    across = x - (x @ mean)[:, None] * mean
    across = across / across.norm(dim=-1, keepdim=True)
    assert across.mean(0).norm() < 4 / math.sqrt(N)


def _interpolate(t, grid, values):
    import numpy

    return numpy.interp(t, grid.numpy(), values)


def test_the_mean_length_at_extreme_concentrations():
    """1 - <x, mean> has the mean (d-1) / (2k) as k grows: nothing cancels at 1e12; at 50 dimensions it is the quotient
    of Bessel functions."""
    x = von_mises_fisher(N, along(3), 1e12, generator=generator(2))
    chord = (x - along(3)).square().sum(-1) / 2
    assert chord.mean().item() * 1e12 == pytest.approx(1.0, rel=0.05)
    x = von_mises_fisher(N, along(50), 30.0, generator=generator(2))
    expected = special.ive(25, 30.0) / special.ive(24, 30.0)
    assert (x @ along(50)).mean().item() == pytest.approx(expected, abs=0.005)


def test_a_seed_is_a_cloud_in_every_dtype_and_batch():
    shape = (2, 3, 8, 3)
    for draw in (
        lambda **o: uniform(8, 3, batch=(2, 3), **o),
        lambda **o: von_mises_fisher(8, along(3), 2.0, batch=(2, 3), **o),
    ):
        wide = draw(generator=generator())
        assert wide.shape == shape and wide.dtype == torch.float64
        assert torch.equal(draw(generator=generator(), dtype=torch.float32), wide.float())
        assert not torch.equal(draw(generator=generator(1)), wide)
        torch.testing.assert_close(wide.norm(dim=-1), torch.ones(shape[:-1], dtype=torch.float64))


def test_a_million_points():
    x = von_mises_fisher(1_000_000, along(3, torch.float32), 5.0, dtype=torch.float32, generator=generator())
    assert x.shape == (1_000_000, 3) and x.dtype == torch.float32
    assert (x @ along(3, torch.float32)).double().mean().item() == pytest.approx(1 / math.tanh(5.0) - 0.2, abs=1e-3)


def test_atoms_get_the_nearest_counts():
    positions = torch.eye(3, dtype=torch.float64)
    cloud = atomic(10, positions, torch.tensor([5.0, 3.1, 1.9]))
    assert [int((cloud == position).all(-1).sum()) for position in positions] == [5, 3, 2]
    assert len(atomic(7, positions)) == 7
    with pytest.raises(ValueError, match="n: expected enough particles for each of the 3 atoms; got 2"):
        atomic(2, positions)


def test_user_samples():
    points = uniform(5, 3, generator=generator())
    assert samples(points) is points
    drawn = samples(points, 100, generator=generator())
    assert drawn.shape == (100, 3) and torch.cdist(drawn, points).min(-1).values.max() < 1e-7


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: uniform(0, 3), "n: expected an integer of at least 1; got 0"),
        (lambda: uniform(4, 1), "d: expected at least 2"),
        (lambda: von_mises_fisher(4, torch.ones(3), 1.0), "mean: expected points on the unit sphere"),
        (lambda: von_mises_fisher(4, along(3), -1.0), "concentration: expected a finite number of at least 0"),
        (lambda: von_mises_fisher(4, along(3), math.nan), "concentration: expected a finite number of at least 0"),
        (lambda: samples(torch.zeros(0, 3)), "points: expected at least one point"),
        (lambda: samples(torch.full((2, 3), math.nan)), "points: expected points on the unit sphere"),
        (lambda: samples(2 * torch.eye(3)), "unit sphere; the length of one is off by 1"),
        (lambda: samples(torch.eye(3)[0]), r"points: expected shape \(n, d\)"),
        (lambda: atomic(4, torch.eye(3), torch.ones(2)), r"masses: expected a tensor of shape \(3,\)"),
        (lambda: atomic(4, torch.eye(3), torch.tensor([1.0, -1, 1])), "masses: expected finite numbers of at least 0"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_wrong_kinds():
    with pytest.raises(TypeError, match="points: expected a floating tensor; got list"):
        samples([[1.0, 0.0]])
    with pytest.raises(TypeError, match="n: expected an integer"):
        uniform(2.0, 3)
