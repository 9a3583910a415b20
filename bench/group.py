"""A group: variants that do the same work on the same inputs and are timed against one another."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .options import Options

EAGER = "eager"
COMPILED = "torch.compile"
PRODUCTS = "bare products"
SDPA = "scaled_dot_product_attention"
KEOPS = "pykeops"
BEFORE, AFTER = "transformers", "replace_layers"
AUTO, REFERENCE = "auto", "reference"
OURS = "macaron_ops"  # "macaron_ops native": the backend's name follows


@dataclass(frozen=True)
class Ready:
    """A variant that can run. `call` is what is checked and timed; `forward` keeps the graph alive, for its memory.
    After `turns` calls the same memory is read again; a CUDA graph holds so many."""

    call: Callable[[], Sequence[Tensor]]
    forward: Callable[[], Tensor] | None = None
    turns: int = 1


@dataclass(frozen=True)
class Variant:
    """One implementation. `prepare` may be slow and may raise; `check` raises correctness.WrongResult. What is not
    `capturable` is never captured in a CUDA graph: a capture that fails leaves torch's random generator broken."""

    name: str
    prepare: Callable[[], Ready]
    check: Callable[[Sequence[Tensor]], dict[str, object]] | None = None
    measures_memory: bool = True
    keeps: int | None = None  # bytes between forward and backward, by formula
    capturable: bool = True


@dataclass(frozen=True)
class Group:
    """`build(names)` makes the inputs and the named variants, in order; `names` are all it can build."""

    suite: str
    subject: str
    shape: dict[str, object]
    dtype: str
    direction: str
    tokens: int
    flops: int | None
    denominator: str
    names: tuple[str, ...]
    build: Callable[[Sequence[str]], Iterable[Variant]]
    extra: dict[str, object] = field(default_factory=dict)
    min_rounds: int | None = None  # instead of the budget's, where a call takes seconds
    bytes: int | None = None  # what must be read and written, where memory is the limit

    @property
    def name(self) -> str:
        return f"{self.suite} {self.subject} {self.dtype} {self.direction}"

    def words(self, name: str) -> tuple[str, ...]:
        """What a filter sees of one measurement."""
        return (self.suite, self.subject, self.dtype, self.direction, name)


def gradients(forward: Callable[[], Tensor], wrt: Sequence[Tensor], grad: Tensor, direction: str) -> Ready:
    """`forward()` alone and without a graph, or with the gradients of <forward(), grad> with respect to `wrt`.

    Gradients are returned afresh, as after `zero_grad(set_to_none=True)`; the input's is among them, as in mid-stack.
    """
    if direction == "forward":

        def call() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (forward(),)

        return Ready(call)

    def call() -> tuple[Tensor, ...]:
        y = forward()
        return (y.detach(), *torch.autograd.grad(y, wrt, grad))

    return Ready(call, forward)


def copies(nbytes: int, device: torch.device) -> int:
    """How many sets of tensors of `nbytes` bytes fill three times the GPU's L2 cache, so that a call that takes them
    in turn reads each from memory. 1 on the CPU, whose caches are part of what is measured there."""
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(1, min(_MOST_COPIES, -(-3 * cache // max(nbytes, 1))))


_MOST_COPIES = 128


def in_turn(readies: Sequence[Ready]) -> Ready:
    """The same work on other memory at each call."""
    if len(readies) == 1:
        return readies[0]
    calls = itertools.cycle([ready.call for ready in readies])
    return Ready(lambda: next(calls)(), readies[0].forward, len(readies))


def backend_names(options: Options, operators: Sequence[str] = ()) -> tuple[str, ...]:
    """The backends of macaron_ops to measure: those asked for, else those that can run on the device.

    Where more than one is fused, or the one lacks some of `operators`, AUTO is among them: each operator on its best.
    The reference is plain PyTorch and slow; a quick run has it only where there is nothing else.
    """
    from macaron_ops.ops import dispatch

    if options.backends:
        return options.backends
    device = options.device.type
    usable = [row.name for row in dispatch.BACKENDS if dispatch.UNUSABLE[row.name] is None]
    here = [row.name for row in dispatch.BACKENDS if row.name in usable and device in (row.devices or (device,))]
    fused = [name for name in here if name != REFERENCE]
    mixed = len(fused) > 1 or (fused and not set(operators) <= set(dispatch.OPERATORS_OF[fused[0]]))
    names = [AUTO, *fused] if mixed else fused
    return tuple(names if fused and options.effort == "quick" else [*names, REFERENCE])


def on_backend(name: str, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`forward` under `macaron_ops.use_backend(name)`, or as macaron_ops chooses for AUTO."""
    import macaron_ops

    if name == AUTO:
        return forward

    def run(**tensors: Tensor) -> Tensor:
        with macaron_ops.use_backend(name):
            return forward(**tensors)

    return run
