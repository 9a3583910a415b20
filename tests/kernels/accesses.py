"""Triton's interpreter, in which an access outside of the tensors that a kernel was given is an error.

On a GPU such an access reads a neighbour or ends the process, as the allocator laid things; the interpreter reads
what lies there in the CPU's memory, and a test passes. Masked-off elements have any address, as on a GPU.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder
from triton.tools.tensor_descriptor import TensorDescriptor

__all__ = ["OutOfBounds", "checked_accesses", "noted_accesses"]


class OutOfBounds(Exception):
    """A kernel touched what lies in none of its tensors."""


_LAUNCH = (GridExecutor, "__call__")
_LOAD = (InterpreterBuilder, "create_masked_load")
_STORE = (InterpreterBuilder, "create_masked_store")
_ADD = (InterpreterBuilder, "create_atomic_rmw")
_SWAP = (InterpreterBuilder, "create_atomic_cas")


@contextmanager
def checked_accesses() -> Iterator[None]:
    """Inside, every load, store and atomic of interpreted kernels is checked."""
    memory = _Memory()
    before = {
        _LAUNCH: lambda _, *arguments, **others: memory.given([*arguments, *others.values()]),
        _LOAD: lambda _, pointers, mask, *others, **named: memory.check("loads", pointers, mask),
        _STORE: lambda _, pointers, value, mask, *others, **named: memory.check("stores", pointers, mask),
        _ADD: lambda _, operation, pointers, value, mask, *others, **named: memory.check("adds to", pointers, mask),
        _SWAP: lambda _, pointers, *others, **named: memory.check("swaps", pointers, None),
    }
    with _looked_at(before):
        yield


@contextmanager
def noted_accesses() -> Iterator[tuple[list[np.ndarray], list[np.ndarray]]]:
    """Inside, ``(loads, stores)`` get the addresses of the elements that interpreted kernels load and store."""
    loads, stores = [], []
    before = {
        _LOAD: lambda _, pointers, mask, *others, **named: loads.append(_unmasked(pointers, mask)),
        _STORE: lambda _, pointers, value, mask, *others, **named: stores.append(_unmasked(pointers, mask)),
    }
    with _looked_at(before):
        yield loads, stores


@contextmanager
def _looked_at(before: dict) -> Iterator[None]:
    """Inside, these functions of the interpreter are called before its own."""
    originals = {at: getattr(*at) for at in before}
    try:
        for at, original in originals.items():
            setattr(*at, _after(before[at], original))
        yield
    finally:
        for at, original in originals.items():
            setattr(*at, original)


def _after(check, original):
    @functools.wraps(original)
    def checked(*arguments, **others):
        check(*arguments, **others)
        return original(*arguments, **others)

    return checked


def _unmasked(pointers, mask) -> np.ndarray:
    return pointers.data if mask is None else pointers.data[np.broadcast_to(mask.data, pointers.data.shape)]


class _Memory:
    """The tensors of the kernel that runs, by address: every byte from ``starts[i]`` up to ``ends[i]`` is one's own."""

    def given(self, arguments: list) -> None:
        extents = sorted(filter(None, map(_extent, arguments)))
        merged: list[list[int]] = []
        for start, end in extents:
            if merged and start < merged[-1][1]:
                merged[-1][1] = max(end, merged[-1][1])
            else:
                merged.append([start, end])
        self.starts, self.ends = np.array(merged or [(0, 0)], dtype=np.uint64).T

    def check(self, does: str, pointers, mask) -> None:
        first = _unmasked(pointers, mask)
        if first.size == 0:
            return
        size = max(pointers.get_element_ty().primitive_bitwidth // 8, 1)
        which = np.searchsorted(self.starts, first, side="right").astype(np.int64) - 1
        outside = (which < 0) | (first + np.uint64(size) > self.ends[np.maximum(which, 0)])
        if outside.any():
            count, nearest = int(outside.sum()), np.maximum(which[outside][0], 0)
            past = int(first[outside][0]) - int(self.ends[nearest])
            raise OutOfBounds(
                f"a kernel {does} {count} of {first.size} elements outside of its tensors; "
                f"the first lies {past} bytes past the end of the nearest tensor of {size}-byte elements below it"
            )


def _extent(argument) -> tuple[int, int] | None:
    """The bytes from a tensor's first element to its last."""
    tensor = argument.base if isinstance(argument, TensorDescriptor) else argument
    if not isinstance(tensor, torch.Tensor) or tensor.numel() == 0:
        return None
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()
