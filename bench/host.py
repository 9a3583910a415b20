"""What a call costs the host: everything but the kernels themselves, counted rather than timed.

    calls       functions that Python calls, its own and C's (attributes of tensors are no calls)
    bytecodes   instructions that Python's interpreter executes
    us          CPU time of the thread, the median of many calls: a second opinion, on this machine

The two counts are the same on every machine with the same Python, busy or not, and need no GPU: Triton's launches are
recorded, planned for an H100, and not started. What is counted there is exactly the Python over the bare launches.
The backend `native` computes, at sizes where that takes no time.

    python -m macaron_ops.bench.host
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
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

    def ffn(width, trained, tokens=8, **options):
        x, w_in, b_in, w_out, b_out, *affine = (
            torch.randn(shape).requires_grad_(trained)
            for shape in ((tokens, width), (width, width), (width,), (width, width), (width,), (width,), (width,))
        )
        affine = dict(zip(("norm_weight", "norm_bias"), affine, strict=True))
        return lambda: ffn_step(x, w_in, b_in, w_out, b_out, activation="gelu", **affine, **options)

    def attend(width, trained):
        x, w_qkv, b_qkv, w_out, b_out = (
            torch.randn(shape).requires_grad_(trained)
            for shape in ((8, width), (3 * width, width), (3 * width,), (width, width), (width,))
        )
        return lambda: attend_step(x, w_qkv, b_qkv, w_out, b_out, 2)

    x, u = torch.randn(2, 8, 16)
    trained = x.clone().requires_grad_()
    return {
        "ffn_step, one kernel": ffn(16, False),
        "ffn_step, one kernel, with a gradient to come": ffn(16, True),
        "ffn_step, three kernels": ffn(96, False),
        "ffn_step, three kernels, with a gradient to come": ffn(96, True),
        "normalize_step": lambda: normalize_step(x, u, 0.1),
        "normalize_step, with a gradient to come": lambda: normalize_step(trained, u, 0.1),
        "attend_step": attend(16, False),
        "attend_step, with a gradient to come": attend(16, True),
    }


def measured(backend: str) -> dict[str, tuple[Cost, float]]:
    """The cost of every case that a backend has; Triton's launches are not started."""
    import macaron_ops

    def no_start():
        if backend != "triton":
            return nullcontext()
        from macaron_ops.kernels.device import recording

        return recording("sm90", 132)

    found = {}
    with macaron_ops.use_backend(backend), no_start() as launches:
        for name, call in cases().items():
            if name.split(",")[0] in macaron_ops.backends()[backend].operators:
                found[name] = Cost.of(call), microseconds(call)
            if launches is not None:
                launches.clear()
    return found


def main() -> None:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # or Triton's row of the table declines the CPU
    import torch

    import macaron_ops

    torch.set_num_threads(1)
    for backend in BACKENDS:
        status = macaron_ops.backends()[backend]
        if not status.usable:
            print(f"{backend}: {status.reason}")
            continue
        print(f"{backend:55} calls  bytecodes     us")
        for name, (cost, time_) in measured(backend).items():
            print(f"  {name:53} {cost.calls:5}  {cost.bytecodes:9}  {time_:5.1f}")


if __name__ == "__main__":
    main()
