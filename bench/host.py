"""What a call costs the host: everything but the kernels themselves, counted rather than timed.

    calls       functions that Python calls, its own and C's (attributes of tensors are no calls)
    bytecodes   instructions that Python's interpreter executes
    us          CPU time of the thread, the median of many calls: a second opinion, on this machine

The two counts are the same on every machine with the same Python, busy or not, and need no GPU: Triton's launches are
recorded, planned for an H100, and not started. What is counted there is exactly the Python over the bare launches.
The backend `native` computes, at sizes where that takes no time.

    TRITON_INTERPRET=1 python -m macaron_ops.bench.host

The variable lets the table of backends choose Triton without a GPU. `tests/bench/test_host.py` holds the counts.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator
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


def microseconds(call: Call, rounds: int = 30, calls: int = 100) -> float:
    """CPU time of one call on this thread: the median of `rounds` means."""
    times = []
    for _ in range(rounds):
        begin = time.thread_time()
        for _ in range(calls):
            call()
        times.append((time.thread_time() - begin) / calls)
    return statistics.median(times) * 1e6


def cases() -> dict[str, Call]:
    """The operators on few tokens of the CPU."""
    import torch

    from macaron_ops import attend_step, ffn_step, normalize_step

    def ffn(width, trained):
        x, w_in, b_in, w_out, b_out, weight, bias = (
            torch.randn(shape).requires_grad_(trained)
            for shape in ((8, width), (width, width), (width,), (width, width), (width,), (width,), (width,))
        )
        return lambda: ffn_step(x, w_in, b_in, w_out, b_out, norm_weight=weight, norm_bias=bias, activation="gelu")

    def attend(width, trained):
        x, w_qkv, b_qkv, w_out, b_out = (
            torch.randn(shape).requires_grad_(trained)
            for shape in ((8, width), (3 * width, width), (3 * width,), (width, width), (width,))
        )
        return lambda: attend_step(x, w_qkv, b_qkv, w_out, b_out, 2)

    def normalize(trained):
        x, u = (torch.randn(8, 16).requires_grad_(trained) for _ in range(2))
        return lambda: normalize_step(x, u, 0.1)

    return {
        f"{name}, {gradient}": make(trained)
        for name, make in {
            "ffn_step, D=16": lambda trained: ffn(16, trained),
            "ffn_step, D=96": lambda trained: ffn(96, trained),
            "normalize_step": normalize,
            "attend_step": lambda trained: attend(16, trained),
        }.items()
        for gradient, trained in {"no gradient": False, "a gradient to come": True}.items()
    }


@contextmanager
def calls(backend: str) -> Iterator[dict[str, Call]]:
    """The cases that a backend has, inside a region where they run on it; Triton's launches are not started."""
    import macaron_ops

    operators = macaron_ops.backends()[backend].operators
    with macaron_ops.use_backend(backend), ExitStack() as stack:
        if backend == "triton":
            from macaron_ops.kernels.device import recording

            stack.enter_context(recording("sm90", 132))
        yield {name: call for name, call in cases().items() if name.split(",")[0] in operators}


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
        with calls(backend) as those:
            for name, call in those.items():
                cost = Cost.of(call)
                print(f"  {name:38} {cost.calls:5}  {cost.bytecodes:9}  {microseconds(call):5.1f}")


if __name__ == "__main__":
    main()
