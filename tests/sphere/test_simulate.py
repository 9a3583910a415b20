"""Claim: `simulate` integrates the field to its scheme's order, measures what passes, stops and adapts as asked, and a
run that was interrupted goes on bit for bit; a file holds a trajectory as it was."""

import math

import pytest
import torch

from macaron_ops.sphere import (
    OBSERVERS,
    Perceptron,
    SelfAttention,
    Trajectory,
    clusters,
    effective_rank,
    inner_products,
    mean_product,
    simulate,
    smallest_product,
)
from macaron_ops.splitting import to_sphere

torch.manual_seed(5)
X = to_sphere(torch.randn(6, 3, dtype=torch.float64))
ATTENTION = SelfAttention(2.0, weighting="unnormalized")
PERCEPTRON = Perceptron(*(torch.randn(*shape, dtype=torch.float64) for shape in ((4, 3), (4,), (4,))), "gelu")
BOTH = ATTENTION + PERCEPTRON
FUNCTIONS = {
    "smallest_product": smallest_product,
    "mean_product": mean_product,
    "effective_rank": effective_rank,
    "histogram": inner_products,
}


def error(scheme, step, **options):
    exact = simulate(BOTH, X, 0.4, 0.002, "rk4").final
    return (simulate(BOTH, X, 0.4, step, scheme, **options).final - exact).norm().item()


@pytest.mark.parametrize(
    ("scheme", "order"),
    [
        ("euler", 1),
        ("midpoint", 2),
        ("heun", 2),
        ("rk4", 4),
        ("lie_trotter_AB", 1),
        ("strang_BAB", 2),
        ("suzuki4_ABA", 4),
    ],
)
def test_every_scheme_has_its_order(scheme, order):
    coarse, fine = error(scheme, 0.04), error(scheme, 0.02)
    assert math.log2(coarse / fine) == pytest.approx(order, abs=0.35)


def test_euler_substeps_are_the_operators_own_steps():
    """Lie-Trotter of Euler substeps is attention's step, then the perceptron's: two calls of operators a step."""
    moved = simulate(BOTH, X, 0.1, 0.1, "lie_trotter_AB", substep="euler").final
    torch.testing.assert_close(moved, PERCEPTRON.step(ATTENTION.step(X, 0.1), 0.1), rtol=0, atol=1e-15)


def test_descent_goes_down_what_ascent_goes_up():
    up, down = (
        simulate(BOTH, X, 1.0, 0.05, "rk4", ascent=ascent, observers=("energy",)).observed["energy"]
        for ascent in (True, False)
    )
    assert (up.diff() > 0).all() and (down.diff() < 0).all() and up[0] == down[0]


def test_adaptive_steps_meet_their_tolerance_with_fewer_where_little_happens():
    path = simulate(BOTH, X, 8.0, 0.5, "rk4", tolerance=1e-9)
    exact = simulate(BOTH, X, 8.0, 0.01, "rk4").final
    assert (path.final - exact).abs().max() < 1e-7
    steps = path.times.diff()
    assert steps.max() > 3 * steps.min() and path.times[-1] == 8.0


def test_it_stops_on_drift():
    path = simulate(ATTENTION, X, 100.0, 0.1, "rk4", stop_drift=1e-6, observers=("drift",))
    assert path.stopped == "drift" and path.times[-1] < 100.0
    assert path.observed["drift"][-1] <= 1e-6 < path.observed["drift"][-2]
    assert path.observed["drift"][0].isnan() and simulate(ATTENTION, X, 1.0, 0.1).stopped == "time"


def test_observers_see_what_the_functions_say():
    x = to_sphere(torch.randn(2, 40, 3, dtype=torch.float64))
    watched = simulate(ATTENTION, x, 1.0, 0.5, observers=tuple(OBSERVERS)).observed
    products = x @ x.mT
    apart = ~torch.eye(40, dtype=torch.bool)
    torch.testing.assert_close(watched["energy"][0], ATTENTION.energy(x))
    torch.testing.assert_close(watched["smallest_product"][0], products.amin((-1, -2)))
    torch.testing.assert_close(watched["mean_product"][0], products[:, apart].mean(-1))
    share = torch.linalg.svdvals(x)
    share = share / share.sum(-1, keepdim=True)
    torch.testing.assert_close(watched["effective_rank"][0], torch.exp(-(share * share.log()).sum(-1)))
    for found, row in zip(watched["histogram"][0], products[:, apart], strict=True):
        torch.testing.assert_close(found, torch.histc(row, found.numel(), -1, 1) / row.numel())
    assert (watched["clusters"][0] == 40).all() and watched["masses"].shape == (3, 2, 16)
    for name in FUNCTIONS:
        torch.testing.assert_close(watched[name][0], FUNCTIONS[name](x))


def test_clusters_are_the_groups_and_their_shares():
    x = torch.eye(3, dtype=torch.float64)[[0, 1, 0, 2, 0, 1]]
    labels, masses = clusters(x)
    assert labels.tolist() == [0, 1, 0, 2, 0, 1]
    assert masses[:4].tolist() == pytest.approx([1 / 2, 1 / 3, 1 / 6, 0])


def test_an_own_observer_and_rare_frames():
    path = simulate(
        BOTH, X, 1.0, 0.1, every=4, keep_points=False, observers={"t": lambda _, seen: torch.tensor(seen.t)}
    )
    assert path.observed["t"].tolist() == pytest.approx([0.0, 0.4, 0.8, 1.0])
    assert path.points.shape == (1, 6, 3) and path.steps == 10


@pytest.mark.parametrize("options", [{}, {"tolerance": 1e-6}, {"normalization": "pre"}], ids=str)
@pytest.mark.parametrize("often", [1, 4])
def test_interrupted_and_gone_on_with_is_the_same_bit_for_bit(often, options, tmp_path):
    """Ctrl-C in the middle of a step; and a process that was killed, whose last checkpoint is older."""
    x = X.float()
    options = {"observers": ("energy", "clusters"), **options}
    whole = simulate(BOTH, x, 2.0, 0.1, "strang_BAB", **options)
    path, calls = tmp_path / "run.npz", 0

    def interrupts(field, seen):
        nonlocal calls
        calls += 1
        if calls == 5:
            raise stop
        return field.energy(seen.points)

    for stop in (KeyboardInterrupt(), SystemExit()):
        path.unlink(missing_ok=True)
        calls = 0
        given = {**options, "observers": {"energy": interrupts, "clusters": OBSERVERS["clusters"]}}
        with pytest.raises(type(stop)):
            simulate(BOTH, x, 2.0, 0.1, "strang_BAB", checkpoint=path, checkpoint_every=often, **given)
        calls = 100
        again = simulate(BOTH, x, 2.0, 0.1, "strang_BAB", checkpoint=path, checkpoint_every=often, **given)
        for name in ("times", "points", "radii"):
            assert getattr(again, name) is getattr(whole, name) or torch.equal(
                getattr(again, name), getattr(whole, name)
            )
        assert all(torch.equal(again.observed[name], whole.observed[name]) for name in whole.observed)
        assert again.steps == whole.steps


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    path = tmp_path / "run.npz"
    simulate(BOTH, X, 0.2, 0.1, checkpoint=path)
    with pytest.raises(ValueError, match="checkpoint: .*step"):
        simulate(BOTH, X, 0.2, 0.05, checkpoint=path)
    with pytest.raises(ValueError, match="checkpoint: .*x0"):
        simulate(BOTH, -X, 0.2, 0.1, checkpoint=path)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_file_holds_the_trajectory(dtype, tmp_path):
    path = simulate(BOTH, to_sphere(X.to(dtype)), 0.3, 0.1, observers=("energy",), normalization="pre", scheme="rk4")
    loaded = Trajectory.load(path.save(tmp_path / "run"))
    assert torch.equal(loaded.points, path.points) and loaded.points.dtype == path.points.dtype
    assert torch.equal(loaded.radii, path.radii) and torch.equal(loaded.observed["energy"], path.observed["energy"])
    assert loaded.meta == path.meta and loaded.meta["step"] == 0.1 and loaded.steps == 3
    (tmp_path / "other.npz").write_bytes(b"no such file")
    with pytest.raises(ValueError, match="expected an npz that macaron_ops.sphere wrote"):
        Trajectory.load(tmp_path / "other.npz")


def test_the_way_is_differentiable():
    x = X.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: simulate(BOTH, to_sphere(x), 0.2, 0.1, "strang_BAB").final, (x,))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x0": 2 * X}, "x0: expected points on the unit sphere; the length of one is off by 1"),
        ({"x0": X[:0]}, r"x0: expected shape \(..., n, d\) with n and d of at least 1"),
        ({"step": 0.0}, "step: expected a number above 0; got 0"),
        ({"step": -1.0}, "step: expected a number above 0; got -1"),
        ({"t": math.inf}, "t: expected a finite number"),
        ({"scheme": "leapfrog"}, "scheme: expected a Runge-Kutta method .* or a splitting scheme"),
        ({"field": ATTENTION, "scheme": "strang_BAB"}, r"scheme: 'strang_BAB' splits .* a perceptron \(B\) is missing"),
        ({"observers": ("speed",)}, "observers: expected one of"),
        (
            {"field": SelfAttention(1.0, causal=True), "observers": ("energy",)},
            "energy: SelfAttention with causal=True",
        ),
        ({"every": 0}, "every: expected an integer of at least 1"),
        ({"tolerance": 0.0}, "tolerance: expected a number above 0"),
        ({"normalization": "layer"}, "normalization: expected one of 'post'"),
        ({"scheme": "rk4", "direction": "ambient"}, "direction: expected 'tangent' but for"),
    ],
)
def test_wrong_input_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        simulate(**{"field": BOTH, "x0": X, "t": 1.0, "step": 0.1, **change})


@pytest.mark.parametrize("beta", [math.nan, math.inf])
def test_a_beta_that_is_no_number_is_refused(beta):
    with pytest.raises(ValueError, match="beta: expected a finite number"):
        SelfAttention(beta)
