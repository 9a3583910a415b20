"""How one time is taken.

The variants of a group run interleaved, one sample of each in a round, each round starting with another variant, so
that a machine that slows down or wakes up does it to all of them. A sample repeats its call until it is long enough
to read, and is the mean of those calls. Rounds go on until every median has settled or the time budget is spent.
What is told is the median with the 20th and 80th percentiles; a ratio is the median of the ratios within each round.

On CUDA every call is timed twice: as Python launches it, with the gaps that the host leaves between short kernels, and
as the replay of a CUDA graph of it, which has none. `group.in_turn` keeps small tensors from being timed in the cache.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

Call = Callable[[], object]
PERCENTILES = (0, 5, 20, 50, 80, 95, 100)


@dataclass(frozen=True)
class Budget:
    """How long to look. `seconds` is for each variant of the group; `settled` is the relative error of a median."""

    seconds: float
    min_rounds: int = 7
    max_rounds: int = 200
    sample_seconds: float = 0.01
    warmup_calls: int = 2
    settled: float = 0.004


class Clock(Protocol):
    method: str
    warmup_seconds: float

    def sample(self, call: Call, calls: int) -> float:
        """Mean seconds of one of `calls` calls in a row."""

    def now(self) -> float:
        """Host seconds, for the budget."""


class HostClock:
    """Wall time on the host: right for the CPU, whose operators return when they are done."""

    method = "host clock"
    warmup_seconds = 0.0

    def sample(self, call: Call, calls: int) -> float:
        begin = time.perf_counter()
        for _ in range(calls):
            call()
        return (time.perf_counter() - begin) / calls

    def now(self) -> float:
        return time.perf_counter()


class CudaClock(HostClock):
    """Device time between two events around the calls; the gaps that the host leaves between launches are in it.

    A GPU's clocks rise while it works, so a call is repeated for a while before it is timed.
    """

    method = "CUDA events"
    warmup_seconds = 0.03

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def sample(self, call: Call, calls: int) -> float:
        with torch.cuda.device(self.device):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            for _ in range(calls):
                call()
            end.record()
            end.synchronize()
        return begin.elapsed_time(end) * 1e-3 / calls


def clock_for(device: torch.device) -> Clock:
    return CudaClock(device) if device.type == "cuda" else HostClock()


GRAPH = "CUDA graph"


def replay(call: Call, device: torch.device, calls: int = 1, warmup_calls: int = 3) -> Call:
    """`calls` calls captured in a CUDA graph: its replay has the kernels' time and no gap of the host's.

    Their results live until the capture ends, so that no two of the calls write to the same memory. A graph of autograd
    that is still alive would tie the capture to the stream that it was made on: cycles are collected first.
    """
    with torch.cuda.device(device):
        current = torch.cuda.current_stream()
        stream = torch.cuda.Stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            for _ in range(warmup_calls):
                call()
        current.wait_stream(stream)
        gc.collect()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=stream):
                results = [call() for _ in range(calls)]
            del results
        finally:
            torch.cuda.set_stream(current)  # where a capture fails, torch leaves its own stream in place
    return graph.replay


def percentile(samples: tuple[float, ...], q: float) -> float:
    """The q-th percentile, linear between the ordered samples."""
    ordered = sorted(samples)
    position = (len(ordered) - 1) * q / 100
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


@dataclass(frozen=True)
class Timing:
    """Seconds of one call, one sample a round, and how many calls each sample is the mean of."""

    samples: tuple[float, ...]
    calls: int

    def of_each(self, parts: int) -> Timing:
        """Of one of the `parts` equal parts that each call consists of."""
        return Timing(tuple(sample / parts for sample in self.samples), self.calls * parts)

    @property
    def median(self) -> float:
        return percentile(self.samples, 50)

    def settled(self, tolerance: float) -> bool:
        spread = percentile(self.samples, 80) - percentile(self.samples, 20)
        return spread / self.median <= tolerance * math.sqrt(len(self.samples))

    def as_json(self) -> dict[str, object]:
        return summary(self.samples) | {"unit": "s", "rounds": len(self.samples), "calls_per_sample": self.calls}


def summary(samples: tuple[float, ...]) -> dict[str, object]:
    """Median, 20th and 80th percentile, and the other percentiles beside them."""
    return {
        "median": percentile(samples, 50),
        "p20": percentile(samples, 20),
        "p80": percentile(samples, 80),
        "percentiles": {str(q): percentile(samples, q) for q in PERCENTILES},
    }


def speedup(of: Timing, over: Timing) -> dict[str, object]:
    """`over`'s time / `of`'s time, round by round: above 1, `of` is the faster."""
    return summary(tuple(b / a for a, b in zip(of.samples, over.samples, strict=True)))


def measure(
    variants: Mapping[str, Call],
    clock: Clock,
    budget: Budget,
    on_round: Callable[[float], None] = lambda share: None,
) -> dict[str, Timing]:
    """Times every variant, interleaved. `on_round` is told the share of the budget that is spent, 0 to 1.

    Exceptions of a call pass through: prepare and check a variant before it is timed.
    """
    calls = {name: _calls_per_sample(call, clock, budget) for name, call in variants.items()}
    samples: dict[str, list[float]] = {name: [] for name in variants}
    names = list(variants)
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        begin = clock.now()
        for turn in range(budget.max_rounds):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                samples[name].append(clock.sample(variants[name], calls[name]))
            spent = (clock.now() - begin) / (budget.seconds * len(names))
            on_round(min(1.0, max(spent, (turn + 1) / budget.max_rounds)))
            timings = {name: Timing(tuple(samples[name]), calls[name]) for name in names}
            enough = spent >= 1 or all(timing.settled(budget.settled) for timing in timings.values())
            if turn + 1 >= budget.min_rounds and enough:
                break
    finally:
        if collecting:
            gc.enable()
    return timings


def _calls_per_sample(call: Call, clock: Clock, budget: Budget) -> int:
    """Warms the call up and finds how many calls fill a sample. One call that takes the whole budget is enough."""
    begin = clock.now()
    seconds = clock.sample(call, 1)
    done = 1
    while seconds < budget.seconds and (done < budget.warmup_calls or clock.now() - begin < clock.warmup_seconds):
        seconds = min(seconds, clock.sample(call, 1))
        done += 1
    return max(1, min(10_000, math.ceil(budget.sample_seconds / max(seconds, 1e-9))))
