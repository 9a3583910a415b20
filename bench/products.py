"""The bare matrix products of a layer or operator: no norm, bias, activation, softmax or residual sum, no allocation.

What a perfect fusion would leave. Each forward product Y = X W^T (F.linear's layout) has two in the backward,
dX = dY W and dW = dY^T X; attention's two products of each head have four.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .group import PRODUCTS, Ready, Variant

Shape = tuple[int, int, int, int]  # (count, m, k, n): count products (m, k) x (k, n)


def linear_shape(tokens: int, fan_in: int, fan_out: int) -> Shape:
    return (1, tokens, fan_in, fan_out)


def attention_shapes(batch: int, heads: int, length: int, head_dim: int) -> list[Shape]:
    """Q K^T and P V."""
    return [(batch * heads, length, head_dim, length), (batch * heads, length, length, head_dim)]


def layer_shapes(batch: int, length: int, width: int, hidden: int, heads: int) -> list[Shape]:
    tokens = batch * length
    projections = [linear_shape(tokens, width, 3 * width), linear_shape(tokens, width, width)]
    ffn = [linear_shape(tokens, width, hidden), linear_shape(tokens, hidden, width)]
    return projections + attention_shapes(batch, heads, length, width // heads) + ffn


def variant(
    shapes: Sequence[Shape], direction: str, dtype: torch.dtype, device: torch.device, turns: int = 1
) -> Variant:
    """At their best: the operands stay where the last call left them, in the cache if they fit. `turns` as in Ready."""

    def prepare() -> Ready:
        generator = torch.Generator(device=device).manual_seed(0)
        products = [product for shape in shapes for product in _operands(shape, direction, dtype, generator)]

        def call() -> list[Tensor]:
            with torch.no_grad():
                return [torch.bmm(a, b, out=out) for a, b, out in products]

        return Ready(call, turns=turns)

    return Variant(PRODUCTS, prepare, measures_memory=False)


def _operands(
    shape: Shape, direction: str, dtype: torch.dtype, generator: torch.Generator
) -> list[tuple[Tensor, Tensor, Tensor]]:
    count, m, k, n = shape
    device = generator.device
    sizes = ((m, k), (n, k), (m, n))
    x, w, y = (torch.randn(count, *size, generator=generator, device=device).to(dtype) for size in sizes)
    pairs = [(x, w.mT)]
    if direction == "forward+backward":
        pairs += [(y, w), (y.mT, x)]
    return [(a, b, torch.empty(count, a.shape[1], b.shape[2], device=device, dtype=dtype)) for a, b in pairs]
