"""The launchers' view of a device: what they ask of it, each asked once, and how they start a kernel on it."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch

__all__ = ["Launch", "Target", "architecture", "ceil_div", "launch", "power_of_2", "processors", "recording", "target"]

_EMULATED_PROCESSORS = 2  # so that few tokens already take several turns


def ceil_div(a: int, b: int) -> int:
    """``a / b`` rounded up; ``triton.cdiv`` takes 5 us a call on the host."""
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The next power of 2 from ``n`` on."""
    return 1 << (n - 1).bit_length()


class Launch(NamedTuple):
    """A kernel's start, as it would have been."""

    kernel: object
    programs: int
    arguments: tuple
    constants: dict


class Target(NamedTuple):
    """What launchers plan for."""

    architecture: str
    processors: int


class _Recording(NamedTuple):
    target: Target
    launches: list[Launch]


_recording: ContextVar[_Recording | None] = ContextVar("recording", default=None)  # of this thread


@contextmanager
def recording(architecture: str, processors: int) -> Iterator[list[Launch]]:
    """Inside, launchers plan for that device and start nothing: the list holds their launches. For tensors of the
    meta device, so that kernels can be compiled for a GPU that is not there as the launchers would ask for them, and
    for whoever starts them later (:mod:`replay`)."""
    launches: list[Launch] = []
    token = _recording.set(_Recording(Target(architecture, processors), launches))
    try:
        yield launches
    finally:
        _recording.reset(token)


def target(device: torch.device) -> Target:
    """What launchers plan for on this device."""
    recorded = _recording.get()
    return _target(device) if recorded is None else recorded.target


def processors(device: torch.device) -> int:
    """Streaming multiprocessors, or compute units."""
    return target(device).processors


def architecture(device: torch.device) -> str:
    """The key of :mod:`tiles`' table: sm80, sm90, sm100 or gfx942, the nearest older one of others; "emulated"."""
    return target(device).architecture


@functools.cache
def _target(device: torch.device) -> Target:
    if device.type != "cuda":
        return Target("emulated", _EMULATED_PROCESSORS)
    count = torch.cuda.get_device_properties(device).multi_processor_count
    if torch.version.hip is not None:
        return Target("gfx942", count)
    major, _ = torch.cuda.get_device_capability(device)
    # Consumer parts (8.6, 8.9, 12.x) have the shared memory of neither A100 nor B200: the smallest tiles.
    return Target({9: "sm90", 10: "sm100"}.get(major, "sm80"), count)


def launch(kernel, programs: int, device: torch.device, *arguments, **constants) -> None:
    """``programs`` programs of a kernel, on ``device`` and its current stream. A tensor that is not needed is None."""
    if programs == 0:
        return
    recorded = _recording.get()
    if recorded is not None:
        recorded.launches.append(Launch(kernel, programs, arguments, constants))
        return
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            return launch(kernel, programs, device, *arguments, **constants)
    kernel[(programs,)](*arguments, **constants, enable_fp_fusion=True)
