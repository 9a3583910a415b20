"""Sums over the rows (tokens) of ``(..., features)``: what a matrix product's parameters have as gradients."""

from torch import Tensor

__all__ = ["outer", "sum_rows"]


def outer(a: Tensor, b: Tensor) -> Tensor:
    """``sum over rows of a_i b_i^T``: the gradient of ``W`` in ``y = x W^T`` for ``a = dy``, ``b = x``."""
    return a.reshape(-1, a.shape[-1]).T @ b.reshape(-1, b.shape[-1])


def sum_rows(a: Tensor) -> Tensor:
    """The gradient of the bias."""
    return a.reshape(-1, a.shape[-1]).sum(0)
