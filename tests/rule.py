"""The tolerance rule: err(op) <= 2 err(eager in the same dtype) + one ulp of the output, both against float64."""

import torch
from torch import Tensor

__all__ = ["assert_by_rule"]


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
