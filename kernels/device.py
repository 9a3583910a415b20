"""The launchers' view of a device: what they ask of it, each asked once, and how they start a kernel on it."""

import functools
from collections.abc import Callable, Iterator, MutableSequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import NamedTuple

import torch
from triton.compiler import CompiledKernel

__all__ = ["Launch", "Target", "ceil_div", "launch", "power_of_2", "processors", "recording", "target", "why_not_on"]

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
    with _on(device):
        return kernel[(programs,)](*arguments, **constants, enable_fp_fusion=True)


def _on(device: torch.device) -> AbstractContextManager:
    """``device`` as the current one: Triton compiles for it, and starts on its current stream."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


class Start:
    """A launch, to be made again with arguments that Triton specialises alike: dtypes, None, numbers, and tensors'
    places modulo 16 bytes.

    After the first time the compiled kernel is started as ``kernel[grid]`` ends by starting it, with its hooks, on the
    current stream; to bind and specialise arguments takes several times as long. AMD's backend specialises on the size
    of a tensor's memory too, and the interpreter compiles nothing: there ``kernel[grid]`` is called each time.
    """

    def __init__(self, launch: Launch, device: torch.device):
        self._launch, self._device = launch, device
        self._others: tuple = ()  # the kernel's parameters after the arguments
        self._compiled: Callable | None = None

    def __call__(self, *arguments) -> None:
        if self._compiled is not None and _recording.get() is None:
            with _on(self._device):
                self._compiled(*arguments, *self._others)
            return
        kernel, programs, _, constants = self._launch
        compiled = launch(kernel, programs, self._device, *arguments, **constants)
        if type(compiled) is CompiledKernel and torch.version.hip is None and not kernel.pre_run_hooks:
            names = kernel.arg_names[len(arguments) :]
            if all(name in constants for name in names):  # else a default, which Triton fills in
                self._others = tuple(constants[name] for name in names)
                self._compiled = compiled[(programs, 1, 1)]
