"""Argument checks: every refusal names the argument, what was expected and what came, before anything runs."""

import math
import reprlib
from collections.abc import Callable, Sequence
from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor

from .autocast import autocast_dtype

__all__ = ["Derived", "Operands", "choice", "number", "positive_int", "probability"]

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}, {value.dtype} on {value.device}"
    return f"{reprlib.repr(value)} ({type(value).__name__})"


def choice(name: str, value: object, choices: Sequence[object]) -> None:
    """``value`` is one of ``choices``, which are names or None."""
    if not (value is None or isinstance(value, str)) or value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}; got {reprlib.repr(value)}")


def number(name: str, value: object, *, minimum: float | None = None) -> float:
    """A finite real number, at least ``minimum``; returned as float."""
    # The type is asked first because isinstance with an abstract class takes most of a microsecond.
    if type(value) is not float and (isinstance(value, bool) or not isinstance(value, Real)):
        raise TypeError(f"{name}: expected a number; got {_describe(value)}")
    if not -math.inf < value < math.inf or (minimum is not None and value < minimum):
        bound = "" if minimum is None else f" of at least {minimum}"
        raise ValueError(f"{name}: expected a finite number{bound}; got {value}")
    return float(value) + 0.0  # -0.0 is 0.0, which it equals


def probability(name: str, value: object) -> float:
    """A number in [0, 1]."""
    value = number(name, value)
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name}: expected a probability between 0 and 1; got {value}")
    return value


def positive_int(name: str, value: object) -> int:
    """An integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an integer; got {_describe(value)}")
    if value < 1:
        raise ValueError(f"{name}: expected an integer of at least 1; got {value}")
    return value


class Derived(NamedTuple):
    """A tensor that the checks made of an argument, or looked into, and how to do it again."""

    source: Tensor
    result: Tensor
    how: Callable[[Tensor], Tensor]


class Operands:
    """The tensor arguments of one call, checked against ``x``.

    Outside autocast all have the dtype of x. Under autocast the operands of matrix products other than x are cast as
    ``F.linear`` casts them, everything else to the dtype of x: a float32 residual stream stays float32, and is rounded
    only where it enters a product, as in an eager layer.

    Attributes:
        x: the input ``(..., T, D)``. width: D. derived: what was made of the arguments.
    """

    def __init__(self, x: object, *, min_dim: int):
        if not isinstance(x, Tensor):
            raise TypeError(f"x: expected a tensor; got {_describe(x)}")
        if x.dim() < min_dim:
            shape = "(..., T, D)" if min_dim == 2 else "(..., D)"
            raise ValueError(f"x: expected shape {shape}; got {tuple(x.shape)}")
        if x.dtype not in DTYPES:
            raise TypeError(f"x: expected float64, float32, bfloat16 or float16; got {x.dtype}")
        if x.is_nested or x.layout != torch.strided:
            raise TypeError(f"x: expected a dense strided tensor; got layout {x.layout}, nested={x.is_nested}")
        if x.shape[-1] == 0:
            raise ValueError(f"x: expected at least one channel; got shape {tuple(x.shape)}")
        self._autocast = autocast_dtype(x)
        self.x, self.width = x, x.shape[-1]
        self.derived: list[Derived] = []

    def derive(self, value: Tensor, how: Callable[[Tensor], Tensor]) -> Tensor:
        """``how(value)``, which is done again in every call."""
        result = how(value)
        self.derived.append(Derived(value, result, how))
        return result

    def tensor(self, name: str, value: object, *shape: int | str, optional: bool = False) -> Tensor | None:
        """A tensor of ``shape`` (numbers are exact, names stand for any size) in the dtype and on the device of x."""
        return self._checked(name, value, shape, optional, self.x.dtype)

    def operand(self, name: str, value: object, *shape: int | str, optional: bool = False) -> Tensor | None:
        """The same for an operand of a matrix product."""
        return self._checked(name, value, shape, optional, self._autocast or self.x.dtype)

    def scale(self, name: str, value: object, *shape: int | str, optional: bool = False) -> Tensor | None:
        """The same for a parameter that multiplies or is added: it may also be float32 beside a narrower x."""
        return self._checked(name, value, shape, optional, self._of_scale(value))

    def _of_scale(self, value: object) -> torch.dtype:
        float32 = isinstance(value, Tensor) and value.dtype == torch.float32 and self.x.dtype != torch.float64
        return torch.float32 if float32 else self.x.dtype

    def _checked(self, name: str, value: object, shape: tuple, optional: bool, dtype: torch.dtype) -> Tensor | None:
        if value is None and optional:
            return None
        if not isinstance(value, Tensor):
            expected = "a tensor or None" if optional else "a tensor"
            raise TypeError(f"{name}: expected {expected}; got {_describe(value)}")
        self.shape(name, value, shape)
        return self.cast(name, value, dtype)

    def shape(self, name: str, value: Tensor, shape: tuple[int | str, ...]) -> None:
        """The shape alone."""
        fits = value.dim() == len(shape) and all(
            isinstance(want, str) or have == want for have, want in zip(value.shape, shape, strict=True)
        )
        if not fits:
            expected = ", ".join(map(str, shape)) + ("," if len(shape) == 1 else "")
            raise ValueError(f"{name}: expected shape ({expected}); got {tuple(value.shape)}")

    def cast(self, name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
        """The dtype and device alone: under autocast a tensor becomes ``dtype``, else it must have it."""
        self.device(name, value)
        if value.layout != torch.strided:
            raise TypeError(f"{name}: expected a dense strided tensor; got layout {value.layout}")
        if self._autocast is not None and value.is_floating_point() and value.dtype != torch.float64:
            return value if value.dtype == dtype else self.derive(value, lambda v: v.to(dtype))
        if value.dtype != dtype:
            raise TypeError(f"{name}: expected the dtype of x, {dtype}; got {value.dtype}")
        return value

    def like_x(self, name: str, value: Tensor) -> Tensor:
        """The dtype and device of x alone."""
        return self.cast(name, value, self.x.dtype)

    def device(self, name: str, value: Tensor) -> None:
        """The device alone."""
        if value.device != self.x.device:
            raise ValueError(f"{name}: expected a tensor on the device of x, {self.x.device}; got {value.device}")

    def number_or_tensor(self, name: str, value: object, *, per_channel: bool) -> tuple[float, Tensor | None]:
        """A number, or a 0-d (or ``(D,)``) tensor, in a dtype as of :meth:`scale`: ``(number, None)`` or ``(0.0,
        tensor)``."""
        if not isinstance(value, Tensor):
            return number(name, value), None
        if value.dim() != 0 and not (per_channel and tuple(value.shape) == (self.width,)):
            allowed = f"() or ({self.width},)" if per_channel else "()"
            raise ValueError(f"{name}: expected a number or a tensor of shape {allowed}; got {tuple(value.shape)}")
        return 0.0, self.cast(name, value, self._of_scale(value))

    def seed(self, value: object, *, used: bool) -> Tensor | None:
        """The dropout seed as an int64 0-d tensor on x's device; None where it is not used or has to be drawn."""
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, Tensor)):
            raise TypeError(f"seed: expected an int, an int64 tensor of shape () or None; got {_describe(value)}")
        if not isinstance(value, Tensor):
            if not -(2**63) <= value < 2**63:
                raise ValueError(f"seed: expected an integer of 64 bits, signed; got {value}")
            return torch.full((), value, dtype=torch.int64, device=self.x.device) if used else None
        if value.dtype != torch.int64 or value.dim() != 0:
            raise ValueError(f"seed: expected an int64 tensor of shape (); got {_describe(value)}")
        self.device("seed", value)
        return value if used else None

    def norm(self, norm: object, weight: object, bias: object, eps: object, placement: str):
        """The normalisation's arguments: ``(norm, weight, bias, eps, placement)``. Without one, pre is post."""
        choice("norm", norm, ("layer", "rms", "sphere", None))
        choice("placement", placement, ("pre", "post"))
        if norm is None and (weight is not None or bias is not None):
            raise ValueError("norm_weight, norm_bias: expected None where norm is None")
        weight = self.scale("norm_weight", weight, self.width, optional=True)
        bias = self.scale("norm_bias", bias, self.width, optional=True)
        return norm, weight, bias, number("eps", eps, minimum=0.0), "pre" if norm is None else placement
