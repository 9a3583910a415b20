"""How much memory one call takes, in bytes of torch's allocator above the level before the call.

`peak_bytes` is the high-water mark: the output, the gradients, what is saved for the backward, and every temporary
tensor alive at the worst moment. `kept_bytes` is what the forward leaves behind for the backward, its output included.
On CUDA both come from the allocator's statistics, on the CPU from the allocator's events that torch.profiler records:
the same definition. Parameters and inputs exist before the call and do not count; memory that a kernel library takes
for itself outside torch's allocator (a GEMM's packing buffers) is not seen on either device.
"""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch

CPU_METHOD = "torch.profiler's CPU allocator events"
CUDA_METHOD = "CUDA caching allocator statistics"


def method(device: torch.device) -> str:
    return CUDA_METHOD if device.type == "cuda" else CPU_METHOD


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """High-water mark of one call."""
    return _levels(call, device)[0]


def kept_bytes(forward: Callable[[], object], device: torch.device) -> int:
    """Level after a forward whose output, and through it the autograd graph, is still alive."""
    return _levels(forward, device)[1]


def _levels(call: Callable[[], object], device: torch.device) -> tuple[int, int]:
    """(highest, final) level while `call` runs and its result lives."""
    gc.collect()
    return _cuda_levels(call, device) if device.type == "cuda" else _cpu_levels(call)


def _cuda_levels(call: Callable[[], object], device: torch.device) -> tuple[int, int]:
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    result = call()
    torch.cuda.synchronize(device)
    levels = torch.cuda.max_memory_allocated(device) - before, torch.cuda.memory_allocated(device) - before
    del result
    return levels


def _cpu_levels(call: Callable[[], object]) -> tuple[int, int]:
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profiler:
        result = call()
    highest = level = 0
    allocations = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(allocations, key=lambda event: event.start_ns()):
        level += event.nbytes()
        highest = max(highest, level)
    del result
    return highest, level
