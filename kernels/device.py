"""The launchers' view of a device: what they ask of it, each asked once, and how they start a kernel on it."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

__all__ = ["Launch", "Target", "ceil_div", "launch", "power_of_2", "processors", "recording", "target"]

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
    """What launchers plan for: a device as the tables of :mod:`tiles` know it."""

    architecture: str  # sm80, sm90, sm100 or gfx942, the nearest older one of others; "emulated"
    processors: int  # streaming multiprocessors, or compute units
    name: str = ""


class _Recording(NamedTuple):
    target: Target
    launches: list[Launch]


_recording: _Recording | None = None


@contextmanager
def recording(architecture: str, processors: int, name: str = "") -> Iterator[list[Launch]]:
    """Inside, launchers plan for that device and start nothing: the list holds their launches. For tensors of the
    meta device, so that kernels can be compiled for a GPU that is not there as the launchers would ask for them."""
    global _recording
    before, _recording = _recording, _Recording(Target(architecture, processors, name), [])
    try:
        yield _recording.launches
    finally:
        _recording = before


def target(device: torch.device) -> Target:
    """What launchers plan for on this device."""
    return _target(device) if _recording is None else _recording.target


def processors(device: torch.device) -> int:
    return target(device).processors


@functools.cache
def _target(device: torch.device) -> Target:
    if device.type != "cuda":
        return Target("emulated", _EMULATED_PROCESSORS, "emulated")
    properties = torch.cuda.get_device_properties(device)
    # Consumer parts (8.6, 8.9, 12.x) have the shared memory of neither A100 nor B200: the smallest tiles.
    architecture = "gfx942" if torch.version.hip else {9: "sm90", 10: "sm100"}.get(properties.major, "sm80")
    return Target(architecture, properties.multi_processor_count, properties.name)


def launch(kernel, programs: int, device: torch.device, *arguments, **constants) -> None:
    """``programs`` programs of a kernel, on ``device`` and its current stream. A tensor that is not needed is None."""
    if programs == 0:
        return
    if _recording is not None:
        _recording.launches.append(Launch(kernel, programs, arguments, constants))
        return
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            return launch(kernel, programs, device, *arguments, **constants)
    kernel[(programs,)](*arguments, **constants, enable_fp_fusion=True)
