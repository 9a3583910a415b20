"""Error against work: evaluations of attention and FFN, and measured time."""

from __future__ import annotations

from macaron_ops.splitting import PROBLEMS, UNSPLIT, work_precision
from macaron_ops.splitting.convergence import solution

from ..options import Options

TITLE = "Work and precision"
TEXT = (
    "A small Transformer layer's fields (attention of 8 tokens, a tanh FFN, random weights) in float64, without exact "
    "flows. Work is evaluations of A plus evaluations of B, and the time that they took here. The unsplit Runge-Kutta "
    "methods (dashed) are the baseline that a splitting has to beat; where both fields can be "
    "evaluated together and no "
    "flow is known exactly they are hard to beat. Splitting pays where substeps are exact, cheap, or fused."
)

PAIRS = (
    ("lie_trotter_AB", "euler"),
    ("strang_BAB", "euler"),
    (UNSPLIT, "euler"),
    ("lie_richardson2", "euler"),
    ("strang_BAB", "midpoint"),
    (UNSPLIT, "heun"),
    ("yoshida4_BAB", "rk4"),
    ("blanes_moan4_BAB", "rk4"),
    ("richardson_strang4", "rk4"),
    (UNSPLIT, "rk4"),
)
_END = 1.0
_STEPS = (4, 8, 16, 32)


def run(options: Options) -> dict[str, object]:
    problem = PROBLEMS["layer"](options.seed)
    repeats = {"quick": 1, "normal": 3, "full": 7}[options.effort]
    results = work_precision(problem, PAIRS, end=_END, steps=_STEPS, reference=solution(problem, _END), repeats=repeats)
    return {
        "end": _END,
        "curves": [
            {
                "scheme": result.scheme,
                "substep": result.substep,
                "order": result.order,
                "steps": list(result.steps),
                "errors": list(result.errors),
                "evaluations": [sum(cost) for cost in result.costs],
                "seconds": list(result.seconds),
            }
            for result in results
        ],
    }


def table(data: dict[str, object]) -> list[tuple[str, ...]]:
    head = (
        "scheme",
        "substep",
        "order shown",
        *(f"error, {n} steps" for n in _STEPS),
        f"evaluations, {_STEPS[0]} steps",
    )
    return [
        head,
        *(
            (
                curve["scheme"],
                curve["substep"],
                f"{curve['order']:.2f}",
                *(f"{error:.1e}" for error in curve["errors"]),
                str(curve["evaluations"][0]),
            )
            for curve in data["curves"]
        ),
    ]
