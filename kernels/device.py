"""The launchers' view of a device: what they ask of it, each asked once, and how they start a kernel on it."""

import functools
from collections.abc import Iterator, MutableSequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import NamedTuple

import torch

__all__ = [
    "Launch",
    "Target",
    "ceil_div",
    "is_recording",
    "launch",
    "on",
    "power_of_2",
    "processors",
    "recording",
    "target",
    "why_not_on",
]

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
    launches: MutableSequence[Launch]


_recording: ContextVar[_Recording | None] = ContextVar("recording", default=None)  # of this thread


@contextmanager
def recording(
    architecture: str, processors: int, name: str = "", launches: MutableSequence[Launch] | None = None
) -> Iterator[MutableSequence[Launch]]:
    """Inside, launchers plan for that device and start nothing: the list, which may be given, holds their launches. For
    tensors of the meta device, so that kernels can be compiled for a GPU that is not there as the launchers would ask
    for them, and for whoever starts them later (:mod:`replay`)."""
    launches = [] if launches is None else launches
    token = _recording.set(_Recording(Target(architecture, processors, name), launches))
    try:
        yield launches
    finally:
        _recording.reset(token)


def is_recording() -> bool:
    """Whether launches are recorded here."""
    return _recording.get() is not None


def target(device: torch.device) -> Target:
    """What launchers plan for on this device."""
    recorded = _recording.get()
    return _target(device) if recorded is None else recorded.target


def processors(device: torch.device) -> int:
    """Streaming multiprocessors, or compute units."""
    return target(device).processors


@functools.cache
def why_not_on(device: torch.device) -> str | None:
    """Why no kernel runs on a device: an NVIDIA GPU before Ampere has no matrix instruction for bf16, and 64 KiB of
    shared memory, less than the smallest tiles take."""
    if device.type != "cuda" or torch.version.hip:
        return None
    major, minor = torch.cuda.get_device_capability(device)
    if major >= 8:
        return None
    return f"{torch.cuda.get_device_name(device)} has compute capability {major}.{minor}, the kernels need 8.0"


@functools.cache
def _target(device: torch.device) -> Target:
    if device.type != "cuda":
        return Target("emulated", _EMULATED_PROCESSORS, "emulated")
    properties = torch.cuda.get_device_properties(device)
    # Consumer parts (8.6, 8.9, 12.x) have the shared memory of neither A100 nor B200: the smallest tiles.
    architecture = "gfx942" if torch.version.hip else {9: "sm90", 10: "sm100"}.get(properties.major, "sm80")
    return Target(architecture, properties.multi_processor_count, properties.name)


def launch(kernel, programs: int, device: torch.device, *arguments, **constants):
    """``programs`` programs of a kernel, on ``device`` and its current stream. A tensor that is not needed is None.

    Returns what Triton compiled and started, if it did."""
    if programs == 0:
        return None
    recorded = _recording.get()
    if recorded is not None:
        recorded.launches.append(Launch(kernel, programs, arguments, constants))
        return None
    with on(device):
        return kernel[(programs,)](*arguments, **constants, enable_fp_fusion=True)


def on(device: torch.device) -> AbstractContextManager:
    """``device`` as the current one: Triton compiles for it, and starts on its current stream."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)
