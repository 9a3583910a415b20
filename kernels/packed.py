"""A compiled kernel and its parameters, packed as CUDA's driver takes them (``cuLaunchKernelEx``).

Triton's own launcher is written for whatever comes: it parses every argument, asks where each pointer points, encodes
each tensor map anew, calls hooks. Here all but the tensors' places is known: numbers lie where the driver reads them,
a tensor map is the one that Triton made with another address (``cuTensorMapReplaceAddress``). Both are looked at once
for each launch: the parameters are held against those that the kernel declares (``cuFuncGetParamInfo``, CUDA 12.4),
number and sizes, and a map with another address against Triton's for that address. Where they differ, Triton starts.
"""

import ctypes
import functools
import struct
import threading
from collections.abc import Iterable, Sequence
from types import SimpleNamespace

import torch
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.tools.tensor_descriptor import TensorDescriptor

__all__ = ["Packed"]

_NUMBERS = {
    "i1": ctypes.c_int8,
    "i8": ctypes.c_int8,
    "i16": ctypes.c_int16,
    "i32": ctypes.c_int32,
    "i64": ctypes.c_int64,
    "u8": ctypes.c_uint8,
    "u16": ctypes.c_uint16,
    "u32": ctypes.c_uint32,
    "u64": ctypes.c_uint64,
    "fp32": ctypes.c_float,
    "fp64": ctypes.c_double,
}
_NO_CONTEXT = 201  # CUDA_ERROR_INVALID_CONTEXT
_ADDRESS = ctypes.sizeof(ctypes.c_void_p)
_MAP, _MAP_AT = 128, 64  # bytes of a CUtensorMap, and what its place is a multiple of


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        *((name, ctypes.c_uint) for name in ("gridDimX", "gridDimY", "gridDimZ")),
        *((name, ctypes.c_uint) for name in ("blockDimX", "blockDimY", "blockDimZ", "sharedMemBytes")),
        ("hStream", ctypes.c_void_p),
        ("attrs", ctypes.c_void_p),
        ("numAttrs", ctypes.c_uint),
    )


@functools.cache
def _driver() -> ctypes.CDLL | None:
    """CUDA's driver, if it has what is needed; the GIL is let go while it starts a kernel, which waits where a stream
    is full."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
        cuda.cuTensorMapReplaceAddress.argtypes = ctypes.c_void_p, ctypes.c_void_p
        cuda.cuFuncGetParamInfo.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_void_p
        cuda.cuLaunchKernelEx.argtypes = ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p
        cuda.cuGetErrorString.argtypes = ctypes.c_int, ctypes.c_void_p
    except (OSError, AttributeError):
        return None
    return cuda


class _Parameters:
    """Where the driver reads each parameter of a kernel, in order, and of what size it is."""

    def __init__(self, tensors: int):
        self.addresses = (ctypes.c_uint64 * tensors)()
        self.maps: list[tuple[int, int]] = []  # of which tensor, and where
        self.sizes: list[int] = []
        self._places: list[int] = []
        self._alive: list = []
        self._tensors = 0  # that have come

    def append(self, place: int, size: int) -> None:
        self._places.append(place)
        self.sizes.append(size)

    def append_number(self, number) -> None:
        self._alive.append(number)
        self.append(ctypes.addressof(number), ctypes.sizeof(number))

    def append_tensor(self) -> None:
        self.append(ctypes.addressof(self.addresses) + _ADDRESS * self._tensors, _ADDRESS)
        self._tensors += 1

    def append_map(self, tritons: object, *numbers: int) -> None:
        """A copy of the map that ends Triton's object; its tensor's shape, in 32 bits, and strides, in 64."""
        memory = (ctypes.c_char * (_MAP + _MAP_AT))()
        place = -(-ctypes.addressof(memory) // _MAP_AT) * _MAP_AT
        ctypes.memmove(place, _place_in(tritons), _MAP)
        self._alive.append(memory)
        self.append(place, _MAP)
        self.maps.append((self._tensors, place))
        self._tensors += 1
        for i, number in enumerate(numbers):
            self.append_number((ctypes.c_int32 if 2 * i < len(numbers) else ctypes.c_int64)(number))

    def array(self) -> ctypes.Array:
        return (ctypes.c_void_p * len(self._places))(*self._places)


def _parameters(types: Iterable, arguments: Sequence, descriptions: Iterable) -> _Parameters | None:
    """As Triton's launcher lays them out; None where one is of a kind that is not known here."""
    found = _Parameters(sum(isinstance(a, (Tensor, TensorDescriptor)) for a in arguments))
    descriptions = iter(descriptions)
    for kind, argument in zip(types, arguments, strict=True):
        if kind == "constexpr":
            continue
        if isinstance(argument, Tensor) and kind[0] == "*":
            found.append_tensor()
        elif isinstance(argument, TensorDescriptor):
            description = next(descriptions, None)
            if description is None:  # an older device, which has no tensor maps
                return None
            here, elsewhere = (_encoded(argument, description, offset) for offset in (0, 256))
            found.append_map(*elsewhere)
            _, place = found.maps[-1]
            status = _driver().cuTensorMapReplaceAddress(place, argument.base.data_ptr())
            if status or ctypes.string_at(place, _MAP) != ctypes.string_at(_place_in(here[0]), _MAP):
                return None  # a driver that does not make of the one what Triton makes of the other
        elif kind in _NUMBERS and isinstance(argument, (int, float)):
            found.append_number(_NUMBERS[kind](argument))
        else:
            return None
    for _ in range(2):  # memory for the kernel's own use and a profiler's, of which there is none
        found.append_number(ctypes.c_uint64(0))
    return found


def _encoded(descriptor: TensorDescriptor, description: dict, offset: int) -> list:
    """What Triton's launcher makes of a descriptor whose tensor begins ``offset`` bytes later."""
    from triton.backends.nvidia.driver import make_tensordesc_arg  # AMD's Triton may lack it

    moved = object.__new__(TensorDescriptor)
    address = descriptor.base.data_ptr() + offset
    moved.__dict__ = vars(descriptor) | {"base": SimpleNamespace(data_ptr=lambda: address)}
    return make_tensordesc_arg(moved, description)


def _place_in(tritons: object) -> int:
    """Of the tensor map, the last member of Triton's object for one."""
    return id(tritons) + type(tritons).__basicsize__ - _MAP


class Packed:
    """Of one launch; tensors are what differs between its starts."""

    @classmethod
    def of(cls, compiled: CompiledKernel, programs: int, arguments: Sequence, device: torch.device) -> "Packed | None":
        """``arguments`` are those for all of the kernel's parameters, constants too. None where Triton's launcher does
        more, or the kernel declares other parameters."""
        m = compiled.metadata
        more = m.num_ctas != 1 or m.launch_pdl or m.launch_cooperative_grid
        if more or m.global_scratch_size or m.profile_scratch_size or _driver() is None:
            return None
        descriptions = getattr(m, "tensordesc_meta", None) or ()
        parameters = _parameters(compiled.src.signature.values(), arguments, descriptions)
        if parameters is None or parameters.sizes != _declared(compiled.function):
            return None
        return cls(compiled, programs, parameters, device)

    def __init__(self, compiled: CompiledKernel, programs: int, parameters: _Parameters, device: torch.device):
        block = 32 * compiled.metadata.num_warps
        self._config = _Config(programs, 1, 1, block, 1, 1, compiled.metadata.shared, None, None, 0)
        self._at_config = ctypes.addressof(self._config)
        self._compiled = compiled  # which owns the function
        self._function, self._device = compiled.function, device.index
        self._parameters, self._array = parameters, parameters.array()
        addresses = parameters.addresses
        self._set = functools.partial(struct.Struct(f"{len(addresses)}Q").pack_into, addresses, 0)
        self._lock = threading.Lock()

    def start(self, tensors: Sequence[Tensor]) -> bool:
        """On the current stream of the device, which is the current one. False, and not started, in a thread that has
        no context of CUDA yet: Triton's launcher gives it one."""
        cuda = _driver()
        addresses = [t.data_ptr() for t in tensors]
        stream = torch._C._cuda_getCurrentRawStream(self._device)
        with self._lock:  # until the driver has read the parameters
            self._set(*addresses)
            for tensor, place in self._parameters.maps:
                if status := cuda.cuTensorMapReplaceAddress(place, addresses[tensor]):
                    raise _error(status)
            self._config.hStream = stream
            status = cuda.cuLaunchKernelEx(self._at_config, self._function, self._array, None)
        if status and status != _NO_CONTEXT:
            raise _error(status)
        return not status


def _declared(function: int) -> list[int]:
    """The sizes of a kernel's parameters."""
    offset, size = ctypes.c_size_t(), ctypes.c_size_t()
    sizes: list[int] = []
    while not _driver().cuFuncGetParamInfo(function, len(sizes), ctypes.addressof(offset), ctypes.addressof(size)):
        sizes.append(size.value)
    return sizes


def _error(status: int) -> RuntimeError:
    text = ctypes.c_char_p()
    _driver().cuGetErrorString(status, ctypes.addressof(text))
    return RuntimeError(f"CUDA's driver did not start a kernel: {(text.value or b'error').decode()} ({status})")
