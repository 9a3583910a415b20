"""Error constants with Euler substeps: is a Macaron step more accurate than a standard one?

The fields are those of many random layers at once: attention of 8 tokens in 4 dimensions and a tanh FFN of 16 units.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from macaron_ops.splitting import UNSPLIT, integrate

from ..options import Options

TITLE = "Error constants: Lie-Trotter, Strang, parallel"
TEXT = (
    "The error at time 1 divided by that of Lie-Trotter with h = 1/16, for random layers; Euler "
    "substeps but for Heun's. "
    "At the same step Strang is up to about twice as accurate. At the same cost Macaron's order BAB "
    "is about even, a coin "
    "flip for random weights: its step evaluates one FFN more, so Lie-Trotter takes 1.5 times as "
    "many steps. ABA halves "
    "attention's own error instead of the FFN's, so which of the two is better depends on whose is "
    "larger. In the paper's "
    "parameter-equal form (two FFNs of half the width) cost and error are both about those of Lie-Trotter. What gains "
    "more at equal cost is a method of order 2: Heun, unsplit, with half as many steps."
)

_STEPS = 16
_DRAWS = {"quick": 60, "normal": 400, "full": 2000}

# (scheme, substep, steps); with as many evaluations of A and B as Lie-Trotter has where the cost is equal.
_CASES = {
    "Strang BAB, equal step": ("strang_BAB", "euler", _STEPS),
    "Strang ABA, equal step": ("strang_ABA", "euler", _STEPS),
    "parallel, equal step and cost": ("parallel", "euler", _STEPS),
    "Strang BAB, equal cost": ("strang_BAB", "euler", 2 * _STEPS // 3),
    "Strang ABA, equal cost": ("strang_ABA", "euler", 2 * _STEPS // 3),
    "half-width FFNs (Macaron), equal step and cost": None,
    "Heun unsplit, equal cost": (UNSPLIT, "heun", _STEPS // 2),
}


def run(options: Options) -> dict[str, object]:
    draws = _DRAWS[options.effort]
    attention, halves, x0 = _layers(draws, options.seed)

    def ffn(x: Tensor) -> Tensor:
        return halves[0](x) + halves[1](x)

    fields = {"A": attention, "B": ffn}
    truth = integrate(fields, x0, 0.0, 1.0, 256, UNSPLIT)

    def error(scheme: str, substep: str, steps: int) -> Tensor:
        return _distance(integrate(fields, x0, 0.0, 1.0, steps, scheme, substep=substep), truth)

    # 2 _STEPS is no multiple of 3: the error of order 1 is brought from the steps taken to those of equal cost.
    standard, ratios = error("lie_trotter_AB", "euler", _STEPS), {}
    for what, case in _CASES.items():
        if case is None:
            found = _distance(_macaron(x0, attention, halves, _STEPS), truth)
        else:
            found = error(*case)
        if what.startswith("Strang") and "cost" in what:
            found = found * case[2] / (2 * _STEPS / 3)
        ratios[what] = _quantiles(found / standard)
    return {"draws": draws, "steps": _STEPS, "lie_trotter": _quantiles(standard), "ratios": ratios}


def table(data: dict[str, object]) -> list[tuple[str, ...]]:
    head = (f"error / Lie-Trotter's, {data['draws']} random layers", "10%", "median", "90%", "better than Lie-Trotter")
    return [
        head,
        *(
            (what, *(f"{found[q]:.2f}" for q in ("10", "50", "90")), f"{100 * found['below_1']:.0f}%")
            for what, found in data["ratios"].items()
        ),
    ]


def _layers(draws: int, seed: int) -> tuple[Callable, tuple[Callable, Callable], Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(draws, *shape, generator=generator, dtype=torch.float64)

    query, key, value, w_in, w_out, x0 = draw(4, 4), draw(4, 4), draw(4, 4), draw(16, 4), draw(4, 16), draw(8, 4)

    def attention(x: Tensor) -> Tensor:
        weights = torch.softmax((x @ query.mT) @ (x @ key.mT).mT / 4, dim=-1)
        return weights @ (x @ value.mT) / 2

    def half(units: slice) -> Callable[[Tensor], Tensor]:
        return lambda x: torch.tanh(x @ w_in[:, units].mT / 2) @ w_out[..., units].mT / 4

    return attention, (half(slice(0, 8)), half(slice(8, 16))), x0


def _macaron(x: Tensor, attention: Callable, halves: tuple[Callable, Callable], steps: int) -> Tensor:
    """Half of the hidden units, attention, the other half: the cost of Lie-Trotter."""
    h = 1 / steps
    for _ in range(steps):
        x = x + h * halves[0](x)
        x = x + h * attention(x)
        x = x + h * halves[1](x)
    return x


def _distance(x: Tensor, truth: Tensor) -> Tensor:
    return (x - truth).flatten(1).norm(dim=1)


def _quantiles(values: Tensor) -> dict[str, float]:
    found = {str(q): values.quantile(q / 100).item() for q in (10, 25, 50, 75, 90)}
    return found | {"below_1": (values < 1).double().mean().item()}
