"""The order of every scheme: its order conditions, and what it shows on nonlinear fields that do not commute."""

from __future__ import annotations

import math
from functools import cache

from torch import Tensor

from macaron_ops.splitting import CATALOGUE, PROBLEMS, RUNGE_KUTTA, UNSPLIT, Problem, observed_order
from macaron_ops.splitting.convergence import solution
from macaron_ops.splitting.substeps import EXACT

from ..options import Options

TITLE = "Orders, stated and shown"
TEXT = (
    "Each scheme on two nonlinear fields that do not commute (macaron_ops.splitting.problems, flat and sphere): the "
    "least-squares slope of log error against log h. The order is the lower of the scheme's and the substeps', so with "
    "Euler substeps every splitting is of order 1, however high its own order is; only lie_richardson2, an "
    "extrapolation, reaches 2 (as affine_drs4 reaches 3 with midpoint or Heun). A slope is that of "
    "its range of h: where "
    "a scheme's own error is large (Yoshida's) or a substep's cancels in part, the lower order shows only at smaller "
    "steps, and the slope lies above it. leading error: that of order p + 1 by its coefficients; for sums over all "
    "words, so not to be compared with a composition's."
)

SUBSTEPS = (*RUNGE_KUTTA, EXACT)
_FEW = ("lie_trotter_AB", "parallel", "strang_BAB", "lie_richardson2", "ruth3", "yoshida4_BAB", "blanes_moan4_BAB")
_RUNS = {"flat": {"end": 0.5, "steps": (12, 16, 24)}, "sphere": {"end": 0.75, "steps": (8, 12, 16)}}


def run(options: Options) -> dict[str, object]:
    """The whole matrix of schemes and substeps with --full, a selection else."""
    names = [*CATALOGUE] if options.effort == "full" else list(_FEW)
    substeps = SUBSTEPS if options.effort != "quick" else ("euler", EXACT)
    rows = []
    for name in (*names, UNSPLIT):
        scheme = CATALOGUE.get(name)
        row = {"scheme": name, "flat": {substep: _order("flat", name, substep) for substep in substeps}}
        row["sphere"] = _order("sphere", name, EXACT)
        if scheme:
            row |= {
                "order": scheme.order,
                "residual": scheme.residual(),
                "leading_error": scheme.leading_error(),
                "cost": list(scheme.cost()),
                "forward": scheme.is_forward,
                "source": scheme.source,
            }
        rows.append(row)
    return {"substeps": list(substeps), "rows": rows, "runs": {name: dict(run) for name, run in _RUNS.items()}}


def table(data: dict[str, object]) -> list[tuple[str, ...]]:
    head = ("scheme", "order", "A, B", "residual", "leading error", *data["substeps"], "sphere, exact")
    return [head, *(_cells(row, data["substeps"]) for row in data["rows"])]


def _cells(row: dict[str, object], substeps: list[str]) -> tuple[str, ...]:
    shown = [*(row["flat"][substep] for substep in substeps), row["sphere"]]
    told = ("-", "-", "-", "-")
    if "order" in row:
        backwards = "" if row["forward"] else ", backwards"
        told = (
            f"{row['order']}{backwards}",
            ", ".join(map(str, row["cost"])),
            f"{row['residual']:.0e}",
            f"{row['leading_error']:.3g}",
        )
    return (row["scheme"], *told, *("-" if order is None else f"{order:.2f}" for order in shown))


@cache
def _solved(name: str, complex_: bool) -> tuple[Problem, Tensor]:
    problem = PROBLEMS[name](complex_) if complex_ else PROBLEMS[name]()
    return problem, solution(problem, _RUNS[name]["end"])


def _order(problem: str, name: str, substep: str) -> float | None:
    """None where the pair cannot be: no flow of a commutator, of A + B, no complex sphere."""
    scheme = CATALOGUE.get(name)
    complex_ = scheme is not None and not scheme.is_real
    no_flow = scheme is None or scheme.has_commutator
    if (no_flow and substep == EXACT) or (complex_ and problem == "sphere"):
        return None
    given, reference = _solved(problem, complex_)
    order = observed_order(given, name, substep=substep, reference=reference, **_RUNS[problem])
    return None if math.isnan(order) else order
