"""What the kernels of ``normalize_step`` share: one row's formulas (see that file), in float32."""

import triton
import triton.language as tl
from torch import Tensor

__all__ = [
    "STEP_CHANNELS", "STEP_NUMBER", "STEP_SCALAR", "move", "move_back", "move_backward", "read_step", "step_kind",
    "velocity",
]  # fmt: skip

STEP_NUMBER = tl.constexpr(0)  # an argument
STEP_SCALAR = tl.constexpr(1)  # a tensor ()
STEP_CHANNELS = tl.constexpr(2)  # a tensor (D,)


def step_kind(step_tensor: Tensor | None) -> int:
    """Of the kernels' STEP."""
    if step_tensor is None:
        return STEP_NUMBER.value
    return STEP_SCALAR.value if step_tensor.dim() == 0 else STEP_CHANNELS.value


@triton.jit
def read_step(step_pointer, step, columns, D: tl.constexpr, STEP: tl.constexpr):
    """The step of ``columns``, to be broadcast over rows: a scalar or (1, columns)."""
    if STEP == STEP_CHANNELS:
        return tl.load(step_pointer + columns, columns < D, 0.0).to(tl.float32)[None, :]
    elif STEP == STEP_SCALAR:
        return tl.load(step_pointer).to(tl.float32)
    else:
        return step


@triton.jit
def velocity(x, u, along, eps, DIRECTION: tl.constexpr):
    """v of a tile; ``along`` (rows, 1) is the rows' <u, x>, for "difference" their <u, u>."""
    if DIRECTION == "tangent":
        return u - along * x
    elif DIRECTION == "difference":
        return u / tl.maximum(tl.sqrt(along), eps) - x
    else:
        return u


@triton.jit
def move_back(dz, dv, x, u, along, back, eps, DIRECTION: tl.constexpr):
    """``(dx, du)`` of a tile; ``back`` (rows, 1) is the rows' <dv, x>, for "difference" their <dv, u>."""
    if DIRECTION == "tangent":
        return dz - back * u - along * dv, dv - back * x
    elif DIRECTION == "difference":
        norm = tl.sqrt(along)
        length = tl.maximum(norm, eps)
        radial = tl.where(norm >= eps, back / length, 0.0)
        return dz - dv, (dv - u / length * radial) / length
    else:
        return dz, dv


@triton.jit
def move(x, u, c, eps, DIRECTION: tl.constexpr):
    """y of a tile of whole rows."""
    along = tl.sum(u * (u if DIRECTION == "difference" else x), 1)[:, None]
    z = x + c * velocity(x, u, along, eps, DIRECTION)
    length = tl.maximum(tl.sqrt(tl.sum(z * z, 1)), eps)
    return z / length[:, None]


@triton.jit
def move_backward(g, x, u, c, eps, DIRECTION: tl.constexpr):
    """``(dx, du, dstep)`` of a tile of whole rows, dstep not yet summed over them."""
    along = tl.sum(u * (u if DIRECTION == "difference" else x), 1)[:, None]
    v = velocity(x, u, along, eps, DIRECTION)
    z = x + c * v
    norm = tl.sqrt(tl.sum(z * z, 1))[:, None]
    length = tl.maximum(norm, eps)
    radial = tl.where(norm >= eps, tl.sum(g * z, 1)[:, None] / length, 0.0)
    dz = (g - z / length * radial) / length
    dv = c * dz
    back = tl.sum(dv * (u if DIRECTION == "difference" else x), 1)[:, None]
    dx, du = move_back(dz, dv, x, u, along, back, eps, DIRECTION)
    return dx, du, dz * v
