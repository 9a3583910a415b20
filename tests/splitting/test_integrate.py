"""Claim: ``integrate`` runs a scheme's substeps as its table says: exactly or by Runge-Kutta, flat and on the sphere,
forwards and backwards in time, batched, differentiable, with time-dependent fields."""

import math

import pytest
import torch

from macaron_ops.splitting import (
    CATALOGUE,
    PROBLEMS,
    RUNGE_KUTTA,
    AffineSplitting,
    Operator,
    bracket,
    find,
    fitted_order,
    integrate,
    tangent,
    to_sphere,
)

FLAT = PROBLEMS["flat"]()
H = 0.1


@pytest.mark.parametrize("name", [name for name, scheme in CATALOGUE.items() if not scheme.has_commutator])
def test_one_step_is_the_table(name):
    scheme, problem = CATALOGUE[name], PROBLEMS["flat"](not CATALOGUE[name].is_real)
    total = 0
    for weight, stages in scheme.weighted:
        x = problem.x0
        for operator, c in stages:
            x = problem.operators[operator].flow(x, c * H)
        total = total + weight * x
    y = integrate(problem.operators, problem.x0, 1.0, 1.0 + H, 1, scheme, substep="exact")
    torch.testing.assert_close(y, total, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("problem", ["flat", "sphere"])
@pytest.mark.parametrize("operator", ["A", "B"])
def test_the_flows_of_the_problems_are_flows_of_their_fields(problem, operator):
    given, x, _ = PROBLEMS[problem]()
    one = given[operator]
    still = {"A": one, "B": lambda x: torch.zeros_like(x)}
    torch.testing.assert_close(integrate(still, x, 0.0, 0.3, 100, "unsplit"), one.flow(x, 0.3), rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", RUNGE_KUTTA)
def test_runge_kutta_methods_have_their_order(name):
    x0, end = torch.tensor([0.3, 1.2], dtype=torch.float64), math.exp(math.sin(1.0))
    fields = {"A": Operator(lambda t, x: math.cos(t) * x, timed=True), "B": torch.zeros_like}
    steps = (20, 40, 80)
    errors = [
        (integrate(fields, x0, 0.0, 1.0, n, "unsplit", substep=name) - end * x0).abs().max().item() for n in steps
    ]
    assert abs(fitted_order([1 / n for n in steps], errors) - RUNGE_KUTTA[name].order) < 0.1


@pytest.mark.parametrize("name", ["strang_BAB", "blanes_moan4_BAB"])
def test_each_operator_has_its_own_clock(name):
    """Fields that depend on time keep the order of the scheme."""
    q, x0 = FLAT.operators["B"], FLAT.x0
    operators = {
        "A": Operator(lambda t, x: t * FLAT.operators["A"].field(x), timed=True),
        "B": Operator(lambda t, x: math.cos(3 * t) * q.field(x), timed=True),
    }
    reference = integrate(operators, x0, 0.5, 1.5, 512, "unsplit")
    steps = (12, 24, 48)
    errors = [(integrate(operators, x0, 0.5, 1.5, n, name) - reference).abs().max().item() for n in steps]
    assert abs(fitted_order([1 / n for n in steps], errors) - find(name).order) < 0.1


@pytest.mark.parametrize("name", [name for name, s in CATALOGUE.items() if getattr(s, "is_symmetric", False)])
def test_a_symmetric_scheme_runs_back(name):
    scheme = CATALOGUE[name]
    if scheme.has_commutator:
        pytest.skip("its commutator stage has no exact flow")
    operators, x0, _ = PROBLEMS["flat"](not scheme.is_real)
    there = integrate(operators, x0, 0.0, 0.4, 2, name, substep="exact")
    torch.testing.assert_close(integrate(operators, there, 0.4, 0.0, 2, name, substep="exact"), x0)
    assert not torch.equal(there, x0)


def test_the_adjoint_undoes_the_scheme():
    scheme = find("ruth3")
    there = integrate(FLAT.operators, FLAT.x0, 0.0, 0.4, 2, scheme, substep="exact")
    back = integrate(FLAT.operators, there, 0.4, 0.0, 2, scheme.adjoint(), substep="exact")
    torch.testing.assert_close(back, FLAT.x0)
    again = integrate(FLAT.operators, there, 0.4, 0.0, 2, scheme, substep="exact")
    assert (again - FLAT.x0).abs().max() > 1e-4


def test_merging_is_exact_for_exact_flows_only():
    run = [
        [integrate(FLAT.operators, FLAT.x0, 0.0, 1.0, 4, "strang_BAB", substep=s, merge=m) for m in (False, True)]
        for s in ("exact", "euler")
    ]
    torch.testing.assert_close(*run[0], rtol=1e-13, atol=1e-13)
    assert (run[1][0] - run[1][1]).abs().max() > 1e-3


def test_unsplit_euler_is_the_parallel_scheme_with_euler_substeps():
    results = [integrate(FLAT.operators, FLAT.x0, 0.0, 1.0, 4, s, substep="euler") for s in ("unsplit", "parallel")]
    torch.testing.assert_close(*results)


def test_a_substep_for_each_operator():
    one = integrate(FLAT.operators, FLAT.x0, 0.0, H, 1, "lie_trotter_AB", substep={"A": "exact", "B": "euler"})
    x = FLAT.operators["A"].flow(FLAT.x0, H)
    torch.testing.assert_close(one, x + H * FLAT.operators["B"].field(x))


def test_trajectory_and_batch():
    x0 = torch.stack([FLAT.x0, 2 * FLAT.x0])
    path = integrate(FLAT.operators, x0, 0.0, 1.0, 3, "strang_ABA", substep="exact", trajectory=True)
    assert path.shape == (4, *x0.shape)
    assert torch.equal(path[0], x0)
    for i, start in enumerate(x0):
        torch.testing.assert_close(
            integrate(FLAT.operators, start, 0.0, 1.0, 3, "strang_ABA", substep="exact"), path[-1, i]
        )
        torch.testing.assert_close(
            integrate(FLAT.operators, start, 0.0, 2 / 3, 2, "strang_ABA", substep="exact"), path[2, i]
        )


def test_gradients():
    def run(x0, weight, end):
        return integrate({"A": lambda x: torch.tanh(x @ weight), "B": lambda x: -x}, x0, 0.0, end, 2, "sws").sum()

    draws = [torch.randn(3, 2, dtype=torch.float64), torch.randn(2, 2, dtype=torch.float64), torch.tensor(0.7).double()]
    assert torch.autograd.gradcheck(run, [draw.requires_grad_() for draw in draws])


def test_the_sphere_is_not_left():
    problem = PROBLEMS["layer on the sphere"]()
    for name in ("strang_BAB", "sws", "richardson_strang4"):
        x = integrate(problem.operators, problem.x0, 0.0, 1.0, 3, name, substep="euler", retraction="sphere")
        torch.testing.assert_close(x.norm(dim=-1), torch.ones(8, dtype=torch.float64))
    x = 3 * problem.x0
    assert (tangent(lambda x: x + 1)(x) * x).sum(-1).abs().max() < 1e-14


def test_a_retraction_of_ones_own():
    x0 = torch.randn(2, 3)
    still = {"A": torch.zeros_like, "B": torch.zeros_like}
    assert torch.equal(integrate(still, x0, 0.0, 1.0, 1, "lie_trotter_AB", retraction=lambda x: x / 2), x0 / 4)
    torch.testing.assert_close(integrate(still, x0, 0.0, 1.0, 1, retraction="sphere"), to_sphere(x0))


def test_bracket():
    """Of linear fields it is that of their matrices: [Ax, Bx] = (BA - AB) x."""
    a, b, x = torch.randn(3, 3, 3, dtype=torch.float64)
    found = bracket(lambda x: x @ a.mT, lambda x: x @ b.mT)(x)
    torch.testing.assert_close(found, x @ (b @ a - a @ b).mT)


def test_a_sum_begins_anew_in_each_term():
    mean = AffineSplitting("mean", 1, ((0.5, (("A", 1.0), ("B", 1.0))), (0.5, (("A", 1.0), ("B", 1.0)))), "none")
    both = [integrate(FLAT.operators, FLAT.x0, 0.0, H, 1, s, substep="exact") for s in (mean, "lie_trotter_AB")]
    torch.testing.assert_close(*both)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scheme": "strang"}, "scheme: expected one of .*Did you mean 'strang_"),
        ({"steps": 0}, "steps: expected an integer of at least 1; got 0"),
        ({"substep": "rk5"}, "substep of A: expected one of 'euler', .*; got 'rk5'. Did you mean 'rk4'"),
        ({"substep": {"A": "euler"}}, r"substep: expected one for 'A' and one for 'B'; got \['A'\]"),
        ({"scheme": "unsplit", "substep": "exact"}, "substep: expected one of 'euler'"),
        ({"operators": {"A": torch.sin}}, r"operators: expected a mapping of 'A' and 'B'; got \['A'\]"),
        ({"operators": {"A": torch.sin, "B": torch.sin}, "substep": "exact"}, r"operators\['A'\]: .* with a flow"),
        ({"operators": {"A": Operator(flow=torch.add), "B": torch.sin}}, r"operators\['A'\]: .* with a field"),
        ({"retraction": "spere"}, "retraction: expected one of 'sphere'; got 'spere'. Did you mean 'sphere'"),
        ({"scheme": "complex3_strang2"}, "x0: expected a complex tensor .* got torch.float64"),
        ({"merge": True, "trajectory": True}, "merge: expected False with trajectory=True"),
        ({"scheme": "chin4A", "substep": "exact"}, "substep: expected Runge-Kutta methods"),
    ],
)
def test_refusals(arguments, message):
    call = {"operators": FLAT.operators, "x0": FLAT.x0, "t0": 0.0, "t1": 1.0, "steps": 1, **arguments}
    with pytest.raises(ValueError, match=message):
        integrate(**call)


def test_types():
    with pytest.raises(TypeError, match="x0: expected a tensor; got float"):
        integrate(FLAT.operators, 1.0, 0.0, 1.0, 1)
    with pytest.raises(TypeError, match=r"operators\['A'\]: expected a function of x or an Operator; got 3"):
        integrate({"A": 3, "B": 4}, FLAT.x0, 0.0, 1.0, 1)
