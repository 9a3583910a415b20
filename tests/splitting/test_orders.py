"""Claim: every scheme shows the order that it states on nonlinear fields that do not commute, in space (within 0.1) and
on the sphere (0.15), if its substeps are as accurate and its fields tangent; else it does not, and this is seen."""

import math
from functools import cache

import pytest

from macaron_ops.splitting import (
    CATALOGUE,
    PROBLEMS,
    Operator,
    Problem,
    Splitting,
    fitted_order,
    observed_order,
    work_precision,
)
from macaron_ops.splitting.convergence import solution

REAL = [name for name, scheme in CATALOGUE.items() if scheme.is_real]

# Steps small enough for the slope to settle, and large enough for order 6 to stay above rounding.
RUNS = {
    "flat": {"end": 0.5, "steps": (12, 16, 24)},
    "sphere": {"end": 0.75, "steps": (8, 12, 16)},
    "layer": {"end": 0.75, "steps": (24, 32, 48)},
    "layer on the sphere": {"end": 0.75, "steps": (24, 32, 48)},
}


@cache
def solved(name, *arguments):
    problem = PROBLEMS[name](*arguments)
    return problem, solution(problem, RUNS[name]["end"])


def order(name, scheme, substep, *arguments):
    problem, reference = solved(name, *arguments)
    return observed_order(problem, scheme, substep=substep, reference=reference, **RUNS[name])


def best(scheme):
    """Exact, where all stages have flows; Chin's commutator has none, and order 4 is enough for it."""
    return "rk4" if CATALOGUE[scheme].has_commutator else "exact"


@pytest.mark.parametrize("scheme", CATALOGUE)
def test_in_space(scheme):
    stated = CATALOGUE[scheme].order
    assert abs(order("flat", scheme, best(scheme), not CATALOGUE[scheme].is_real) - stated) < 0.1


@pytest.mark.parametrize("scheme", REAL)
def test_on_the_sphere(scheme):
    assert abs(order("sphere", scheme, best(scheme)) - CATALOGUE[scheme].order) < 0.15


def test_a_wrong_table_shows_a_lower_order():
    stages = list(CATALOGUE["blanes_moan4_ABA"].stages)
    stages[1], stages[3] = ("B", stages[1][1] + 0.01), ("B", stages[3][1] - 0.01)
    assert order("flat", Splitting("wrong", 4, stages, "this test"), "exact") < 1.5


@pytest.mark.parametrize("scheme", ["strang_BAB", "yoshida4_ABA"])
def test_on_the_sphere_without_the_tangent_projection(scheme):
    """Fields that lean out of the sphere, normalised after each exact substep: order 1 whatever the scheme."""
    problem, _ = solved("sphere")
    turn, near = problem.operators["A"], Operator(lambda x: 1.0 + 0 * x, lambda x, s: x + s)
    leaning = Problem({"A": turn, "B": near}, problem.x0, "sphere")
    kept = Problem({"A": turn, "B": Operator(lambda x: 1 - x.sum(-1, keepdim=True) * x)}, problem.x0, "sphere")
    run = {"end": 0.75, "steps": (24, 32, 48), "reference": solution(kept, 0.75)}
    assert abs(observed_order(leaning, scheme, **run) - 1) < 0.15
    assert abs(observed_order(kept, scheme, substep="rk4", **run) - CATALOGUE[scheme].order) < 0.15


@pytest.mark.parametrize("name", ["layer", "layer on the sphere"])
@pytest.mark.parametrize(
    ("scheme", "substep", "expected"),
    [
        ("strang_BAB", "euler", 1),
        ("blanes_moan4_BAB", "euler", 1),
        ("lie_richardson2", "euler", 2),
        ("strang_BAB", "midpoint", 2),
        ("strang_BAB", "heun", 2),
        ("strang_ABA", "rk4", 2),
        ("blanes_moan4_BAB", "midpoint", 2),
        ("blanes_moan4_BAB", "rk4", 4),
        ("lie_trotter_AB", "rk4", 1),
        ("unsplit", "euler", 1),
        ("unsplit", "heun", 2),
        ("unsplit", "rk4", 4),
    ],
)
def test_the_weaker_of_scheme_and_substep(name, scheme, substep, expected):
    """Of attention and a perceptron. With Euler substeps every scheme but Lie-Richardson has order 1."""
    assert abs(order(name, scheme, substep) - expected) < 0.15


def test_work_is_counted():
    problem, reference = solved("flat")
    found = work_precision(
        problem,
        [("strang_BAB", "exact"), ("strang_BAB", {"A": "heun", "B": "rk4"}), ("unsplit", "rk4")],
        end=RUNS["flat"]["end"],
        reference=reference,
        steps=(4, 8),
        merge=True,
        repeats=1,
    )
    assert [result.substep for result in found] == ["exact", "A heun, B rk4", "rk4"]
    assert [result.costs for result in found] == [((4, 5), (8, 9)), ((8, 20), (16, 36)), ((16, 16), (32, 32))]
    assert all(result.errors[0] > result.errors[1] > 0 and min(result.seconds) > 0 for result in found)


def test_errors_at_the_rounding_floor_are_left_out():
    hs = [0.1, 0.05, 0.025, 0.0125]
    assert fitted_order(hs, [1e-2, 1e-2 / 16, 3e-14, 5e-14], floor=1e-13) == pytest.approx(4)
    assert math.isnan(fitted_order(hs, [1e-2, 3e-14, 3e-14, 3e-14], floor=1e-13))
