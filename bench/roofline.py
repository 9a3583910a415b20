"""What `ffn_step` would take if every kernel reached a ceiling: FLOP and bytes of each launch, next to eager's kernels.

    python -m macaron_ops.bench.roofline                   docs/triton_kernels.md, "Roofline"
    python -m macaron_ops.bench.roofline 16384,768,3072    other tokens, D and F

A kernel takes at least the larger of FLOP / rate and bytes / bandwidth, by the data sheet of an H100; each tensor that
it reads or writes counts once. Ours are the launches that the operator makes, recorded, none started; eager's are layer
norm, two products with their biases, gelu and the residual sum as kernels of their own, and autograd's for them.
bfloat16, layer norm, gelu, no dropout. Lower bounds on paper, no measurement.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NamedTuple

import torch

from macaron_ops.kernel_commands import three

from .kernel_calls import ffn_arguments, launches_of_ffn

__all__ = ["Work", "eager", "microseconds", "ours"]

RATE, BANDWIDTH = 989e12, 3.35e12  # FLOP/s in bfloat16, bytes/s: NVIDIA's data sheet of the H100 SXM
SIZE = 2  # bytes of a number
SHAPES = ((16384, 144, 576), (16384, 256, 1024), (16384, 512, 2048), (16384, 1024, 2048), (16384, 1024, 4096))
_PRODUCTS = ("hidden_forward_kernel", "linear_residual_kernel", "hidden_backward_kernel", "product_parts_kernel")


class Work(NamedTuple):
    """Of one kernel."""

    name: str
    flop: int
    bytes: int

    @property
    def microseconds(self) -> float:
        return max(self.flop / RATE, self.bytes / BANDWIDTH) * 1e6


def microseconds(kernels: Sequence[Work]) -> float:
    return sum(kernel.microseconds for kernel in kernels)


def ours(tokens: int, width: int, hidden: int, *, backward: bool) -> list[Work]:
    """The launches of a forward pass without a gradient to come, or of a forward and a backward pass. For rows that two
    products take, each 2 M D F FLOP."""
    launches = launches_of_ffn(*ffn_arguments(tokens, width, hidden, torch.bfloat16))
    found = []
    for launch in (launch for each in launches[: 1 + backward] for launch in each):
        name, flop = launch.kernel.__name__, 2 * tokens * width * hidden
        tensors = (getattr(argument, "base", argument) for argument in launch.arguments)  # of a descriptor
        size = sum(t.numel() * t.itemsize for t in tensors if isinstance(t, torch.Tensor))
        if name == "hidden_forward_kernel" and not backward:
            size -= SIZE * tokens * hidden  # the pre-activations, which are for a backward pass
        found.append(Work(name, flop if name in _PRODUCTS else 0, size))
    return found


def eager(tokens: int, width: int, hidden: int, *, backward: bool) -> list[Work]:
    x, h, w, flop = SIZE * tokens * width, SIZE * tokens * hidden, SIZE * width * hidden, 2 * tokens * width * hidden
    forward = [
        Work("layer norm", 0, 2 * x),
        Work("n W_in^T + b_in", flop, x + w + h),
        Work("gelu", 0, 2 * h),
        Work("h W_out^T + b_out", flop, h + w + x),
        Work("x + c (.)", 0, 3 * x),
    ]
    return forward + backward * [
        Work("c dy", 0, 2 * x),
        Work("db_out", 0, x),
        Work("g W_out", flop, x + w + h),
        Work("dW_out", flop, x + h + w),
        Work("dz by gelu's derivative", 0, 3 * h),
        Work("db_in", 0, h),
        Work("dz W_in", flop, h + w + x),
        Work("dW_in", flop, h + x + w),
        Work("layer norm, dx", 0, 3 * x),
        Work("layer norm, its weight and bias", 0, 2 * x),
        Work("dx + dy", 0, 3 * x),
    ]


def line(tokens: int, width: int, hidden: int) -> str:
    """A row of the table of steps."""
    products = sum(k.microseconds for k in eager(tokens, width, hidden, backward=False) if k.flop)
    cells = [f"{width}", f"{hidden}", f"{products:.0f}"]
    for backward in (False, True):
        us, eagers = (microseconds(side(tokens, width, hidden, backward=backward)) for side in (ours, eager))
        cells += [f"{us:.0f}", f"{eagers:.0f}", f"{eagers / us:.2f}"]
    return f"| {' | '.join(cells)} |"


def lines(kernels: Sequence[Work]) -> list[str]:
    """Rows of a table of kernels."""
    return [f"| {k.name} | {k.flop / 1e9:.0f} | {k.bytes / 1e6:.0f} | {k.microseconds:.0f} |" for k in kernels]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", nargs="*", type=three, metavar="M,D,F")
    shapes = parser.parse_args().shape or SHAPES
    print("| D | F | products, us | forward, us | eager, us | ratio | forward + backward, us | eager, us | ratio |")
    print("\n".join(line(*shape) for shape in shapes))
    for side in (ours, eager):
        print(f"\n{side.__name__}, {shapes[-1]}\n| kernel | GFLOP | MB | us |")
        print("\n".join(lines(side(*shapes[-1], backward=True))))


if __name__ == "__main__":
    main()
