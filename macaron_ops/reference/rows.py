"""Sums over the rows (tokens) of ``(..., features)``: what a matrix product's parameters have as gradients."""

from torch import Tensor

__all__ = ["outer", "sum_rows"]


def outer(a: Tensor, b: Tensor) -> Tensor:
    """``sum over rows of a_i b_i^T``: the gradient of ``W`` in ``y = x W^T`` for ``a = dy``, ``b = x``."""
    return _rows(a).T @ _rows(b)


def sum_rows(a: Tensor) -> Tensor:
    """The gradient of the bias."""
    return _rows(a).sum(0)


def _rows(a: Tensor) -> Tensor:
    """``(rows, features)``; both are counted, because either may be 0."""
    return a.reshape(a.shape[:-1].numel(), a.shape[-1])
