"""How much memory one call takes, in bytes above the level before the call.

    peak_bytes         the high-water mark: the output, the gradients, what is saved for the backward, and every
                       temporary alive at the worst moment
    activation_bytes   the same without what the call returns (its output and gradients): what a training step needs
                       beyond its parameters, gradients and the layer's own output
    kept_bytes         what the forward leaves behind for the backward, its output included; null for a forward alone
    kept_by_formula    the same by ``activations.kept_bytes``, for the layers that it knows

They come from the allocator's events: on CUDA of its own record, on the CPU of torch.profiler's.
The native kernels of macaron_ops have scratch memory of their own, outside torch's allocator: its high-water mark,
which the library tells, is added. The two need not peak at the same moment, so the sum is an upper bound. Between
calls the library keeps up to 64 MiB of scratch for the next one; nothing counts as taken while it waits.

Parameters and inputs exist before the call and do not count. Memory that another library takes for itself outside
torch's allocator (a GEMM's packing buffers) is not seen on either device.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch._C._profiler import _EventType

CPU_METHOD = "torch.profiler's CPU allocator events + high-water mark of the native kernels' scratch memory"
CUDA_METHOD = "the record of the CUDA caching allocator"

Call = Callable[[], object]


@dataclass(frozen=True)
class Levels:
    """While a call ran and its result lived: the highest, the highest of what did not outlive it, the last."""

    peak: int
    passing: int
    final: int


def weigh(call: Call, forward: Call | None, device: torch.device) -> dict[str, object]:
    """A row's `memory`. `forward` returns an output whose graph is still alive."""
    call()  # the second call of its kind may plan those that come, with buffers of its own
    levels = _levels(call, device)
    return {
        "peak_bytes": levels.peak,
        "activation_bytes": levels.passing,
        "kept_bytes": kept_bytes(forward, device) if forward else None,
        "method": CUDA_METHOD if device.type == "cuda" else CPU_METHOD,
    }


def kept_bytes(forward: Call, device: torch.device) -> int:
    """Level after a forward whose output, and through it the autograd graph, is still alive."""
    return _levels(forward, device).final


def _levels(call: Call, device: torch.device) -> Levels:
    collecting = gc.isenabled()
    gc.disable()  # what older calls left behind must not be given back while this one runs
    try:
        return _cuda_levels(call, device) if device.type == "cuda" else _cpu_levels(call)
    finally:
        if collecting:
            gc.enable()


def _cuda_levels(call: Call, device: torch.device) -> Levels:
    torch.cuda.synchronize(device)
    record, index = torch.cuda.memory._record_memory_history, torch.cuda._utils._get_device_index(device, optional=True)
    record(None)  # a new record begins
    record(context=None)
    try:
        result = call()
        torch.cuda.synchronize(device)
        events = torch.cuda.memory._snapshot(device)["device_traces"][index]
    finally:
        record(None)
    signs = {"alloc": 1, "free_requested": -1}
    levels = _levels_of([(e["addr"], signs[e["action"]] * e["size"]) for e in events if e["action"] in signs])
    del result
    return levels


def _cpu_levels(call: Call) -> Levels:
    _scratch_peak()  # starts its mark anew
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profiler:
        result = call()
    scratch = _scratch_peak()
    events = profiler.profiler.kineto_results.experimental_event_tree()
    blocks = sorted(_allocations(events), key=lambda block: block[0])
    levels = _levels_of([block[1:] for block in blocks])
    del result
    return Levels(levels.peak + scratch, levels.passing + scratch, levels.final)


def _levels_of(blocks: Sequence[tuple[int, int]]) -> Levels:
    """Of blocks in the order of their events: (address, bytes; fewer than none where it is given back)."""
    staying = _staying(blocks)
    level = passing = 0
    levels, passings = [0], [0]
    for index, (_, size) in enumerate(blocks):
        level += size
        levels.append(level)
        passing += 0 if index in staying else size
        passings.append(passing)
    return Levels(max(levels), max(passings), level)


Allocation = tuple[int, int, int]  # (nanoseconds, address, bytes; fewer than none where it is given back)


def _allocations(events: Iterable) -> Iterator[Allocation]:
    for event in events:
        if event.tag == _EventType.Allocation:
            yield event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size
        yield from _allocations(event.children)


def _staying(blocks: Sequence[tuple[int, int]]) -> set[int]:
    """Which of them were never given back."""
    live = {}
    for index, (address, size) in enumerate(blocks):
        if size > 0:
            live[address] = index
        else:
            live.pop(address, None)
    return set(live.values())


def _scratch_peak() -> int:
    """The most bytes of scratch memory in use at a time since this was last asked; 0 without native kernels."""
    from macaron_ops import native

    return torch.ops.macaron_ops_cpu.scratch_peak() if native.library() else 0
