"""The raw operators in ``torch.ops.macaron_ops``, one pair per operator and backend.

    {backend}_{operator}_forward(Tensor x, <tensors>, <options>, str save) -> (Tensor y, <saved>)
    {backend}_{operator}_backward(Tensor grad, bool[] needs, Tensor x, <tensors>, <saved>, <options>)
        -> (Tensor grad_x, one Tensor per entry of <tensors>)

The argument lists are the named tuples ``Tensors``, ``Saved`` and ``Options`` of the reference's module, so that a
schema is written once. All have a fixed number of outputs that alias nothing; a tensor that was not asked for is
empty. They are the pieces of :mod:`macaron_ops.ops.run`, which differentiates them; alone they have no gradient.
"""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import get_type_hints

import torch
from torch import Tensor

from .dispatch import OPERATORS_OF, provider

__all__ = ["BACKWARD", "FORWARD", "definition", "without_autocast"]

_SCHEMA_TYPES = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    str: "str",
    str | None: "str?",
    float: "float",
    int: "int",
    bool: "bool",
}

FORWARD: dict[tuple[str, str], torch._ops.OpOverload] = {}
BACKWARD: dict[tuple[str, str], torch._ops.OpOverload] = {}
_library = torch.library.Library("macaron_ops", "DEF")


def definition(operator: str) -> ModuleType:
    """The reference's module of an operator: its named tuples, its forward and backward."""
    return provider("reference", operator)


def _arguments(fields: type) -> list[str]:
    return [f"{_SCHEMA_TYPES[hint]} {name}" for name, hint in get_type_hints(fields).items()]


def _returns(count: int) -> str:
    return "Tensor" if count == 1 else f"({', '.join(['Tensor'] * count)})"


def _pack(outputs: list[Tensor]) -> Tensor | tuple[Tensor, ...]:
    return outputs[0] if len(outputs) == 1 else tuple(outputs)


def _split(module: ModuleType, arguments: tuple, *parts: type) -> list[tuple]:
    """A flat argument list as the named tuples that it is made of."""
    named = []
    for part in parts:
        size = len(part._fields)
        named.append(part(*arguments[:size]))
        arguments = arguments[size:]
    return [*named, *arguments]


def without_autocast(device: torch.device) -> AbstractContextManager:
    """No autocast on a device, where it has one (meta has none)."""
    available = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if available else nullcontext()


def _plain(function: Callable) -> Callable:
    """Run without autograd and autocast: the dtypes are the caller's business, the gradient is another operator."""

    @functools.wraps(function)
    def run(first: Tensor, *rest):
        with torch.no_grad(), without_autocast(first.device):
            return function(first, *rest)

    return run


def _define(operator: str, backend: str) -> None:
    module = definition(operator)
    tensors, options, saved = module.Tensors, module.Options, module.Saved
    stem = f"{backend}_{operator}"

    def forward(x: Tensor, *arguments):
        t, o, save = _split(module, arguments, tensors, options)
        y, kept = provider(backend, operator).forward(x, t, o, save)
        return _pack([y.contiguous(), *(s.contiguous() for s in kept)])

    def forward_shapes(x: Tensor, *arguments):
        t, o, save = _split(module, arguments, tensors, options)
        kept = module.saved_shapes(x, t, o, save)
        return _pack([x.new_empty(x.shape), *(x.new_empty(shape, dtype=dtype) for shape, dtype in kept)])

    def backward(grad: Tensor, needs: list[bool], x: Tensor, *arguments):
        t, s, o = _split(module, arguments, tensors, saved, options)
        grad_x, grads = provider(backend, operator).backward(grad, tuple(needs), x, t, s, o)
        return _pack(
            [
                x.new_empty(0) if g is None else g.to(like.dtype).contiguous()
                for g, like in zip((grad_x, *grads), (x, *t), strict=True)
            ]
        )

    def backward_shapes(grad: Tensor, needs: list[bool], x: Tensor, *arguments):
        like = (x, *arguments[: len(tensors._fields)])
        return _pack([t.new_empty(t.shape) if n else x.new_empty(0) for n, t in zip(needs, like, strict=True)])

    inputs = ["Tensor x", *_arguments(tensors)]
    to_forward = [*inputs, *_arguments(options), "str save"]
    to_backward = ["Tensor grad", "bool[] needs", *inputs, *_arguments(saved), *_arguments(options)]
    _library.define(f"{stem}_forward({', '.join(to_forward)}) -> {_returns(1 + len(saved._fields))}")
    _library.define(f"{stem}_backward({', '.join(to_backward)}) -> {_returns(1 + len(tensors._fields))}")
    for name, run, shapes in (("forward", forward, forward_shapes), ("backward", backward, backward_shapes)):
        _library.impl(f"{stem}_{name}", _plain(run), "CompositeExplicitAutograd")
        torch.library.register_fake(f"macaron_ops::{stem}_{name}", shapes, lib=_library)
    FORWARD[backend, operator] = getattr(torch.ops.macaron_ops, f"{stem}_forward").default
    BACKWARD[backend, operator] = getattr(torch.ops.macaron_ops, f"{stem}_backward").default


for _backend, _operators in OPERATORS_OF.items():
    for _operator in _operators:
        _define(_operator, _backend)
