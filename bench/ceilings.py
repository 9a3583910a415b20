"""What this machine can do at its best, measured in the same run as the layers: the denominators of every share.

    copy bandwidth   a copy of a buffer far larger than the caches, counting bytes read plus bytes written
    GEMM rate        the best of a few large square products of torch.mm in the run's dtype, random operands

Each is its fastest sample, with as many threads and at the same clocks as what is measured beside it; of a GPU the
clocks during the product are told. A run measures them before its first and after its last group and keeps the better:
a ceiling taken while something else was running would be no ceiling.
"""

from __future__ import annotations

import math

import torch

from . import environment, numbers
from .timing import Budget, clock_for, measure

_BUDGET = {"cpu": Budget(seconds=0.5, min_rounds=5), "cuda": Budget(seconds=0.5, min_rounds=10)}
_GEMM_SIZES = {"cpu": (1024, 2048), "cuda": (4096, 8192)}
_LOAD_SECONDS = 0.5  # of queued products while the clocks are read
_COPY_BYTES = {"cpu": 256 << 20, "cuda": 2 << 30}


def measure_ceilings(device: torch.device, dtypes: list[torch.dtype], seed: int) -> dict[str, object]:
    """{"copy": {bytes_per_s, ...}, "gemm": {dtype: {flops_per_s, size, ...}}} as they go into the results."""
    return {
        "copy": _copy_bandwidth(device, seed),
        "gemm": {str(dtype).removeprefix("torch."): _gemm_rate(device, dtype, seed) for dtype in dtypes},
    }


def told(measured: dict[str, object]) -> str:
    """In a line."""
    gemm = (f"{dtype} {numbers.rate(rate['flops_per_s'])} TFLOP/s" for dtype, rate in measured["gemm"].items())
    return ", ".join([f"copy {numbers.digits(measured['copy']['bytes_per_s'] / 1e9)} GB/s", *gemm])


def better(first: dict[str, object], second: dict[str, object]) -> dict[str, object]:
    """The higher of two measurements of each ceiling; a dtype may be in one of them alone."""
    gemm = {
        dtype: max(
            (measured["gemm"][dtype] for measured in (first, second) if dtype in measured["gemm"]),
            key=lambda measured: measured["flops_per_s"],
        )
        for dtype in first["gemm"] | second["gemm"]
    }
    copy = max(first["copy"], second["copy"], key=lambda measured: measured["bytes_per_s"])
    return {"copy": copy, "gemm": gemm}


def disagreement(first: dict[str, object], second: dict[str, object]) -> float:
    """The largest relative difference between two measurements: how unsteady the machine was during the run."""
    pairs = [(rate["flops_per_s"], second["gemm"][dtype]["flops_per_s"]) for dtype, rate in first["gemm"].items()]
    pairs.append((first["copy"]["bytes_per_s"], second["copy"]["bytes_per_s"]))
    return max(abs(a - b) / max(a, b) for a, b in pairs)


def _copy_bandwidth(device: torch.device, seed: int) -> dict[str, object]:
    # Random: some GPUs copy and multiply zeros faster than other numbers.
    generator = torch.Generator(device=device).manual_seed(seed)
    source = torch.rand(_COPY_BYTES[device.type] // 4, generator=generator, device=device)
    target = torch.empty_like(source)
    timing = measure({"copy": lambda: target.copy_(source)}, clock_for(device), _BUDGET[device.type])["copy"]
    moved = 2 * source.numel() * source.element_size()
    return {"bytes_per_s": moved / min(timing.samples), "buffer_bytes": moved // 2, "time": timing.as_json()}


def _gemm_rate(device: torch.device, dtype: torch.dtype, seed: int) -> dict[str, object]:
    generator = torch.Generator(device=device).manual_seed(seed)
    best: dict[str, object] = {"flops_per_s": 0.0}
    for size in _GEMM_SIZES[device.type]:
        a, b = (torch.randn(size, size, generator=generator, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        timing = _time_product(a, b, out, device)
        rate = 2 * size**3 / min(timing.samples)
        if rate > best["flops_per_s"]:
            best = {"flops_per_s": rate, "size": size, "time": timing.as_json()}
            if device.type == "cuda":
                for _ in range(math.ceil(_LOAD_SECONDS / timing.median)):
                    torch.mm(a, b, out=out)
                best["under_load"] = environment.under_load(device)
                torch.cuda.synchronize(device)
    return best


def _time_product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, device: torch.device):
    return measure({"mm": lambda: torch.mm(a, b, out=out)}, clock_for(device), _BUDGET[device.type])["mm"]
