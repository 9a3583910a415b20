"""The raw operators in ``torch.ops.macaron_ops``, one pair per operator and backend.

    {backend}_{operator}_forward(Tensor x, <tensors>, <options>, str save, <ahead>) -> (Tensor y, <saved>, <handed>)
    {backend}_{operator}_backward(Tensor grad, bool[] needs, Tensor x, <tensors>, <saved>, <options>, <behind>)
        -> (Tensor grad_x, one Tensor per entry of <tensors>, <handed>)

The argument lists are the named tuples ``Tensors`` and ``Options`` of the reference's module, and of the backend's own
``Saved`` and, where it hands something to neighbours (:mod:`macaron_ops.ops.borders`), ``Ahead`` and ``Behind``, which
may be left out; so a schema is written once. All have a fixed number of outputs that alias nothing; a tensor that
was not asked for is empty. They are the pieces of :mod:`macaron_ops.ops.run`, which differentiates them; alone they
have no gradient.
"""

import functools
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple, get_type_hints

import torch
from torch import Tensor

from .autocast import without_autocast
from .dispatch import MODULES, RECORDED, provider

__all__ = ["BACKWARD", "FORWARD", "HANDS", "SAVED", "definition", "prepared", "prepared_backward"]

_SCHEMA_TYPES = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    str: "str",
    str | None: "str?",
    float: "float",
    int: "int",
    bool: "bool",
    torch.dtype | None: "ScalarType?",
}

FORWARD: dict[tuple[str, str], torch._ops.OpOverload] = {}
BACKWARD: dict[tuple[str, str], torch._ops.OpOverload] = {}
_PYTHON: dict[tuple[str, str], Callable] = {}  # the function that FORWARD calls
_GRADIENTS: dict[tuple[str, str], Callable] = {}  # the one behind BACKWARD: None for what is not needed
SAVED: dict[tuple[str, str], int] = {}  # how many tensors the forward operator saves
HANDS: dict[tuple[str, str], tuple[int, int]] = {}  # how many its forward and its backward hand to a neighbour
_library = torch.library.Library("macaron_ops", "DEF")


def definition(operator: str) -> ModuleType:
    """The reference's module of an operator: its named tuples, its forward and backward."""
    return provider("reference", operator)


def prepared(backend: str, operator: str) -> Callable:
    """The raw forward operator without torch's dispatcher, for calls of one signature."""
    return RECORDED.get(backend, lambda function: function)(_PYTHON[backend, operator])


def prepared_backward(backend: str, operator: str) -> Callable:
    """The raw backward operator without torch's dispatcher, for calls of one signature; what is not needed may be
    None."""
    record = RECORDED.get(backend)
    if record is None:
        return BACKWARD[backend, operator]
    module, first = definition(operator), len(definition(operator).Tensors._fields)
    saved = slice(first, first + SAVED[backend, operator])
    return _Backward(_GRADIENTS[backend, operator], record, saved, saved.stop + len(module.Options._fields))


class _Backward:
    """Plans of a backward operator, one for each layout of the gradient, each set of needs and what was saved, which a
    backend's settings may change, and what a neighbour asks for: the rest follows from the forward call's signature."""

    _MOST = 16  # plans; those that come after them are not kept

    def __init__(self, gradients: Callable, record: Callable, saved: slice, behind: int):
        self._gradients, self._record, self._saved, self._behind = gradients, record, saved, behind
        self._plans: dict[tuple, Callable] = {}

    def __call__(self, grad: Tensor, needs: list[bool], x: Tensor, *arguments) -> list[Tensor | None]:
        grad = grad.resolve_neg()
        tensors = [t for t in (grad, x, *arguments) if isinstance(t, Tensor)]
        # Hooks on saved tensors may unpack others than were packed, and the gradient may be any tensor.
        key = (*needs, *[(t.data_ptr() % 16, t.stride(), t.dtype) for t in tensors])
        key += tuple([t.shape for t in arguments[self._saved]])
        key += tuple([isinstance(a, Tensor) or a for a in arguments[self._behind :]])
        identities = list(map(id, tensors))
        if len(set(identities)) < len(identities):
            key = (*key, *map(identities.index, identities))
        plan = self._plans.get(key)
        if plan is None:
            plan = self._record(functools.partial(self._needed, needs))
            if len(self._plans) < self._MOST:
                self._plans[key] = plan
        found = iter(plan(grad, x, *arguments))
        return [*(next(found) if need else None for need in needs), *found]

    def _needed(self, needs: list[bool], grad: Tensor, x: Tensor, *arguments) -> list[Tensor]:
        found, handed = self._gradients(grad, needs, x, *arguments)
        needed = [g for g, need in zip(found, needs, strict=True) if need]
        return [x.new_empty(0) if g is None else g for g in (*needed, *handed)]


class _Nothing(NamedTuple):
    """What is handed to a neighbour by an operator that hands nothing."""


def _arguments(fields: type) -> list[str]:
    defaults = {name: f"={value}" for name, value in fields._field_defaults.items()}
    return [f"{_SCHEMA_TYPES[hint]} {name}{defaults.get(name, '')}" for name, hint in get_type_hints(fields).items()]


def _returns(count: int) -> str:
    return "Tensor" if count == 1 else f"({', '.join(['Tensor'] * count)})"


def _pack(outputs: list[Tensor]) -> Tensor | tuple[Tensor, ...]:
    return outputs[0] if len(outputs) == 1 else tuple(outputs)


def _plain(function: Callable) -> Callable:
    """Run without autograd and autocast: the dtypes are the caller's business, the gradient is another operator."""

    def run(first: Tensor, *rest):
        # Inside an autograd node, outside autocast, both are off already, and entering contexts takes microseconds.
        if not torch.is_grad_enabled() and not torch.is_autocast_enabled(first.device.type):
            return function(first, *rest)
        with torch.no_grad(), without_autocast(first.device):
            return function(first, *rest)

    return run


def _define(backend: str, operator: str, module: ModuleType) -> None:
    reference = definition(operator)
    tensors, options = reference.Tensors, reference.Options
    saved = getattr(module, "Saved", reference.Saved)
    saved_shapes = getattr(module, "saved_shapes", reference.saved_shapes)
    ahead, behind = getattr(module, "Ahead", _Nothing), getattr(module, "Behind", _Nothing)
    hands = (1, 2) if hasattr(module, "Ahead") else (0, 0)
    t_end, o_length = len(tensors._fields), len(options._fields)
    s_end = t_end + len(saved._fields)

    def called(arguments: tuple) -> tuple:
        """Of the forward operator: its tensors, options and save, and what concerns the next substep, if anything."""
        t, o, save = arguments[:t_end], arguments[t_end : t_end + o_length], arguments[t_end + o_length]
        between = (ahead(*arguments[t_end + o_length + 1 :]),) if hands[0] else ()
        return tensors._make(t), options._make(o), save, *between

    def gradient_called(arguments: tuple) -> tuple:
        """Of the backward operator: its tensors, what was saved, and so on."""
        s, o = [kept.contiguous() for kept in arguments[t_end:s_end]], arguments[s_end : s_end + o_length]
        between = (behind(*arguments[s_end + o_length :]),) if hands[1] else ()
        return tensors._make(arguments[:t_end]), saved._make(s), options._make(o), *between

    def forward(x: Tensor, *arguments):
        y, kept, *handed = module.forward(x, *called(arguments))
        handed = [x.new_empty(0) if h is None else h.view(x.shape) for h in handed]
        return _pack([y.contiguous(), *(s.contiguous() for s in kept), *handed])

    def forward_shapes(x: Tensor, *arguments):
        t, o, save, *between = called(arguments)
        shapes = [*saved_shapes(x, t, o, save), *(module.ahead_shape(x, t, o, b) for b in between)]
        return _pack([x.new_empty(x.shape), *(x.new_empty(shape, dtype=dtype) for shape, dtype in shapes)])

    def gradients(grad: Tensor, needs: list[bool], x: Tensor, *arguments):
        t, *others = gradient_called(arguments)
        grad_x, grads, *handed = module.backward(grad, tuple(needs), x, t, *others)
        found = zip((grad_x, *grads), (x, *t), strict=True)
        return [None if g is None else g.to(like.dtype).contiguous() for g, like in found], handed[0] if handed else ()

    def backward(grad: Tensor, needs: list[bool], x: Tensor, *arguments):
        found, handed = gradients(grad, needs, x, *arguments)
        return _pack([x.new_empty(0) if g is None else g for g in (*found, *handed)])

    def backward_shapes(grad: Tensor, needs: list[bool], x: Tensor, *arguments):
        t, _, o, *between = gradient_called(arguments)
        handed = [x.new_empty(s, dtype=d) for b in between for s, d in module.behind_shapes(x, tuple(needs), t, o, b)]
        found = [like.new_empty(like.shape) if n else x.new_empty(0) for n, like in zip(needs, (x, *t), strict=True)]
        return _pack([*found, *handed])

    stem = f"{backend}_{operator}"
    inputs = ["Tensor x", *_arguments(tensors)]
    to_forward = [*inputs, *_arguments(options), "str save", *_arguments(ahead)]
    to_backward = [
        "Tensor grad",
        "bool[] needs",
        *inputs,
        *_arguments(saved),
        *_arguments(options),
        *_arguments(behind),
    ]
    _library.define(f"{stem}_forward({', '.join(to_forward)}) -> {_returns(1 + len(saved._fields) + hands[0])}")
    _library.define(f"{stem}_backward({', '.join(to_backward)}) -> {_returns(1 + t_end + hands[1])}")
    _PYTHON[backend, operator] = _plain(forward)
    _GRADIENTS[backend, operator] = _plain(gradients)
    for name, run, shapes in (
        ("forward", _PYTHON[backend, operator], forward_shapes),
        ("backward", _plain(backward), backward_shapes),
    ):
        _library.impl(f"{stem}_{name}", run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"macaron_ops::{stem}_{name}", shapes, lib=_library)
    FORWARD[backend, operator] = getattr(torch.ops.macaron_ops, f"{stem}_forward").default
    BACKWARD[backend, operator] = getattr(torch.ops.macaron_ops, f"{stem}_backward").default
    SAVED[backend, operator], HANDS[backend, operator] = len(saved._fields), hands


for (_backend, _operator), _module in MODULES.items():
    _define(_backend, _operator, _module)
