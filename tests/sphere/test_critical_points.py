"""Claim: ``find_critical_points`` finds the critical points that are known in closed form and says what they are; its
Hessian is the second derivative along geodesics; theorems about perceptrons on the circle hold for what it finds."""

import math

import pytest
import torch

from macaron_ops.sphere import (
    Field,
    Perceptron,
    SelfAttention,
    atoms,
    circle_points,
    cluster_mass_bound,
    cluster_threshold,
    find_critical_points,
    heaviest_arc,
    hessian,
    potential_maximum,
    uniform,
)
from macaron_ops.sphere.exact import single_cluster_bound
from macaron_ops.splitting import to_sphere


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def perceptron(k, d, activation, seed=0, size=1.0, bias=0.0):
    """Unit directions, the weights' absolute values summing to ``size``: ``size`` is a Lipschitz constant."""
    draw = generator(seed)
    a = to_sphere(torch.randn(k, d, dtype=torch.float64, generator=draw))
    b, w = (torch.randn(k, dtype=torch.float64, generator=draw) for _ in "bw")
    return Perceptron(a, bias * b, size * w / w.abs().sum(), activation)


def attention(beta):
    """Unnormalised, with the weights ``exp(beta (<x, y> - 1)) / n``: of the perceptron's size for every beta."""
    return math.exp(-beta) * SelfAttention(beta, weighting="unnormalized")


def quadratic(d):
    """v(x) = <x, A x>: its critical points are A's eigenvectors."""
    values = torch.linspace(-1, 2, d, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64, generator=generator(3))).Q
    return Perceptron(turn, torch.zeros(d, dtype=torch.float64), values, "identity"), values


@pytest.mark.parametrize("d", [2, 3, 4])
def test_eigenvectors_of_a_quadratic_form(d):
    """At the i-th, 1/2 v has the value l_i / 2 and the Hessian's eigenvalues l_j - l_i, j other than i."""
    field, values = quadratic(d)
    found = find_critical_points(field, 1, d, starts=24, steps=0, generator=generator())
    assert [point.energy for point in found] == pytest.approx((values.flip(0) / 2).tolist(), abs=1e-12)
    kinds = ["maximum", *["saddle"] * (d - 2), "minimum"]
    for i, (point, kind) in enumerate(zip(found, kinds, strict=True)):
        own = values.flip(0)[i]
        torch.testing.assert_close(point.eigenvalues, values[values != own] - own, rtol=1e-9, atol=1e-9)
        assert (point.kind, point.index, point.nullity) == (kind, i, 0)
        assert point.stable == (i == 0)
    assert sum(point.starts for point in found) == 24


@pytest.mark.parametrize("d", [2, 3])
def test_the_point_that_attention_gathers_in(d):
    """All n particles in one: E = e^beta / (2 beta), the highest there is; the eigenvalues are -e^beta for every motion
    apart, and 0 for the d - 1 motions together, which are rotations."""
    n, beta = 7, 3.0
    (point,) = find_critical_points(SelfAttention(beta), n, d, starts=4, generator=generator())
    assert point.energy == pytest.approx(math.exp(beta) / (2 * beta), rel=1e-12)
    expected = torch.zeros(n * (d - 1), dtype=torch.float64)
    expected[: (n - 1) * (d - 1)] = -math.exp(beta)
    torch.testing.assert_close(point.eigenvalues, expected, rtol=1e-9, atol=1e-8)
    assert (point.kind, point.nullity, point.symmetry, point.starts) == ("maximum", d - 1, d - 1, 4)
    assert point.atoms().masses.tolist() == [1.0]


def test_the_antipodal_pair_and_the_even_polygon_are_no_maxima():
    """The antipodal pair is stationary and a strict minimum for two particles; the spectrum of a hexagon is the Fourier
    sum of the kernel's second derivative."""
    field = SelfAttention(2.0, weighting="unnormalized")
    pair = circle_points(torch.tensor([[0.3, 0.3 + math.pi]], dtype=torch.float64))
    (point,) = find_critical_points(field, x0=pair, steps=0)
    assert (point.kind, point.nullity, point.symmetry) == ("minimum", 1, 1)

    n, beta = 6, 2.0
    angle = 2 * math.pi * torch.arange(n, dtype=torch.float64) / n
    (point,) = find_critical_points(field, x0=circle_points(angle)[None], steps=0)
    second = (
        (beta * angle.sin() ** 2 - angle.cos()) * torch.exp(beta * angle.cos()) / n
    )  # k'' of k = e^(beta cos) / beta
    second[0] = 0.0
    modes = torch.stack([(second * (1 - torch.cos(m * angle))).sum() for m in range(n)])
    torch.testing.assert_close(point.eigenvalues, modes.sort().values, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("activation", ["tanh", "gelu"])
@pytest.mark.parametrize("d", [2, 3])
def test_the_hessian_is_the_second_derivative_along_geodesics(d, activation):
    field, x = attention(5.0) + perceptron(4, d, activation, bias=0.5), uniform(5, d, generator=generator())
    slope, matrix, basis = hessian(field, x)
    xi = torch.randn(5 * (d - 1), dtype=torch.float64, generator=generator(1))
    v = (basis @ xi.reshape(5, -1, 1)).squeeze(-1)
    speed = v.norm(dim=-1, keepdim=True)
    e = [5 * field.energy((t * speed).cos() * x + (t * speed).sin() * v / speed).item() for t in (-1e-3, 0, 1e-3)]
    assert (e[2] - e[0]) / 2e-3 == pytest.approx((slope * v).sum().item(), rel=1e-4)
    assert (e[2] - 2 * e[1] + e[0]) / 1e-6 == pytest.approx((xi @ matrix @ xi).item(), rel=1e-4)
    torch.testing.assert_close(slope, field(x), rtol=1e-9, atol=1e-12)  # the gradient of n E is the velocity


class Opaque(Field):
    """A field of a class that the package does not know."""

    def __init__(self, field):
        self.vectors, self.energy = field.vectors, field.energy

    vectors = None


def heads(d, count):
    """Symmetric values, indefinite, and Q^T K = V."""
    draw = torch.randn(count, d, d, dtype=torch.float64, generator=generator(5))
    value = (draw + draw.mT) / 2
    query = torch.randn(count, d, d, dtype=torch.float64, generator=generator(6))
    given = (query, torch.linalg.inv(query.mT) @ value, value)
    return given if count > 1 else tuple(m[0] for m in given)


@pytest.mark.parametrize("d", [2, 3])
@pytest.mark.parametrize("kind", ["softmax", "heads", "one head", "relu", "gelu", "tanh", "identity", "sum"])
def test_the_hessian_written_down_is_that_of_automatic_differentiation(kind, d):
    field = {
        "softmax": lambda: SelfAttention(3.0),
        "heads": lambda: SelfAttention(0.7, *heads(d, 3), heads=3, weighting="unnormalized"),
        "one head": lambda: SelfAttention(torch.tensor(-0.8), *heads(d, 1), weighting="unnormalized"),
        "sum": lambda: -2.0 * (attention(5.0) + perceptron(3, d, "gelu", bias=1.0)) + attention(2.0),
    }.get(kind, lambda: perceptron(4, d, kind, bias=0.5))()
    x = uniform(6, d, generator=generator())
    for found, expected in zip(hessian(field, x), hessian(Opaque(field), x), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("size", [0.15, 1.0])
@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_repelling_particles_do_not_gather_in_one_cluster(activation, size):
    """Descent on the circle, act(0) = 0: at strict second-order points each cluster of diameter 1 / (2 sqrt(beta))
    holds no more than the second derivative allows; with a small perceptron no more than 0.5742."""
    beta, n, seen = 40.0, 24, 0
    for seed in range(3):
        part = perceptron(5, 2, activation, seed, size=size)
        bound = cluster_mass_bound(beta, part, factor=math.exp(-beta), n=n)
        for point in find_critical_points(-(attention(beta) + part), n, 2, starts=2, generator=generator(seed)):
            if not point.stable:
                continue
            heaviest = heaviest_arc(point.x, 0.5 / math.sqrt(beta))
            assert 1 / n < heaviest <= bound + 1e-9
            assert size > 0.15 or heaviest <= single_cluster_bound()
            seen += 1
    assert seen >= 3


def test_the_mass_bound_is_sharp_for_two_atoms():
    """Attention alone, m of n particles in one point, the others where they push hardest, near sqrt(3 / beta): the
    energy's second derivative in the angle of one of the m changes its sign where the bound, with the pull at the
    middle of a cluster for that at its edge, says."""
    beta, n = 400.0, 1000
    assert cluster_mass_bound(1e6) == pytest.approx(
        2 * math.exp(-1.5) / (2 * math.exp(-1.5) + 0.75 * math.exp(-0.125)), rel=1e-4
    )
    assert cluster_mass_bound(beta) < single_cluster_bound()
    s = torch.linspace(0.05, 0.15, 10_001, dtype=torch.float64)
    second = (beta * s.sin() ** 2 - s.cos()) * torch.exp(beta * (s.cos() - 1))
    away, push = s[second.argmax()], second.max().item()
    sharp = push / (push + 1)  # all of the cluster in one point: pull is 1
    for m, sign in ((sharp - 0.01, 1), (sharp + 0.01, -1)):
        heavy = round(m * n)
        x = circle_points(torch.cat([torch.zeros(heavy), away.expand(n - heavy)]).double())
        one = torch.tensor([-1e-3, 0.0, 1e-3], dtype=torch.float64)
        clouds = x.repeat(3, 1, 1)
        clouds[:, 0] = circle_points(one)
        e = n * attention(beta).energy(clouds)
        assert sign * (e[0] - 2 * e[1] + e[2]).item() > 0
    assert sharp < cluster_mass_bound(beta, n=n)
    assert cluster_mass_bound(40.0, perceptron(3, 2, "tanh"), factor=math.exp(-40.0)) > cluster_mass_bound(40.0)


def test_the_heaviest_arc_goes_round_and_counts_its_ends():
    angle = torch.tensor([-0.1, 0.0, 0.1, 1.0, math.pi, -math.pi + 0.1], dtype=torch.float64)
    for n, width in ((1, 0.05), (2, 0.1), (3, 0.2), (4, 1.15), (6, 7.0)):
        for turn in (0.0, 2.5, 3.1):
            assert heaviest_arc(circle_points(angle + turn), width) == n / 6


def test_attracting_particles_may_all_be_in_one_cluster():
    """Ascent of the same energy has no such bound: the Dirac at the potential's maximum is a strict maximum."""
    part = perceptron(5, 2, "tanh", seed=1)
    top, value = potential_maximum(part)
    field, n, beta = attention(40.0) + part, 24, 40.0
    (point,) = find_critical_points(field, x0=top.expand(1, n, 2))
    assert point.stable and point.nullity == 0 and point.atoms().masses.tolist() == [1.0]
    assert point.energy == pytest.approx(1 / (2 * beta) + value / 2, rel=1e-12)


@pytest.mark.parametrize("d", [2, 3])
@pytest.mark.parametrize("activation", ["relu", "gelu", "tanh"])
def test_without_attention_the_maximiser_is_a_dirac_at_the_potentials_maximum(activation, d):
    """The energy is 1/2 mean v: no critical point is above 1/2 max v (by random points); particles that start around
    the maximum all end there, in a strict maximum of that height."""
    field = perceptron(4, d, activation, seed=6, bias=0.4)
    grid = uniform(40_000, d, generator=generator())
    highest = field.potential(grid).max().item()
    top, value = potential_maximum(field)
    assert highest - 1e-12 <= value <= highest + 1e-2 * abs(highest)
    x0 = torch.cat([uniform(5, d, batch=(5,), generator=generator(1)), to_sphere(top + 0.05 * uniform(5, d))[None]])
    found = find_critical_points(field, x0=x0, steps=3000)
    assert all(point.energy <= value / 2 + 1e-12 for point in found)
    (dirac,) = [point for point in found if point.energy >= value / 2 - 1e-9]
    assert dirac.stable and dirac is found[0]
    torch.testing.assert_close(dirac.x, top.expand(5, d), rtol=0, atol=1e-7)


def test_atoms_are_chains():
    angle = torch.tensor([0.0, 0.09, 0.18, 1.0, 1.05, 3.0, 2 * math.pi - 0.05], dtype=torch.float64)
    found = atoms(circle_points(angle), 0.1)
    assert found.masses.tolist() == pytest.approx([4 / 7, 2 / 7, 1 / 7])
    assert found.labels.tolist() == [0, 0, 0, 1, 1, 2, 0]
    middle = torch.atan2(found.positions[:, 1], found.positions[:, 0])
    torch.testing.assert_close(middle, torch.tensor([0.055, 1.025, 3.0], dtype=torch.float64), rtol=0, atol=1e-3)
    assert 0.23 <= found.diameters[0] <= 0.26 and found.diameters[2] < 1e-7
    assert len(atoms(circle_points(angle), 0.04).masses) == 7 and len(atoms(circle_points(angle), 2.0).masses) == 1


def test_atoms_of_many_particles():
    centres = uniform(5, 3, generator=generator())
    x = to_sphere(centres.repeat(4000, 1) + 1e-3 * torch.randn(20_000, 3, dtype=torch.float64, generator=generator()))
    found = atoms(x, 0.05)
    assert found.masses.tolist() == [0.2] * 5
    assert torch.cdist(found.positions, centres).min(-1).values.max() < 1e-3


def test_the_published_threshold():
    assert cluster_threshold(100.0, 3) == pytest.approx(0.1)
    assert cluster_threshold(0.01, 3) == pytest.approx(math.pi / 6)


UNNORMALISED = SelfAttention(1.0, weighting="unnormalized")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: find_critical_points(UNNORMALISED), "n, d: expected both, or x0"),
        (lambda: find_critical_points(UNNORMALISED, 0, 2), "n: expected an integer of at least 1; got 0"),
        (lambda: find_critical_points(UNNORMALISED, 4, 1), "d: expected at least 2"),
        (lambda: find_critical_points(UNNORMALISED, 4, 2, starts=0), "starts: expected an integer of at least 1"),
        (
            lambda: find_critical_points(UNNORMALISED, 4, 2, steps=-1),
            "steps: expected an integer of at least 1; got -1",
        ),
        (
            lambda: find_critical_points(UNNORMALISED, 4, 2, polish=0),
            "polish: expected an integer of at least 1; got 0",
        ),
        (lambda: find_critical_points(UNNORMALISED, 4, 3, x0=uniform(4, 3)[None]), "x0: expected None where"),
        (
            lambda: find_critical_points(SelfAttention(800.0, weighting="unnormalized"), 4, 2),
            "field: expected finite velocities; got SelfAttention",
        ),
        (lambda: find_critical_points(UNNORMALISED, x0=torch.ones(2, 4, 3)), "x0: expected points on the unit sphere"),
        (lambda: find_critical_points(UNNORMALISED, x0=torch.eye(3)), r"x0: expected shape \(starts, n, d\)"),
        (lambda: find_critical_points(UNNORMALISED, 4, 2, tolerance=0.0), "tolerance: expected a number above 0"),
        (lambda: find_critical_points(SelfAttention(1.0, causal=True), 4, 2), "energy: .* causal=True has none"),
        (lambda: find_critical_points(perceptron(2, 2, "gelu_tanh"), 4, 2), "energy: .* 'gelu_tanh' has none"),
        (
            lambda: find_critical_points(SelfAttention(1.0) + perceptron(2, 2, "tanh"), 4, 2),
            "field: expected one that climbs its energy",
        ),
        (lambda: SelfAttention(math.inf), "beta: expected a finite number"),
        (lambda: potential_maximum(perceptron(2, 4, "tanh")), "perceptron: expected one on the circle or on S"),
        (lambda: hessian(UNNORMALISED, torch.ones(3, 2)), "x: expected points on the unit sphere"),
        (lambda: atoms(torch.eye(2), 0.0), "threshold: expected a number above 0"),
        (lambda: cluster_threshold(-1.0, 2), "beta: expected a number above 0"),
        (lambda: cluster_threshold(1.0, 0), "d: expected an integer of at least 1; got 0"),
        (lambda: heaviest_arc(torch.eye(3), 1.0), "x: expected points of the circle, 2 coordinates; got 3"),
        (lambda: heaviest_arc(torch.eye(2), 0.0), "angle: expected a number above 0"),
        (lambda: cluster_mass_bound(0.0), "beta: expected a number above 0"),
        (lambda: cluster_mass_bound(1.0, factor=-1.0), "factor: expected a number above 0"),
        (lambda: cluster_mass_bound(1.0, n=0), "n: expected an integer of at least 1; got 0"),
        (lambda: cluster_mass_bound(1.0, perceptron(2, 3, "tanh")), "perceptron: expected a Perceptron of two"),
        (lambda: cluster_mass_bound(1.0, perceptron(2, 2, "gelu_tanh")), "energy: .* 'gelu_tanh' has none"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
