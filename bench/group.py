"""A group: variants that do the same work on the same inputs and are timed against one another."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

EAGER = "eager"
COMPILED = "torch.compile"
PRODUCTS = "bare products"
BEFORE, AFTER = "transformers", "replace_layers"
AUTO = "auto"
OURS = "macaron_ops"  # "macaron_ops native": the backend's name follows


@dataclass(frozen=True)
class Ready:
    """A variant that can run. `call` is what is checked and timed; `forward` keeps the graph alive, for its memory."""

    call: Callable[[], Sequence[Tensor]]
    forward: Callable[[], Tensor] | None = None


@dataclass(frozen=True)
class Variant:
    """One implementation. `prepare` may be slow and may raise; `check` raises correctness.WrongResult."""

    name: str
    prepare: Callable[[], Ready]
    check: Callable[[Sequence[Tensor]], dict[str, object]] | None = None
    measures_memory: bool = True


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


def backend_names() -> tuple[str, ...]:
    """The backends of macaron_ops that can run here; with more than one also AUTO, each operator on its best."""
    import macaron_ops

    usable = tuple(name for name, status in macaron_ops.backends().items() if status.usable)
    return (AUTO, *usable) if len(usable) > 1 else usable


def on_backend(name: str, forward: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """`forward` under `macaron_ops.use_backend(name)`, or as macaron_ops chooses for AUTO."""
    import macaron_ops

    if name == AUTO:
        return forward

    def run() -> Tensor:
        with macaron_ops.use_backend(name):
            return forward()

    return run
