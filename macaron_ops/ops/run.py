"""Substeps as ONE autograd node: the raw forward operators in order, the raw backward operators in reverse.

``save="lean"`` keeps between the two passes each substep's input and what its operator cannot do without (attention
output, a kernel's log-sum-exp); ``"fast"`` keeps also what is expensive to compute again (hidden pre-activations,
projections). Without a gradient to come nothing is kept.
"""

import functools
import threading
from collections.abc import Callable, Hashable, Iterable, Sequence
from types import ModuleType
from typing import NamedTuple, ParamSpec

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .autocast import without_autocast
from .borders import ahead, behind, given, open_borders
from .checks import Derived, choice
from .dispatch import WHOLE, Choice, Request, asked_for, choose, require_reference, select
from .registry import BACKWARD, FORWARD, HANDS, SAVED, definition, prepared, prepared_backward
from .signature import Signed, is_plain_eager, sign

__all__ = ["Bound", "Explanation", "explain", "forget", "operator", "recall", "run"]

P = ParamSpec("P")
SAVE = ("fast", "lean")
STREAMS = 2  # random streams of an operator: dropout of its output, and inside


class Bound(NamedTuple):
    """A checked call of an operator."""

    operator: str
    x: Tensor
    tensors: tuple
    options: tuple
    save: str
    draws: bool = False  # a dropout needs a seed and none was given
    derived: Sequence[Derived] = ()  # those of its tensors that the checks made out of an argument
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
    outputs: int  # how many it returns

    def gather(self, inputs: Sequence) -> list:
        """Its own tensors out of the node's inputs."""
        return [None if slot is None else inputs[slot] for slot in self.slots]

    def needs(self, needs: Sequence[bool], need_x: bool) -> list[bool]:
        """Which of its gradients are needed, out of those of the node's inputs."""
        return [need_x, *(slot is not None and needs[slot] for slot in self.slots)]


class _Plan(NamedTuple):
    """What the node does, whatever the numbers in its inputs are."""

    steps: tuple[_Step, ...]
    save: tuple[str, ...]  # the memory policy of each step
    differentiated: bool
    borders: tuple[bool, ...]  # before each step and after the last: whether something is handed over there
    # Its two passes with everything looked up, for calls with its signature; None: through the raw operators.
    forward: Callable | None = None
    backward: Callable | None = None
    backwards: tuple[Callable, ...] | None = None  # in the place of backward: of each step


class _Remembered(NamedTuple):
    """A plan, and where the node's inputs stand among the tensors of a call."""

    plan: _Plan
    sources: tuple[tuple[int, Callable[[Tensor], Tensor] | None], ...]  # which tensor, and what is made of it
    draws: bool

    def __call__(self, tensors: Sequence[Tensor]) -> Tensor:
        inputs = [tensors[i] if how is None else how(tensors[i]) for i, how in self.sources]
        if self.draws:
            inputs.insert(1, _draw(inputs[0]))
        return _apply(self.plan, *inputs) if self.plan.differentiated else self.plan.forward(inputs)[0]


_MOST = 1024  # plans that are remembered, and signatures that were met
_remembered: dict[Hashable, _Remembered] = {}
_met: dict[Hashable, None] = {}  # one that does not come again, as a batch's length may not, is not worth a plan
_changing = threading.Lock()


def recall(signed: Signed | None) -> _Remembered | None:
    """What was planned for a call with this signature."""
    return None if signed is None else _remembered.get(signed.key)


def forget() -> None:
    """Plan every call anew: the table of backends, or what it says, has changed."""
    with _changing:
        _remembered.clear()
        _met.clear()


def _keep(memory: dict, key: Hashable, value: object) -> None:
    """In the place of the oldest, if there are many."""
    with _changing:
        if len(memory) >= _MOST and key not in memory:
            del memory[next(iter(memory))]
        memory[key] = value


def run(x: Tensor, substeps: Sequence[Bound], save: str, signed: Signed | None = None) -> Tensor:
    """The substeps' output for ``x``; their own ``x`` and ``save`` are not looked at. What was planned is remembered
    by the signature, if the call has one, from the second call with it on."""
    choice("save", save, SAVE)
    why_definition = _why_definition(substeps)
    if why_definition is not None:
        require_reference(why_definition)
    policy = _policy(save, (x, *(t for bound in substeps for t in bound.tensors)))
    backends = [
        "reference" if why_definition is not None else select(Request(s.operator, x, s.tensors, s.options, policy))
        for s in substeps
    ]
    inputs: list[Tensor] = [x]
    draws = any(bound.draws for bound in substeps)
    if draws:  # one seed for all substeps, each with streams of its own
        inputs.append(_draw(x))
    steps: list[_Step] = []
    policies: list[str] = []
    trained = x.requires_grad
    for i, (bound, backend) in enumerate(zip(substeps, backends, strict=True)):
        tensors, options = bound.tensors, bound.options
        if bound.draws:
            tensors, options = tensors._replace(seed=inputs[1]), options._replace(stream=STREAMS * i)
        slots = tuple(_slot(inputs, t) for t in tensors)
        raw = backend, bound.operator
        outputs = 1 + SAVED[raw] + HANDS[raw][0]
        steps.append(_Step(bound.operator, backend, options, bound.joins, slots, SAVED[raw], outputs))
        # Nothing is differentiated, and so nothing saved, before the first trained substep.
        trained = trained or any(t is not None and t.requires_grad for t in tensors)
        policies.append(policy if trained else "none")
    plan = _Plan(tuple(steps), tuple(policies), policy != "none", open_borders(steps))
    if why_definition is not None:
        with without_autocast(x.device):
            return _define(plan.steps, inputs)
    if signed is not None:
        if signed.key in _met:
            _remember(signed, plan, inputs, draws, [d for bound in substeps for d in bound.derived])
        else:
            _keep(_met, signed.key, None)
    return _run(plan, inputs)


def _draw(x: Tensor) -> Tensor:
    """A seed from torch's default generator."""
    return torch.randint(2**63 - 1, (), device=x.device)


def _run(plan: _Plan, inputs: Sequence[Tensor]) -> Tensor:
    return _Substeps.apply(plan, *inputs) if plan.differentiated else _forward(plan, inputs)[0]


def _remember(signed: Signed, plan: _Plan, inputs: Sequence[Tensor], draws: bool, derived: Sequence[Derived]) -> None:
    """The plan for calls with this signature, if every input is an argument or can be derived of one again."""
    arguments = {id(t): (i, None) for i, t in reversed(list(enumerate(signed.tensors)))}
    for d in derived:
        argument, before = arguments[id(d.source)]
        arguments[id(d.result)] = argument, d.how if before is None else _then(before, d.how)
    sources = [arguments.get(id(t)) for t in inputs[:1] + inputs[2 if draws else 1 :]]
    if None not in sources:
        _keep(_remembered, signed.key, _Remembered(_prepare(plan), tuple(sources), draws))


def _then(first: Callable[[Tensor], Tensor], second: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda t: second(first(t))


def _prepare(plan: _Plan) -> _Plan:
    """The plan with what can be looked up once, past torch's dispatcher where nothing but a signed call comes."""
    whole = _whole(plan.steps)
    if whole is not None:
        return plan._replace(forward=whole.forward(plan.steps, plan.save), backward=whole.backward(plan.steps))
    operators = [prepared(step.backend, step.operator) for step in plan.steps]
    backwards = tuple(prepared_backward(step.backend, step.operator) for step in plan.steps)
    return plan._replace(forward=functools.partial(_one_by_one, plan, operators), backwards=backwards)


def _policy(save: str, tensors: Iterable[Tensor | None]) -> str:
    """``save``, or "none" without a gradient to come."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return save
    return "none"


def _slot(inputs: list[Tensor], tensor: Tensor | None) -> int | None:
    """Where ``tensor`` stands among ``inputs``, appended if it is new: a tensor used twice is one input of the node.

    Found by ``is``: torch.compile would compile again for every new ``id``.
    """
    if tensor is None:
        return None
    for slot, seen in enumerate(inputs):
        if seen is tensor:
            return slot
    inputs.append(tensor)
    return len(inputs) - 1


def _why_definition(substeps: Sequence[Bound]) -> str | None:
    """Why only the definitions can run a call; None where the raw operators can."""
    if any(bound.definition_only for bound in substeps):
        return "a Python function as activation is taken by the definition only"
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return "torch.func's transforms and forward-mode differentiation go through the definition only"
    return None


def _whole(steps: Sequence[_Step]) -> ModuleType | None:
    """The backend's own functions for lists of substeps, if all of ``steps`` run on it and it has them."""
    backend = steps[0].backend
    return WHOLE.get(backend) if all(step.backend == backend for step in steps) else None


def _forward(plan: _Plan, inputs: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The output, and what the backward pass reads: for each step its input (unless it is x, or the same as the
    step's before it; empty where nothing is saved), then what the raw operator saved."""
    if plan.forward is not None:
        return plan.forward(inputs)
    whole = _whole(plan.steps)
    if whole is not None:
        return whole.forward(plan.steps, plan.save)(inputs)
    return _one_by_one(plan, [FORWARD[step.backend, step.operator] for step in plan.steps], inputs)


def _one_by_one(plan: _Plan, operators: Sequence[Callable], inputs: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    kept, x, y, normalized = [], inputs[0], inputs[0], None
    for i, (step, save, operator) in enumerate(zip(plan.steps, plan.save, operators, strict=True)):
        if not step.joins:
            x = y
            if i > 0:
                kept.append(x if _is_kept(plan, i) else x.new_empty(0))
        hands = plan.borders[i + 1]
        more = ahead(plan.steps, i, hands, x, inputs, normalized) if hands or plan.borders[i] else ()
        outputs = operator(x, *step.gather(inputs), *step.options, save, *more)
        out, *others = (outputs,) if step.outputs == 1 else outputs
        kept += others[: step.saved]
        normalized = given(others[-1]) if hands else None
        y = y + out if step.joins else out
    return y, kept


def _is_kept(plan: _Plan, i: int) -> bool:
    """Whether the backward pass reads the input of step ``i``, which those after it that join it read too."""
    for j in range(i, len(plan.steps)):
        if j > i and not plan.steps[j].joins:
            return False
        if plan.save[j] != "none":
            return True
    return False


def _reads(steps: Sequence[_Step], kept: Sequence[Tensor], needs: Sequence[bool], x: Tensor) -> list[tuple]:
    """For each step: the tensor that it read, whether that one's gradient is needed, and what the step saved."""
    reads, at = [], 0
    need_x = need_y = needs[0]
    for i, step in enumerate(steps):
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
    def forward(ctx, plan, *inputs):
        y, kept = _forward(plan, inputs)
        ctx.plan = plan
        ctx.save_for_backward(*inputs, *kept)
        return y

    @staticmethod
    def backward(ctx, grad):
        steps, borders, needs = ctx.plan.steps, ctx.plan.borders, ctx.needs_input_grad[1:]
        tensors = ctx.saved_tensors  # read once: checkpointing allows no second look
        inputs, kept = tensors[: len(needs)], tensors[len(needs) :]
        if not torch.compiler.is_compiling():
            if torch.is_grad_enabled():
                return None, *_differentiable_backward(steps, grad, needs, inputs)
            ctx.maybe_clear_saved_tensors()  # unless the graph is retained: what a step kept goes when it has run
        whole = _whole(steps)
        if whole is not None:
            backward = ctx.plan.backward or whole.backward(steps)
            return None, *backward(grad, needs, inputs, kept)
        backwards = ctx.plan.backwards if is_plain_eager() else None
        grads = [None] * len(inputs)
        grad_input = None  # of the tensor that a step, and those that join it, read
        handed = ()  # by the step that ran before, which comes after
        reads = _reads(steps, kept, needs, inputs[0])
        del tensors, kept
        for i in range(len(steps) - 1, -1, -1):
            step, (x, need_x, saved) = steps[i], reads.pop()
            need, dropped = step.needs(needs, need_x), None
            if borders[i + 1] and handed:
                dropped, by_bias = map(given, handed)
                if by_bias is not None:
                    place = definition(step.operator).Tensors._fields.index("b_out")
                    _add(grads, step.slots[place], by_bias)
                    need[1 + place] = False
            handed = ()
            if any(need):
                more = ()
                if borders[i] or borders[i + 1]:
                    before = steps[i - 1].needs(needs, reads[i - 1][1]) if borders[i] else None
                    more = behind(steps, i, before, x, inputs, dropped)
                backward = backwards[i] if backwards else BACKWARD[step.backend, step.operator]
                grad_x, *results = backward(grad, need, x, *step.gather(inputs), *saved, *step.options, *more)
                if need_x:
                    grad_input = grad_x if grad_input is None else grad_input + grad_x
                results, handed = results[: len(step.slots)], results[len(step.slots) :]
                for slot, needed, result in zip(step.slots, need[1:], results, strict=True):
                    if needed:
                        _add(grads, slot, result)
            if not step.joins:
                grad, grad_input = grad_input, None
                if not need_x:
                    break  # nothing before this step is differentiated
        if needs[0]:
            _add(grads, 0, grad)
        return None, *grads


# As `_Substeps.apply` ends, for a call that no transform looks on at, which it finds out each time.
_apply = super(torch.autograd.Function, _Substeps).apply


def _add(grads: list[Tensor | None], slot: int, result: Tensor) -> None:
    grads[slot] = result if grads[slot] is None else grads[slot] + result


def _define(steps: Sequence[_Step], inputs: Sequence[Tensor]) -> Tensor:
    """The substeps by their definitions, which autograd differentiates any number of times."""
    x = y = inputs[0]
    for step in steps:
        if not step.joins:
            x = y
        module = definition(step.operator)
        out = module.forward(x, module.Tensors(*step.gather(inputs)), step.options)[0]
        y = y + out if step.joins else out
    return y


def _differentiable_backward(steps, grad, needs, inputs) -> list[Tensor | None]:
    """The backward pass for ``create_graph=True``: through the definitions, whatever backend ran forward."""
    # Views, because one input may depend on another (a context computed from x, a weight shared with the layer below):
    # the gradient in a view ends there, the gradient in the input itself would go on and count that path twice.
    inputs = [t.view_as(t) if need else t for t, need in zip(inputs, needs, strict=True)]
    wanted = [t for t, need in zip(inputs, needs, strict=True) if need]
    with without_autocast(grad.device):
        y = _define(steps, inputs)
        grads = iter(torch.autograd.grad(y, wanted, grad, create_graph=True, allow_unused=True))
    return [next(grads) if need else None for need in needs]


def operator(bind: Callable[P, Bound]) -> Callable[P, Tensor]:
    """The operator that checks its arguments by ``bind`` and runs what that returns, or what it remembers."""

    @functools.wraps(bind)
    def call(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        signed = sign(bind, args, kwargs)
        remembered = recall(signed)
        if remembered is not None:
            return remembered(signed.tensors)
        bound = bind(*args, **kwargs)
        return run(bound.x, (bound,), bound.save, signed)

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
    save = _policy(bound.save, (bound.x, *bound.tensors))
    chosen: Choice = choose(Request(bound.operator, bound.x, bound.tensors, bound.options, save))
    why = _why_definition([bound])
    if why is not None:
        rows = tuple((name, name == "reference", why) for name, _, _ in chosen.rows)
        return Explanation(bound.operator, "reference" if asked_for() in (None, "reference") else None, rows)
    return Explanation(bound.operator, *chosen)
