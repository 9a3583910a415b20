"""A function that plans launches, done again without planning them.

    again = Recorded(function)
    outputs = again(*arguments)     the first time recorded, from then on replayed

The first call takes note of what ``function`` does: the buffers that it allocates and the launches, which are not
started. A replay does the same in the same order: buffers live from before their first use until after their last, and
kernels start with other pointers. What chose tiles and strides does not run again. So the arguments of all calls must
agree in everything but the tensors' numbers and places: shapes, strides, dtypes, device, places modulo 16 bytes, and
all that is no tensor. What else launchers look at is looked at here, in :meth:`Recorded.__call__`.

A function that does more than allocate, look at tensors through views, describe them, launch and call PyTorch's
attention is called as it is. The latter runs once while it is recorded, for its results' strides.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from operator import itemgetter
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.tools.tensor_descriptor import TensorDescriptor

from .attention_core import OPERATORS, settings
from .device import Launch, recording, target
from .start import Start
from .tiles import in_use, precision

__all__ = ["Recorded"]

_aten = torch.ops.aten
_ALLOCATIONS = (
    _aten.empty.memory_format,
    _aten.empty_like.default,
    _aten.empty_strided.default,
    _aten.new_empty.default,
)
_VIEWS = (
    _aten.view.default,
    _aten._unsafe_view.default,
    _aten.as_strided.default,
    _aten.alias.default,
    _aten.detach.default,
    _aten.select.int,
    _aten.slice.Tensor,
    _aten.split.Tensor,
    _aten.split_with_sizes.default,
    _aten.expand.default,
    _aten.unsqueeze.default,
    _aten.t.default,
    _aten.transpose.int,
)


class Recorded:
    """``function`` of x, other tensors and constants, for calls that agree in all but the tensors' numbers and places.

    It returns one new tensor or several.
    """

    def __init__(self, function: Callable):
        self._function = function
        self._replays: dict[tuple, Callable] = {}
        self._dtype: torch.dtype | None = None  # float32 if an argument has it

    def __call__(self, x: Tensor, *arguments):
        if self._dtype is None:
            narrow = all(t.dtype != torch.float32 for t in (x, *arguments) if isinstance(t, Tensor))
            self._dtype = x.dtype if narrow else torch.float32
        facts = target(x.device), precision(self._dtype), in_use(), settings()
        replay = self._replays.get(facts)
        if replay is None:
            replay = self._replays[facts] = _record(self._function, x, *arguments) or self._function
        return replay(x, *arguments)


class _Unknown(Exception):
    """A call does what a replay cannot do."""


class _Allocations(TorchDispatchMode):
    """Appends new tensors and calls to ``steps``, and refuses every other operator that reads or writes numbers. All
    new tensors live until the function is understood, so they have no memory but while torch looks at them."""

    def __init__(self, steps: list["Launch | Tensor | _Call"]):
        super().__init__()
        self._steps = steps
        self._taken: list[tuple[torch.UntypedStorage, int]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function not in _ALLOCATIONS and function not in _VIEWS and function not in OPERATORS:
            raise _Unknown
        with self._memory_of(args):
            result = function(*args, **(kwargs or {}))
        if function in _ALLOCATIONS:
            self._steps.append(result)
            self._take_memory(result)
        elif function in OPERATORS:
            call = _Call(function, args, kwargs or {}, result)
            self._steps.append(call)
            for made in call.made.values():
                self._take_memory(made)
        return result

    def _take_memory(self, tensor: Tensor) -> None:
        memory = tensor.untyped_storage()
        if memory.nbytes():  # two results may share it
            self._taken.append((memory, memory.nbytes()))
            memory.resize_(0)

    @contextmanager
    def _memory_of(self, args: tuple) -> Iterator[None]:
        read = [a.untyped_storage() for a in args if isinstance(a, Tensor)]
        given = [(memory, size) for memory, size in self._taken if any(memory is other for other in read)]
        for memory, size in given:
            memory.resize_(size)
        try:
            yield
        finally:
            for memory, _ in given:
                memory.resize_(0)


class _Call(NamedTuple):
    """One of PyTorch's operators, which makes new tensors of others."""

    function: Callable
    arguments: tuple
    constants: dict
    results: tuple

    @property
    def given(self) -> list[Tensor]:
        return [a for a in self.arguments if isinstance(a, Tensor)]

    @property
    def made(self) -> dict[int, Tensor]:
        """By their place among the results."""
        return {i: r for i, r in enumerate(self.results) if isinstance(r, Tensor)}

    def again(self) -> Callable:
        """The call as a function of the tensors among its arguments."""
        function, constants = self.function, self.constants
        others = [_TENSOR if isinstance(a, Tensor) else a for a in self.arguments]

        def call(*tensors):
            rest = iter(tensors)
            return function(*(next(rest) if a is _TENSOR else a for a in others), **constants)

        return call


_TENSOR = object()


def _record(function: Callable, *arguments) -> Callable | None:
    """The replay of ``function``; None where there can be none. Nothing is started."""
    device = arguments[0].device
    with recording(*target(device)) as steps:
        try:
            with _Allocations(steps):
                outputs = function(*arguments)
            return _replay(arguments, steps, outputs)
        except _Unknown:
            return None
        finally:
            steps.clear()  # torch may hold the mode, and through it the buffers, until cycles are collected


def _replay(
    arguments: Sequence, steps: Sequence[Launch | Tensor | _Call], outputs: Tensor | Sequence[Tensor]
) -> Callable:
    """The steps in order, on values that have numbers: arguments, then buffers and views of either."""
    given = [a for step in steps if isinstance(step, Launch) for a in step.arguments]
    if not all(a is None or isinstance(a, (int, float, str, Tensor, TensorDescriptor)) for a in given):
        raise _Unknown  # one of them may hold a tensor
    values = [*arguments]
    for step in steps:
        values += step.made.values() if isinstance(step, _Call) else [step] if isinstance(step, Tensor) else []
    memories = [v.untyped_storage() if isinstance(v, Tensor) else None for v in values]
    single = isinstance(outputs, Tensor)
    returned = {_number(y, values, memories): y for y in ([outputs] if single else outputs)}
    if not all(_begins(y, values[number]) for number, y in returned.items()):
        raise _Unknown  # a part of a buffer
    wanted = tuple(returned)
    if min(wanted) < len(arguments) or len(wanted) < (1 if single else len(outputs)):
        raise _Unknown  # not new, or twice the same
    if not all(y.is_contiguous() and y.numel() == values[number].numel() for number, y in returned.items()):
        raise _Unknown  # a part of a buffer, or with strides of its own
    buffer = iter(range(len(arguments), len(values)))
    plan: list[tuple[Callable, Callable, int | None, list[int]]] = []  # function, its arguments, its result, what ends
    last: dict[int, list[int]] = {}  # where the values are used last

    waiting: dict[int, Callable] = {}  # buffers that nothing has used yet: memory is taken when something does

    def append(start: Callable, numbers: Sequence[int], result: int | None) -> None:
        done: list[int] = []
        plan.append((start, _picker(numbers), result, done))
        last.update(dict.fromkeys((n for n in (*numbers, result) if n is not None and n >= len(arguments)), done))

    def add_buffers(numbers: Sequence[int]) -> None:
        for number in dict.fromkeys(numbers):
            if number in waiting:
                append(waiting.pop(number), (), number)

    def add(start: Callable, numbers: Sequence[int], result: int | None) -> None:
        add_buffers(numbers)
        append(start, numbers, result)

    def new() -> int:
        """The number of a value that the plan alone knows."""
        values.append(None)
        memories.append(None)
        return len(values) - 1

    def made(how: Callable, of: int) -> int:
        """The number of what ``how`` makes of a value."""
        number = new()
        add(how, (of,), number)
        return number

    def number_at(tensor: Tensor) -> int:
        """The number of a tensor whose place alone is looked at."""
        number = _number(tensor, values, memories)
        return number if _begins(tensor, values[number]) else made(_viewer(tensor, values[number]), number)

    def seen_as(view: Tensor) -> int:
        """The number of a tensor whose shape and strides are looked at too."""
        number = _number(view, values, memories)
        value = returned.get(number, values[number])
        same = (view.shape, view.stride()) == (value.shape, value.stride()) and _begins(view, value)
        return number if same else made(_viewer(view, value), number)

    for step in steps:
        if isinstance(step, _Call):
            numbers = [seen_as(t) for t in step.given]
            results = new()
            add(step.again(), numbers, results)
            for place, result in step.made.items():
                number = next(buffer)
                add(_taker(place, returned.get(number, result), result), (results,), number)
            continue
        if isinstance(step, Launch):
            bases = [a.base if isinstance(a, TensorDescriptor) else a for a in step.arguments]
            add(Start(step, arguments[0].device), [number_at(t) for t in bases if isinstance(t, Tensor)], None)
            continue
        number = next(buffer)
        t = returned.get(number, step)
        if number in returned and number != wanted[0] and t.numel() == 0:
            start = functools.partial(_same, t)  # what is not kept for the backward pass
        else:
            size = t.shape or ((),)  # number by number: a torch.Size takes three times as long
            start = functools.partial(torch.empty, *size, dtype=t.dtype, device=t.device)
        waiting[number] = start
    add_buffers([number for number in waiting if number in returned])
    for number, done in last.items():
        if number not in returned:
            done.append(number)
    unset = (None,) * (len(values) - len(arguments))

    def replay(*arguments):
        values = [*arguments, *unset]
        for start, pick, result, done in plan:
            if result is None:
                start(*pick(values))
            else:
                values[result] = start(*pick(values))
            for number in done:
                values[number] = None
        return values[wanted[0]] if single else [values[number] for number in wanted]

    return replay


def _viewer(like: Tensor, of: Tensor) -> Callable[[Tensor], Tensor]:
    """Views of other tensors that lie in them as ``like`` does in ``of``: a matrix's last columns, say."""
    size, stride, offset = like.shape, like.stride(), like.storage_offset() - of.storage_offset()
    return lambda t: t.as_strided(size, stride, t.storage_offset() + offset)


def _taker(place: int, like: Tensor, result: Tensor) -> Callable[[Sequence[Tensor]], Tensor]:
    """One of a call's results, in the shape of ``like``, which lies in ``result``."""
    if like is result:
        return itemgetter(place)
    view = _viewer(like, result)
    return lambda results: view(results[place])


def _picker(numbers: Sequence[int]) -> Callable[[list], Sequence]:
    """The values with these numbers."""
    if len(numbers) > 1:
        return itemgetter(*numbers)
    return itemgetter(slice(numbers[0], numbers[0] + 1) if numbers else slice(0))


def _same(t: Tensor) -> Tensor:
    return t


def _number(tensor: Tensor, values: Sequence, memories: Sequence) -> int:
    """Which of ``values`` the tensor is or lies in, in memory that is no other's; ``memories`` are theirs."""
    for number, value in enumerate(values):
        if value is tensor:
            return number
    memory = tensor.untyped_storage()
    found = [number for number, other in enumerate(memories) if other is memory]
    if len(found) != 1 or values[found[0]].dtype != tensor.dtype:
        raise _Unknown
    return found[0]


def _begins(tensor: Tensor, value: Tensor) -> bool:
    """Whether it begins where the value does: all that a kernel asks of a tensor."""
    return tensor.data_ptr() == value.data_ptr()
