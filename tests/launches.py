"""Every start of a Triton kernel told before it happens, and waited for: ``pytest -p tests.launches``.

A kernel that breaks the GPU's context leaves an error that names whoever asked next. With this, the last line of the
file ``MACARON_OPS_LAUNCHES`` (default: standard error) that has no ``done`` after it is the one: its name, its
arguments' places, shapes and strides, its constants. Slow; for one test at a time.
"""

import functools
import os
import sys

import torch
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor


def pytest_configure(config):
    path = os.environ.get("MACARON_OPS_LAUNCHES")
    tell_launches(open(path, "a", buffering=1) if path else sys.stderr)


def tell_launches(to) -> None:
    """``to``: a file, which gets a line before a kernel starts, and another once the GPU has finished it."""
    run, get = JITFunction.run, CompiledKernel.__getitem__

    @functools.wraps(run)
    def told_run(self, *arguments, grid, warmup, **constants):
        if warmup:
            return run(self, *arguments, grid=grid, warmup=warmup, **constants)
        with _Told(to, self.__name__, grid, arguments, constants):
            return run(self, *arguments, grid=grid, warmup=warmup, **constants)

    @functools.wraps(get)
    def told_get(self, grid):
        start = get(self, grid)

        def told_start(*arguments, **others):
            with _Told(to, self.name, grid, arguments, {}):
                return start(*arguments, **others)

        return told_start

    JITFunction.run, CompiledKernel.__getitem__ = told_run, told_get


class _Told:
    def __init__(self, to, name, grid, arguments, constants):
        self.to = to
        told = ", ".join([*map(_of, arguments), *(f"{name}={_of(value)}" for name, value in constants.items())])
        print(f"{name}[{grid}]({told})", file=to, flush=True)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if kind is None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            print("  done", file=self.to, flush=True)
        else:
            print(f"  {kind.__name__}: {error}", file=self.to, flush=True)


def _of(value) -> str:
    if isinstance(value, TensorDescriptor):
        return f"blocks of {list(value.block_shape)} of {_of(value.base)}"
    if not isinstance(value, torch.Tensor):
        return str(value)
    dtype = str(value.dtype).removeprefix("torch.")
    return f"{dtype}{list(value.shape)} strides {list(value.stride())} at {value.data_ptr():#x}"
