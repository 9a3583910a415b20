"""A product as it is tuned: random operands, the launcher's call, and its definition, by which a tile is checked.

M, N and K are those that the launcher asks the tables with: an (M, N) result and a sum over K. For the one kernel of
narrow rows N is the width, a power of 2, and K the hidden width; for the gradient of a weight K counts the tokens.
The product "few" keeps its rule: its tile and the parts of its sum go together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from macaron_ops.kernels import ffn_step
from macaron_ops.kernels.device import power_of_2
from macaron_ops.kernels.dropout import HIDDEN_STREAM, OUTPUT_STREAM, Dropout
from macaron_ops.kernels.hidden import hidden_backward, hidden_forward
from macaron_ops.kernels.linear_residual import ROW, Norm, linear_residual
from macaron_ops.kernels.narrow_ffn import NARROW
from macaron_ops.kernels.rows import as_rows
from macaron_ops.kernels.sums import Sum
from macaron_ops.kernels.tiles import operand
from macaron_ops.kernels.weight_gradient import weight_gradient
from macaron_ops.reference.activation import activate, activate_backward
from macaron_ops.reference.dropout import dropout
from macaron_ops.reference.ffn_step import Options, Tensors

from ..correctness import Yardstick
from ..kernel_calls import ACTIVATIONS, DTYPES, GATED, multiplying

__all__ = ["PRODUCTS", "Problem", "Work", "other_uses", "problems"]

_STEP = 0.5


class Problem(NamedTuple):
    product: str
    dtype: str  # of kernel_calls.DTYPES
    M: int
    N: int
    K: int

    @property
    def shape(self) -> tuple[int, int, int]:
        return self[2:]

    @property
    def operand(self) -> str:
        with multiplying(self.dtype) as dtype:
            return operand(dtype)

    def __str__(self) -> str:
        return f"{self.product} {self.dtype} M={self.M} N={self.N} K={self.K}"


class Work(NamedTuple):
    """``run(*inputs)`` is the launcher's call, ``define(*inputs)`` the same in plain PyTorch, in any dtype."""

    inputs: tuple[Tensor, ...]
    run: Callable[..., tuple[Tensor, ...]]
    define: Callable[..., tuple[Tensor, ...]]

    @classmethod
    def of(cls, problem: Problem, device: torch.device, seed: int = 0) -> Work:
        generator = torch.Generator(device=device).manual_seed(seed)

        def draw(*shape: int, fan_in: int = 1) -> Tensor:
            numbers = torch.randn(shape, generator=generator, device=device)
            return (numbers / fan_in**0.5).to(DTYPES[problem.dtype])

        return PRODUCTS[problem.product](draw, *problem.shape)

    def yardstick(self) -> Yardstick:
        """The definition in float64 and in the operands' dtype."""
        exact = self.define(*(t.double() if t.is_floating_point() else t for t in self.inputs))
        return Yardstick.of([f"result {i}" for i in range(len(exact))], exact, self.define(*self.inputs))

    def __call__(self) -> tuple[Tensor, ...]:
        return self.run(*self.inputs)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.inputs)

    def copy(self) -> Work:
        """The same numbers in other memory."""
        return self._replace(inputs=tuple(t.clone() for t in self.inputs))


def _none() -> Dropout:
    return Dropout.of(0.0, None, 0)


def _hidden(draw, M: int, N: int, K: int, activation: str = "gelu") -> Work:
    width = 2 * N if activation == "swiglu" else N
    return Work(
        (draw(M, K), draw(width, K, fan_in=K), draw(width)),
        lambda n, w, b: (hidden_forward(n, w, b, activation, _none(), None, True),),
        lambda n, w, b: (activate(F.linear(n, w, b), activation),),
    )


def _hidden_backward(draw, M: int, N: int, K: int) -> Work:
    def run(g, w, z):
        return hidden_backward(g, w, z, _STEP, "gelu", _none(), need_z=True, need_h=True, bias=Sum(w.dtype))

    def define(g, w, z):
        dz = activate_backward(_STEP * (g @ w), z, "gelu")
        return dz, activate(z, "gelu"), dz.sum(0)

    return Work((draw(M, K), draw(K, N, fan_in=K), draw(M, N)), run, define)


def _linear(draw, M: int, N: int, K: int) -> Work:
    def run(h, w, b, x):
        return (linear_residual(h, w, b, as_rows(x), x.dtype, transposed=True, c=_STEP),)

    inputs = (draw(M, K), draw(N, K, fan_in=K), draw(N), draw(M, N))
    return Work(inputs, run, lambda h, w, b, x: (x + _STEP * F.linear(h, w, b),))


def _linear_norm(draw, M: int, N: int, K: int, p: float = 0.0) -> Work:
    def run(h, w, b, x, weight, bias, seed):
        norm, drop = Norm("layer", weight, bias, 1e-5, None), Dropout.of(p, seed, OUTPUT_STREAM)
        rows = as_rows(x)
        return (linear_residual(h, w, b, rows, x.dtype, transposed=True, c=_STEP, dropout=drop, norm=norm),)

    def define(h, w, b, x, weight, bias, seed):
        total = x + _STEP * dropout(F.linear(h, w, b), p, seed, OUTPUT_STREAM)
        return (F.layer_norm(total, (N,), weight, bias, 1e-5),)

    h = draw(M, K)
    seed = torch.zeros((), dtype=torch.int64, device=h.device)
    return Work((h, draw(N, K, fan_in=K), draw(N), draw(M, N), draw(N), draw(N), seed), run, define)


def _weight(draw, M: int, N: int, K: int) -> Work:
    inputs = (draw(K, M, fan_in=K), draw(K, N))
    return Work(inputs, lambda g, h: (weight_gradient(g, h, _STEP),), lambda g, h: (_STEP * (g.T @ h),))


def _narrow(draw, M: int, N: int, K: int, p: float = 0.0) -> Work:
    options = Options("layer", 1e-5, "gelu", _STEP, 1.0, "pre", p, p, 0)

    def run(x, *tensors):
        return (ffn_step.forward(x, Tensors(*tensors), options, "none")[0],)

    def define(x, w_in, b_in, w_out, b_out, weight, bias, seed):
        n = F.layer_norm(x, (N,), weight, bias, 1e-5)
        h = dropout(F.gelu(F.linear(n, w_in, b_in)), p, seed, HIDDEN_STREAM)
        return (x + _STEP * dropout(F.linear(h, w_out, b_out), p, seed, OUTPUT_STREAM),)

    x, w_in = draw(M, N), draw(K, N, fan_in=N)
    seed = torch.zeros((), dtype=torch.int64, device=x.device)
    return Work((x, w_in, draw(K), draw(N, K, fan_in=K), draw(N), draw(N), draw(N), seed), run, define)


PRODUCTS: dict[str, Callable[..., Work]] = {
    "hidden": _hidden,
    "gated": lambda *arguments: _hidden(*arguments, activation="swiglu"),
    "hidden_backward": _hidden_backward,
    "linear": _linear,
    "linear_norm": _linear_norm,
    "linear_norm_dropout": lambda *arguments: _linear_norm(*arguments, p=0.1),
    "weight": _weight,
    "narrow": _narrow,
    "narrow_dropout": lambda *arguments: _narrow(*arguments, p=0.1),
}


def other_uses(problem: Problem) -> list[Callable[[], object]]:
    """Launchers' calls on meta tensors that take the tile of this problem too, to be compiled: with each activation,
    with dropout and without, with all that a training step writes."""
    M, N, K = problem.shape

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=DTYPES[problem.dtype], device="meta")

    dropouts = _none(), Dropout.of(0.1, torch.empty((), dtype=torch.int64, device="meta"), HIDDEN_STREAM)
    widths = {name: 2 * N if name in GATED else N for name in ACTIVATIONS}
    if problem.product in ("hidden", "gated"):
        return [
            partial(hidden_forward, empty(M, K), empty(width, K), empty(width), name, dropout, empty(M, width), True)
            for dropout in dropouts
            for name, width in widths.items()
            if (name in GATED) == (problem.product == "gated")
        ]
    if problem.product == "hidden_backward":
        needs = {"need_z": True, "need_h": True, "bias": Sum(DTYPES[problem.dtype])}
        return [
            partial(hidden_backward, empty(M, K), empty(K, N), empty(M, width), _STEP, name, dropout, **needs)
            for dropout in dropouts
            for name, width in widths.items()
        ]
    if problem.product == "linear":
        x, dtype = as_rows(empty(M, N)), DTYPES[problem.dtype]
        return [
            partial(
                linear_residual, empty(M, K), empty(N, K), empty(N), x, dtype, transposed=True, dropout=dropouts[1]
            ),
            partial(linear_residual, empty(M, K), empty(K, N), None, None, torch.float32, transposed=False),
        ]
    return []


def problems(
    shapes: Sequence[tuple[int, int, int]], dtypes: Sequence[str], products: Sequence[str]
) -> Iterator[Problem]:
    """The products of FFN steps of (tokens, D, F), each once; tokens rounded up to a power of 2, the shape's class."""
    found = {}
    for tokens, width, hidden in shapes:
        tokens = 1 << (tokens - 1).bit_length()
        for dtype in dtypes:
            narrow = width <= NARROW[DTYPES[dtype].itemsize]
            for product in products:
                for shape in _shapes_of(product, tokens, width, hidden, narrow):
                    found[Problem(product, dtype, *shape)] = None
    return iter(found)


def _shapes_of(product: str, tokens: int, width: int, hidden: int, narrow: bool) -> list[tuple[int, int, int]]:
    """(M, N, K) as the launchers ask for them."""
    if product.startswith("narrow"):
        return [(tokens, max(power_of_2(width), 16), hidden)] if narrow else []
    if product.startswith("linear_norm"):
        return [(tokens, width, hidden)] if not narrow and width <= ROW else []
    if product == "weight":
        return [(width, hidden, tokens), (hidden, width, tokens)]
    if product in ("hidden", "gated") and narrow:
        return []
    return [(tokens, width, hidden) if product == "linear" else (tokens, hidden, width)]
