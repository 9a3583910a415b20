"""What a call costs the host: everything but the kernels themselves, counted rather than timed.

    calls       functions that Python calls, its own and C's (attributes of tensors are no calls)
    bytecodes   instructions that Python's interpreter executes
    us          CPU time of the thread, a low quantile of many calls: a second opinion, on this machine

The two counts are the same on every machine with the same Python, busy or not, and need no GPU: Triton's launches are
recorded, planned for an H100, and not started. Its buffers and launches alone, one after the other, are taken off: what
is left is the Python over the bare launches. `tests/kernels/start_offline.py --time` tells what a start takes.
The backend `native` computes, at sizes where that takes no time.

    TRITON_INTERPRET=1 python -m macaron_ops.bench.host

The variable lets the table of backends choose Triton without a GPU. `tests/bench/test_host.py` holds the counts.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, MutableSequence
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

Call = Callable[[], object]
BACKENDS = ("triton", "native")
WARM = 4  # calls before one is counted: caches are filled, and plans made


class Cost(NamedTuple):
    calls: int
    bytecodes: int

    @classmethod
    def of(cls, call: Call) -> Cost:
        """Of one call, after `WARM` others."""
        for _ in range(WARM):
            call()
        return cls(_calls(call), _bytecodes(call))


def _calls(call: Call) -> int:
    count = 0

    def count_call(frame, event, argument):
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(count_call)
    call()
    sys.setprofile(before)  # itself a call, as that of `call` is
    return count - 2


def _bytecodes(call: Call) -> int:
    count = 0

    def count_bytecode(frame, event, argument):
        nonlocal count
        frame.f_trace_opcodes = True
        count += event == "opcode"
        return count_bytecode

    before = sys.gettrace()
    sys.settrace(count_bytecode)
    call()
    sys.settrace(before)
    return count


def microseconds(call: Call, rounds: int = 60, calls: int = 50) -> float:
    """CPU time of one call on this thread: the lower decile of `rounds` means, as other programs only add to it."""
    times = []
    for _ in range(rounds):
        begin = time.thread_time()
        for _ in range(calls):
            call()
        times.append((time.thread_time() - begin) / calls)
    return statistics.quantiles(times, n=10)[0] * 1e6


def over_bare(call: Call, launches: MutableSequence) -> Cost:
    """What `call` costs, as `Cost.of`, over the buffers and launches that it is there for."""
    whole, alone = Cost.of(call), Cost.of(bare(call, launches))
    return Cost(*(a - b for a, b in zip(whole, alone, strict=True)))


def bare(call: Call, launches: MutableSequence) -> Call:
    """The buffers and launches of `call`, which appends the latter to `launches`, and nothing else."""
    import torch

    from macaron_ops.kernels.start import Start

    def run() -> tuple[list, dict]:
        launches.clear()
        call()
        given = [given_to(launch) for launch in launches]
        return [*launches], {t.untyped_storage().data_ptr(): t for each in given for t in each}

    def given_to(launch) -> list:
        """Its tensors and those of its descriptors."""
        given = [a if isinstance(a, torch.Tensor) else getattr(a, "base", None) for a in launch.arguments]
        return [t for t in given if t is not None]

    _held, before = run()  # alive, so that the buffers of the second call lie elsewhere
    made, tensors = run()
    sizes = [(t.numel(), t.dtype) for place, t in tensors.items() if place not in before]  # else it is an argument
    device = torch.device("cpu")
    starts = [(Start(launch, device), given_to(launch)) for launch in made]

    def alone() -> None:
        for size, dtype in sizes:
            torch.empty(size, dtype=dtype, device=device)
        for start, given in starts:
            start(*given)

    return alone


def cases(backend: str) -> dict[str, Call]:
    """The operators that a backend has on few tokens of the CPU; where nothing computes also on as many as take tensor
    descriptors, but no buffer of 32 MB, which glibc would ask of the kernel in each call."""
    import torch

    import macaron_ops
    from macaron_ops import attend_step, ffn_step, normalize_step

    def zeros(*shapes, dtype=torch.float32):
        return [torch.zeros(shape, dtype=dtype) for shape in shapes]

    def ffn(tokens, width, hidden, dtype=torch.float32):
        vector = (width,)
        shapes = (tokens, width), (hidden, width), (hidden,), (width, hidden), vector, vector, vector
        *arguments, weight, bias = tensors = zeros(*shapes, dtype=dtype)
        return tensors, lambda: ffn_step(*arguments, norm_weight=weight, norm_bias=bias, activation="gelu")

    def attend():
        tensors = zeros((8, 16), (48, 16), (48,), (16, 16), (16,))
        return tensors, lambda: attend_step(*tensors, 2)

    def normalize():
        tensors = zeros((8, 16), (8, 16))
        return tensors, lambda: normalize_step(*tensors, 0.1)

    def uses(name, make):
        yield f"{name}, no gradient", make()[1]
        tensors, call = make()
        for t in tensors:
            t.requires_grad_()
        yield f"{name}, a gradient to come", call
        dy = torch.zeros_like(tensors[0])
        yield f"{name}, forward and backward", lambda: torch.autograd.grad(call(), tensors, dy)

    makers = {
        "ffn_step, D=16": lambda: ffn(8, 16, 16),
        "ffn_step, D=96": lambda: ffn(8, 96, 96),
        "normalize_step": normalize,
        "attend_step": attend,
    }
    if backend == "triton":
        makers["ffn_step, D=1024"] = lambda: ffn(3840, 1024, 4096, torch.bfloat16)
    operators = macaron_ops.backends()[backend].operators
    return dict(use for name, make in makers.items() if name.split(",")[0] in operators for use in uses(name, make))


@contextmanager
def calls(backend: str) -> Iterator[tuple[dict[str, Call], MutableSequence]]:
    """The cases that a backend has, inside a region where they run on it, and where the last of Triton's launches are
    found, which are not started."""
    import macaron_ops

    launches = deque(maxlen=16)  # more than a call has, and not the buffers of all of them
    with macaron_ops.use_backend(backend), ExitStack() as stack:
        if backend == "triton":
            from macaron_ops.kernels.device import recording

            stack.enter_context(recording("sm90", 132, launches=launches))
        yield cases(backend), launches


def main() -> None:
    import torch

    import macaron_ops

    torch.set_num_threads(1)
    for backend in BACKENDS:
        status = macaron_ops.backends()[backend]
        if not status.usable:
            print(f"{backend}: {status.reason}")
            continue
        print(f"{backend:40} calls  bytecodes     us")
        with calls(backend) as (those, launches):
            for name, call in those.items():
                cost, time = Cost.of(call), microseconds(call)
                if backend == "triton":
                    cost, time = over_bare(call, launches), time - microseconds(bare(call, launches))
                print(f"  {name:38} {cost.calls:5}  {cost.bytecodes:9}  {time:5.1f}", flush=True)


if __name__ == "__main__":
    main()
