"""The tolerance rule: err(op) <= 2 err(eager in the same dtype) + one ulp of the output, both against float64."""

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["assert_by_rule", "assert_draws_by_rule"]


def assert_by_rule(name: str, actual: Tensor, eager: Tensor, exact: Tensor) -> None:
    """Largest errors over the tensor; the ulp is that of the largest exact element in the dtype of ``actual``."""
    assert actual.shape == exact.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    if exact.numel() == 0:
        return
    assert exact.dtype == torch.float64
    err_actual = (actual.double() - exact).abs().max()
    err_eager = (eager.double() - exact).abs().max()
    assert err_eager.isfinite(), f"{name}: eager is not finite here, so that the rule would pass anything"
    ulp = exact.abs().max() * torch.finfo(actual.dtype).eps
    assert err_actual <= 2 * err_eager + ulp, f"{name}: error {err_actual:.3g}, eager's {err_eager:.3g}, ulp {ulp:.3g}"


def assert_draws_by_rule(draw: Callable[[int], dict[str, tuple[Tensor, Tensor, Tensor]]]) -> None:
    """The rule over ``draw(0), draw(1), ...``, each ``{name: (actual, eager, exact)}``.

    The errors of a few numbers are a matter of luck in one draw: draws are added while the rule fails. A number that is
    wrong stays the largest error, however many are added.
    """
    draws = []
    for count in (3, 12, 48, 192):
        draws += [draw(seed) for seed in range(len(draws), count)]
        try:
            for name in draws[0]:
                assert_by_rule(name, *(torch.stack([d[name][i] for d in draws]) for i in range(3)))
            return
        except AssertionError as error:
            failure = error
    raise failure
