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


def cases(backend: str) -> dict[str, Call]:
    """The operators that a backend has on few tokens of the CPU; where nothing computes also on many, whose products
    take tensor descriptors. Zeros are memory that nobody has touched yet."""
    import torch

    import macaron_ops
    from macaron_ops import attend_step, ffn_step, normalize_step

    def ffn(trained, tokens, width, hidden, dtype=torch.float32):
        x, w_in, b_in, w_out, b_out, weight, bias = (
            torch.zeros(shape, dtype=dtype).requires_grad_(trained)
            for shape in ((tokens, width), (hidden, width), (hidden,), (width, hidden), (width,), (width,), (width,))
        )
        return lambda: ffn_step(x, w_in, b_in, w_out, b_out, norm_weight=weight, norm_bias=bias, activation="gelu")

    def attend(trained):
        x, w_qkv, b_qkv, w_out, b_out = (
            torch.zeros(shape).requires_grad_(trained) for shape in ((8, 16), (48, 16), (48,), (16, 16), (16,))
        )
        return lambda: attend_step(x, w_qkv, b_qkv, w_out, b_out, 2)

    def normalize(trained):
        x, u = (torch.zeros(8, 16).requires_grad_(trained) for _ in range(2))
        return lambda: normalize_step(x, u, 0.1)

    makers = {
        "ffn_step, D=16": lambda trained: ffn(trained, 8, 16, 16),
        "ffn_step, D=96": lambda trained: ffn(trained, 8, 96, 96),
        "normalize_step": normalize,
        "attend_step": attend,
    }
    if backend == "triton":
        makers["ffn_step, D=1024"] = lambda trained: ffn(trained, 16384, 1024, 4096, torch.bfloat16)
    return {
        f"{name}, {gradient}": make(trained)
        for name, make in makers.items()
        if name.split(",")[0] in macaron_ops.backends()[backend].operators
        for gradient, trained in {"no gradient": False, "a gradient to come": True}.items()
    }


@contextmanager
def calls(backend: str) -> Iterator[dict[str, Call]]:
    """The cases that a backend has, inside a region where they run on it; Triton's launches are not started."""
    import macaron_ops

    with macaron_ops.use_backend(backend), ExitStack() as stack:
        if backend == "triton":
            from macaron_ops.kernels.device import recording

            stack.enter_context(recording("sm90", 132))
        yield cases(backend)


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
