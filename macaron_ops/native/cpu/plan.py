"""Any list of substeps as ONE call of the C++ library, forward or backward, encoded as a list of numbers.

    macaron_ops_cpu::forward(Tensor[] inputs, float[] plan) -> Tensor[]
    macaron_ops_cpu::backward(Tensor grad, Tensor[] inputs, Tensor[] kept, int[] needs, float[] plan) -> Tensor[]

A substep of a plan is: operator, joins, save, number of tensors, the place of each among the inputs (-1: None), number
of options, the options. A name among the options is its place in ``NAMES``; ``csrc/cpu/torch/library.cpp`` decodes.
"""

import importlib
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import get_type_hints

import torch
from torch import Tensor

from macaron_ops.native import library
from macaron_ops.reference.activation import ACTIVATIONS

__all__ = ["PAIRS", "alone", "backward", "forward", "why_not_dtypes"]

OPERATORS = ("ffn_step", "attend_step", "normalize_step", "sphere_attend_step")
SAVE = ("none", "lean", "fast")
NAMES = {
    "norm": (None, "layer", "rms", "sphere"),
    "activation": ACTIVATIONS,
    "placement": ("post", "pre"),
    "direction": ("tangent", "difference", "ambient"),
    "weighting": ("softmax", "unnormalized"),
}
PAIRS = (  # (x, matrix parameters); the last one is autocast's
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float32, torch.bfloat16),
)


def forward(steps: Sequence, save: Sequence[str]) -> Callable[[Sequence[Tensor]], tuple[Tensor, list[Tensor]]]:
    """The steps of :mod:`macaron_ops.ops.run`: a function of their inputs, which returns y and what their backward pass
    reads."""
    plan = _encode(steps, save)

    def run(inputs: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        y, *kept = torch.ops.macaron_ops_cpu.forward.default(inputs, plan)
        return y, kept

    return run


def backward(steps: Sequence) -> Callable[..., list[Tensor | None]]:
    """A function of grad, needs, inputs and kept: the gradients of ``inputs``, None where ``needs`` is false."""
    plan = _encode(steps, ["fast"] * len(steps))

    def run(
        grad: Tensor, needs: Sequence[bool], inputs: Sequence[Tensor], kept: Sequence[Tensor]
    ) -> list[Tensor | None]:
        grads = torch.ops.macaron_ops_cpu.backward.default(grad, inputs, kept, [int(need) for need in needs], plan)
        return [g if need else None for g, need in zip(grads, needs, strict=True)]

    return run


def alone(operator: str, saved_type: type, saved_shapes: Callable) -> tuple[Callable, Callable]:
    """``forward`` and ``backward`` of one operator by itself, as :mod:`macaron_ops.ops.dispatch` asks for them."""

    def forward(x: Tensor, tensors: tuple, options: tuple, save: str) -> tuple[Tensor, tuple]:
        inputs, plan = _single(operator, x, tensors, options, save)
        y, *saved = torch.ops.macaron_ops_cpu.forward(inputs, plan)
        if not saved:  # with save="none" the library returns y alone
            saved = [x.new_empty(s, dtype=d) for s, d in saved_shapes(x, tensors, options, save)]
        return y, saved_type(*saved)

    def backward(
        grad: Tensor, needs: tuple[bool, ...], x: Tensor, tensors: tuple, saved: tuple, options: tuple
    ) -> tuple[Tensor | None, tuple]:
        inputs, plan = _single(operator, x, tensors, options, "fast")
        wanted = [int(needs[0]), *(int(n) for n, t in zip(needs[1:], tensors, strict=True) if t is not None)]
        grads = iter(torch.ops.macaron_ops_cpu.backward(grad, inputs, list(saved), wanted, plan))
        grad_x = next(grads)
        in_order = [None if t is None else next(grads) for t in tensors]
        named = [g if n else None for n, g in zip(needs[1:], in_order, strict=True)]
        return grad_x if needs[0] else None, type(tensors)(*named)

    return forward, backward


def why_not_dtypes(x: torch.dtype, parameters: torch.dtype) -> str | None:
    if (x, parameters) in PAIRS:
        return None
    return f"it runs float32 and bfloat16, not x in {x} with parameters in {parameters}"


def _single(operator: str, x: Tensor, tensors: tuple, options: tuple, save: str) -> tuple[list[Tensor], list[float]]:
    inputs, slots = [x], []
    for t in tensors:
        slots.append(-1 if t is None else len(inputs))
        if t is not None:
            inputs.append(t)
    return inputs, _substep(operator, False, save, slots, options)


def _encode(steps: Sequence, save: Sequence[str]) -> list[float]:
    plan: list[float] = []
    for step, kept in zip(steps, save, strict=True):
        slots = [-1 if slot is None else slot for slot in step.slots]
        plan += _substep(step.operator, step.joins, kept, slots, step.options)
    return plan


def _substep(operator: str, joins: bool, save: str, slots: Sequence[int], options: tuple) -> list[float]:
    numbers = [
        NAMES[name].index(value) if name in NAMES else value
        for name, value in zip(options._fields, options, strict=True)
    ]
    head = [OPERATORS.index(operator), joins, SAVE.index(save), len(slots), *slots, len(numbers), *numbers]
    return [float(number) for number in head]


def _decode(plan: Sequence[float]):
    """For each substep ``(operator, joins, save, slots, options by field)``."""
    numbers = iter(plan)

    def count() -> int:
        return int(next(numbers))

    for first in numbers:
        operator, joins, save = OPERATORS[int(first)], bool(next(numbers)), SAVE[count()]
        slots = [count() for _ in range(count())]
        options = _reference(operator).Options
        if count() != len(options._fields):
            raise ValueError(f"plan: expected {len(options._fields)} options of {operator}")
        types = get_type_hints(options)
        values = [NAMES[f][count()] if f in NAMES else types[f](next(numbers)) for f in options._fields]
        yield operator, joins, save, slots, options._make(values)


def _reference(operator: str) -> ModuleType:
    return importlib.import_module(f"macaron_ops.reference.{operator}")


def _forward_shapes(inputs: Sequence[Tensor], plan: Sequence[float]) -> list[Tensor]:
    substeps = list(_decode(plan))
    keeps = any(save != "none" for _, _, save, _, _ in substeps)
    x = inputs[0]
    outputs = [x.new_empty(x.shape)]
    for i, (operator, joins, save, slots, options) in enumerate(substeps):
        if not keeps:
            break
        if not joins and i > 0:
            outputs.append(x.new_empty(x.shape))
        tensors = _reference(operator).Tensors._make(None if slot < 0 else inputs[slot] for slot in slots)
        own = importlib.import_module(f"{__package__}.{operator}")
        outputs += [x.new_empty(s, dtype=d) for s, d in own.saved_shapes(x, tensors, options, save)]
    return outputs


def _backward_shapes(grad, inputs, kept, needs, plan):
    return [
        t.new_empty(t.shape) if need else t.new_empty(0, dtype=torch.float32)
        for t, need in zip(inputs, needs, strict=True)
    ]


if library() is not None:
    torch.library.register_fake("macaron_ops_cpu::forward", _forward_shapes)
    torch.library.register_fake("macaron_ops_cpu::backward", _backward_shapes)
