"""A launch made again and again with other tensors: what a replay (:mod:`replay`) is made of."""

import functools
from collections.abc import Callable

import torch
import triton.knobs
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.tools.tensor_descriptor import TensorDescriptor

from .device import Launch, is_recording, launch, on
from .packed import Packed

__all__ = ["Start"]


class Start:
    """A launch, to be made again with other tensors that Triton specialises alike: dtypes, places modulo 16 bytes. A
    descriptor's tensor is given in its place, and lies as the descriptor's did.

    On an NVIDIA device the first time is Triton's; from then on the kernel that it compiled is started by CUDA's driver
    (:mod:`packed`) or, where that cannot be, as ``kernel[grid]`` ends by starting it, with its hooks: to bind and
    specialise arguments takes several times as long. AMD's backend specialises on the size of a tensor's memory too,
    and the interpreter compiles nothing: there ``kernel[grid]`` is called each time.
    """

    def __init__(self, launch: Launch, device: torch.device):
        self._launch, self._device = launch._replace(arguments=()), device
        self._makers = tuple(map(_maker, launch.arguments))
        self._others: tuple = ()  # the kernel's parameters after the arguments
        self._compiled: Callable | None = None
        self._packed: Packed | None = None

    def __call__(self, *tensors: Tensor) -> None:
        if self._compiled is None or is_recording():
            self._first(tensors)
            return
        with on(self._device):
            if self._packed is None or _hooked() or not self._packed.start(tensors):
                self._compiled(*self._arguments(tensors), *self._others)

    def _first(self, tensors: tuple[Tensor, ...]) -> None:
        kernel, programs, _, constants = self._launch
        arguments = self._arguments(tensors)
        compiled = launch(kernel, programs, self._device, *arguments, **constants)
        if type(compiled) is CompiledKernel and torch.version.hip is None and not kernel.pre_run_hooks:
            names = kernel.arg_names[len(arguments) :]
            if all(name in constants for name in names):  # else a default, which Triton fills in
                self._others = tuple(constants[name] for name in names)
                self._packed = Packed.of(compiled, programs, (*arguments, *self._others), self._device)
                self._compiled = compiled[(programs, 1, 1)]

    def _arguments(self, tensors: tuple[Tensor, ...]) -> list:
        rest = iter(tensors)
        return [maker(next(rest)) if callable(maker) else maker for maker in self._makers]


def _maker(argument: object) -> object:
    """What makes the argument of a tensor, if it is made of one; else itself."""
    if isinstance(argument, TensorDescriptor):
        return _describer(argument)
    return _same if isinstance(argument, Tensor) else argument


def _same(t: Tensor) -> Tensor:
    return t


def _describer(like: TensorDescriptor) -> Callable[[Tensor], TensorDescriptor]:
    """Descriptors of other tensors that lie as the one in ``like`` does. What it was checked for when it was made holds
    for them too, and to check it again would cost more than all else: they get its fields and another base."""
    fields = vars(like) | {"base": None}
    new = functools.partial(object.__new__, type(like))

    def describe(base: Tensor) -> TensorDescriptor:
        descriptor = new()
        descriptor.__dict__ = own = fields.copy()
        own["base"] = base
        return descriptor

    return describe


def _hooked() -> bool:
    """Whether somebody wants to be told of launches, a profiler as a rule: Triton's own way does."""
    runtime = triton.knobs.runtime
    return any(hook is not None and hook.calls for hook in (runtime.launch_enter_hook, runtime.launch_exit_hook))
