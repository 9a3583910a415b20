"""What the launchers ask of a device, each asked once."""

import functools
import os

import torch
import triton.language as tl

__all__ = ["INTERPRETED", "architecture", "launch", "processors"]

# Kernels run as numpy on the CPU. A constant of the kernels too.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
_EMULATED_PROCESSORS = 2  # so that few tokens already take several turns


@functools.cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors, or compute units."""
    if device.type != "cuda":
        return _EMULATED_PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def architecture(device: torch.device) -> str:
    """The key of :mod:`tiles`' table: sm80, sm90, sm100 or gfx942, the nearest older one of others."""
    if device.type != "cuda":
        return "sm90"
    if torch.version.hip is not None:
        return "gfx942"
    major, _ = torch.cuda.get_device_capability(device)
    # Consumer parts (8.6, 8.9, 12.x) have the shared memory of neither A100 nor B200: the smallest tiles.
    return {9: "sm90", 10: "sm100"}.get(major, "sm80")


def launch(kernel, programs: int, device: torch.device, *arguments, **constants) -> None:
    """``programs`` programs of a kernel, on ``device`` and its current stream. A tensor that is not needed is None."""
    if programs == 0:
        return
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            return launch(kernel, programs, device, *arguments, **constants)
    kernel[(programs,)](*arguments, **constants, enable_fp_fusion=True)
