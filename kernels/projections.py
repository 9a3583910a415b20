"""From tokens to queries, keys and values, and back: one product for each weight, its heads side by side.

    packed weights        q, k and v in one matrix (rows, W + 2 V)              W = H head_dim, V = Hkv head_dim
    packed, a context     q (rows, W) of x; k and v (rows, 2 V) of the context
    three weights         a matrix each

so that v is the last columns of the last matrix, and q and k lie side by side in the first or begin the first two.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .linear_residual import linear_residual
from .norm_rows import normalize_rows_backward
from .rows import Rows, as_rows
from .sums import Later, Sum
from .weight_gradient import weight_gradient

__all__ = ["Projection", "Wants", "back_to_source", "parameter_gradients", "projections", "queries_and_keys"]


class Wants(NamedTuple):
    """Which gradients a product's are needed for."""

    source: bool
    weight: bool
    bias: bool


class Projection(NamedTuple):
    """One product."""

    name: str  # of its parameters, after "w_" and "b_"
    of_x: bool  # from N(x), else from the context
    weight: Tensor
    bias: Tensor | None

    def wants(self, need, need_n: bool) -> Wants:
        source = need_n if self.of_x else need.context
        return Wants(source, getattr(need, f"w_{self.name}"), getattr(need, f"b_{self.name}"))


def projections(t, o) -> list[Projection]:
    """The products of a call, in the order of q, k and v."""
    of_x = t.context is None
    if t.w_k is not None:
        k, v = Projection("k", of_x, t.w_k, t.b_k), Projection("v", of_x, t.w_v, t.b_v)
        return [Projection("q", True, t.w_q, t.b_q), k, v]
    if of_x:
        return [Projection("q", True, t.w_q, t.b_q)]
    width = t.w_out.shape[1]
    b_q, b_kv = (None, None) if t.b_q is None else (t.b_q[:width], t.b_q[width:])
    return [Projection("q", True, t.w_q[:width], b_q), Projection("q", False, t.w_q[width:], b_kv)]


def queries_and_keys(matrices: list[Tensor | None], width: int, kv_width: int) -> list[Tensor | None]:
    """The columns of q and k: one matrix where they lie side by side, else two."""
    if len(matrices) == 1:
        return [None if matrices[0] is None else matrices[0][:, : width + kv_width]]
    return [matrices[0], None if matrices[1] is None else matrices[1][:, :kv_width]]


def back_to_source(
    terms: list[tuple[Tensor, Tensor]], dtype: torch.dtype, residual: Rows | None, a: float
) -> Tensor | None:
    """``a residual`` plus the sum of ``gradient weight``, rounded once; None without terms."""
    out = None
    for i, (gradient, weight) in enumerate(terms):
        last = i == len(terms) - 1
        out = linear_residual(
            gradient, weight, None, residual, dtype if last else torch.float32, transposed=False, a=a
        )  # fmt: skip
        residual, a = as_rows(out), 1.0
    return out


def parameter_gradients(
    products: list[Projection],
    wants: list[Wants],
    gradients: list[Tensor | None],
    sources: list[Tensor | None],
    sums: list[Tensor | None],
    later: Later,
) -> dict[str, Tensor]:
    """By name, from those of the products, what these were formed from, and the sums over the tokens that are there
    already."""
    parts: dict[str, list[Tensor]] = {}
    for product, want, gradient, source, total in zip(products, wants, gradients, sources, sums, strict=True):
        if want.weight:
            parts.setdefault(f"w_{product.name}", []).append(weight_gradient(gradient, source, later=later))
        if want.bias:
            parts.setdefault(f"b_{product.name}", []).append(
                _sum_rows(gradient, product.bias.dtype, later) if total is None else total
            )
    if any(len(found) > 1 for found in parts.values()):
        later.end()  # before torch reads them
    return {name: found[0] if len(found) == 1 else torch.cat(found) for name, found in parts.items()}


def _sum_rows(gradient: Tensor, dtype: torch.dtype, later: Later) -> Tensor:
    rows = as_rows(gradient)
    return normalize_rows_backward(rows, rows, None, None, 0.0, sums=(None, None, Sum(dtype)), later=later)[2][2]
