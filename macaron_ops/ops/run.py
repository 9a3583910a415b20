"""Substeps as ONE autograd node: the raw forward operators in order, the raw backward operators in reverse.

``save="lean"`` keeps between the two passes each substep's input and what its operator cannot do without (attention
output and log-sum-exp); ``"fast"`` keeps also what is expensive to compute again (hidden pre-activations,
projections). Without a gradient to come nothing is kept.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple, ParamSpec

import torch
from torch import Tensor

from .checks import choice
from .dispatch import Choice, Request, asked_for, choose, require_reference, select
from .registry import BACKWARD, FORWARD, definition, without_autocast

__all__ = ["Bound", "Explanation", "explain", "operator", "run"]

P = ParamSpec("P")
SAVE = ("fast", "lean")


class Bound(NamedTuple):
    """A checked call of an operator."""

    operator: str
    x: Tensor
    tensors: tuple
    options: tuple
    save: str
    joins: bool = False  # reads the input of the substep before it and adds to that one's output

    @property
    def definition_only(self) -> bool:
        """A Python function as activation: no raw operator takes it, only the definition."""
        return callable(getattr(self.options, "activation", None))


class _Step(NamedTuple):
    """A substep without its tensors: constants of the graph."""

    operator: str
    backend: str
    options: tuple
    joins: bool
    slots: tuple[int | None, ...]  # where each of its tensors stands among the node's inputs
    saved: int  # how many tensors the raw forward operator saves

    def gather(self, inputs: Sequence) -> list:
        """Its own tensors out of the node's inputs."""
        return [None if slot is None else inputs[slot] for slot in self.slots]


def run(x: Tensor, substeps: Sequence[Bound], save: str) -> Tensor:
    """The substeps' output for ``x``; their own ``x`` and ``save`` are not looked at."""
    choice("save", save, SAVE)
    inputs: list[Tensor] = [x]
    plan: list[_Step] = []
    for bound in substeps:
        if bound.definition_only:
            require_reference("a Python function as activation is taken by the definition only")
        backend = select(Request(bound.operator, x, bound.tensors, bound.options))
        slots = tuple(_slot(inputs, t) for t in bound.tensors)
        saved = len(definition(bound.operator).Saved._fields)
        plan.append(_Step(bound.operator, backend, bound.options, bound.joins, slots, saved))
    if any(bound.definition_only for bound in substeps):
        with without_autocast(x.device):
            return _define(plan, inputs)
    if torch.is_grad_enabled() and any(t.requires_grad for t in inputs):
        return _Substeps.apply(tuple(plan), save, *inputs)
    return _forward(plan, "none", inputs)[0]


def _slot(inputs: list[Tensor], tensor: Tensor | None) -> int | None:
    """Where ``tensor`` stands among ``inputs``, appended if it is new: a tensor used twice is one input of the node."""
    if tensor is None:
        return None
    for slot, seen in enumerate(inputs):
        if seen is tensor:
            return slot
    inputs.append(tensor)
    return len(inputs) - 1


def _forward(plan: Sequence[_Step], save: str, inputs: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The output, and what the backward pass reads: for each step its input (unless it is x, or the same as the
    step's before it), then what the raw operator saved."""
    kept, x, y = [], inputs[0], inputs[0]
    for i, step in enumerate(plan):
        if not step.joins:
            x = y
            if i > 0:
                kept.append(x)
        outputs = FORWARD[step.backend, step.operator](x, *step.gather(inputs), *step.options, save)
        out = outputs if step.saved == 0 else outputs[0]
        if step.saved > 0:
            kept.extend(outputs[1:])
        y = y + out if step.joins else out
    return y, kept


def _reads(plan: Sequence[_Step], kept: Sequence[Tensor], needs: Sequence[bool], x: Tensor) -> list[tuple]:
    """For each step: the tensor that it read, whether that one's gradient is needed, and what the step saved."""
    reads, at = [], 0
    need_x = need_y = needs[0]
    for i, step in enumerate(plan):
        if not step.joins:
            need_x = need_y
            if i > 0:
                x = kept[at]
                at += 1
        need_y = need_y or any(slot is not None and needs[slot] for slot in step.slots)
        reads.append((x, need_x, kept[at : at + step.saved]))
        at += step.saved
    return reads


class _Substeps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, plan, save, *inputs):
        y, kept = _forward(plan, save, inputs)
        ctx.plan = plan
        ctx.save_for_backward(*inputs, *kept)
        return y

    @staticmethod
    def backward(ctx, grad):
        plan, needs = ctx.plan, ctx.needs_input_grad[2:]
        tensors = ctx.saved_tensors  # read once: checkpointing allows no second look
        inputs, kept = tensors[: len(needs)], tensors[len(needs) :]
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return None, None, *_differentiable_backward(plan, grad, needs, inputs)
        grads = [None] * len(inputs)
        grad_input = None  # of the tensor that a step, and those that join it, read
        reads = _reads(plan, kept, needs, inputs[0])
        for i in range(len(plan) - 1, -1, -1):
            step, (x, need_x, saved) = plan[i], reads[i]
            need = [need_x, *(slot is not None and needs[slot] for slot in step.slots)]
            results = BACKWARD[step.backend, step.operator](grad, need, x, *step.gather(inputs), *saved, *step.options)
            if need_x:
                grad_input = results[0] if grad_input is None else grad_input + results[0]
            for slot, needed, result in zip(step.slots, need[1:], results[1:], strict=True):
                if needed:
                    grads[slot] = result if grads[slot] is None else grads[slot] + result
            if not step.joins:
                grad, grad_input = grad_input, None
                if not need_x:
                    break  # nothing before this step is differentiated
        if needs[0]:
            grads[0] = grad if grads[0] is None else grads[0] + grad
        return None, None, *grads


def _define(plan: Sequence[_Step], inputs: Sequence[Tensor]) -> Tensor:
    """The substeps by their definitions, which autograd differentiates any number of times."""
    x = y = inputs[0]
    for step in plan:
        if not step.joins:
            x = y
        module = definition(step.operator)
        out = module.forward(x, module.Tensors(*step.gather(inputs)), step.options)[0]
        y = y + out if step.joins else out
    return y


def _differentiable_backward(plan, grad, needs, inputs) -> list[Tensor | None]:
    """The backward pass for ``create_graph=True``: through the definitions, whatever backend ran forward."""
    # Views, because one input may depend on another (a context computed from x, a weight shared with the layer below):
    # the gradient in a view ends there, the gradient in the input itself would go on and count that path twice.
    inputs = [t.view_as(t) if need else t for t, need in zip(inputs, needs, strict=True)]
    wanted = [t for t, need in zip(inputs, needs, strict=True) if need]
    y = _define(plan, inputs)
    grads = iter(torch.autograd.grad(y, wanted, grad, create_graph=True, allow_unused=True))
    return [next(grads) if need else None for need in needs]


def operator(bind: Callable[P, Bound]) -> Callable[P, Tensor]:
    """The operator that checks its arguments by ``bind`` and runs what that returns."""

    @functools.wraps(bind)
    def call(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        bound = bind(*args, **kwargs)
        return run(bound.x, (bound,), bound.save)

    call.bind = bind
    return call


class Explanation(NamedTuple):
    """Which backend a call would run on, and why: ``str()`` is a table."""

    operator: str
    backend: str | None
    rows: tuple[tuple[str, bool, str], ...]

    def __str__(self) -> str:
        lines = [f"{self.operator} would run on: {self.backend or 'nothing, see the reasons'}"]
        for name, usable, reason in self.rows:
            mark = "->" if name == self.backend else "  "
            lines.append(f"{mark} {name:10} {'usable' if usable else 'no':7} {reason}")
        return "\n".join(lines)


def explain(operator: Callable, *args, **kwargs) -> Explanation:
    """What ``operator(*args, **kwargs)`` would run on, and why, without running it.

    Example::

        print(macaron_ops.explain(macaron_ops.ffn_step, x, w_in, b_in, w_out, b_out))

    Raises:
        TypeError: ``operator`` is not an operator of this package.
        ValueError, TypeError: what the operator itself would refuse.
    """
    bind = getattr(operator, "bind", None)
    if bind is None:
        raise TypeError(f"operator: expected an operator such as macaron_ops.ffn_step; got {operator!r}")
    bound = bind(*args, **kwargs)
    chosen: Choice = choose(Request(bound.operator, bound.x, bound.tensors, bound.options))
    if bound.definition_only:
        why = "the activation is a Python function: only the definition takes it"
        rows = tuple((name, name == "reference", why) for name, _, _ in chosen.rows)
        return Explanation(bound.operator, "reference" if asked_for() in (None, "reference") else None, rows)
    return Explanation(bound.operator, *chosen)
