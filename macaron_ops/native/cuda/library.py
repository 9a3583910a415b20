"""The library of CUDA kernels: loaded once, and asked which GPUs it was compiled for.

MACARON_OPS_CUDA_ON_HOST=1   the kernels compiled for the CPU, in ``build/cuda-on-host`` (``csrc/cuda/host``): for
                             tests, of tensors on the CPU, where the backend is asked for by name
"""

import functools
import importlib.util
import os
from pathlib import Path
from typing import NamedTuple

import torch

from macaron_ops import native

__all__ = [
    "TRITON",
    "archs",
    "on_host",
    "path",
    "runs_on",
    "untimed",
    "why_not_dtype",
    "why_not_loaded",
    "why_not_on",
    "why_not_shared",
    "why_not_wgmma",
]

_ON_HOST = Path(native.__file__).parents[2] / "build" / "cuda-on-host" / "libmacaron_cuda.so"
_HOW_TO_BUILD = "python tools/build_native.py --cuda-on-host"


class _Loaded(NamedTuple):
    why_not: str | None
    archs: tuple[str, ...]
    without_sm90: str  # why it has no products for sm_90a


def on_host() -> bool:
    return os.environ.get("MACARON_OPS_CUDA_ON_HOST") == "1"


def why_not_loaded() -> str | None:
    """Why no kernel of the library can run in this process; None where they can."""
    return _load().why_not


def archs() -> tuple[str, ...]:
    """The GPUs whose code the library has, as nvcc names them; ("host",) on the CPU."""
    return _load().archs


def path() -> Path:
    """Where the library is looked for."""
    if on_host() and not os.environ.get("MACARON_OPS_CUDA_LIBRARY"):
        return _ON_HOST
    return native.library_path("cuda")


_loaded: _Loaded | None = None  # as a global of the module torch.compile reads it: into _open it could not trace


def _load() -> _Loaded:
    global _loaded
    if _loaded is None:
        _loaded = _open()
    return _loaded


def _open() -> _Loaded:
    try:
        if on_host() and not path().exists():
            raise native.Refused(f"MACARON_OPS_CUDA_ON_HOST=1, and {path()} was not built: {_HOW_TO_BUILD}")
        if not on_host():
            native.check("cuda")
            if not torch.cuda.is_available():
                raise native.Refused("torch sees no CUDA device")
        torch.ops.load_library(str(path().absolute()))
        found = tuple(torch.ops.macaron_ops_cuda.archs().split())
        without_sm90 = torch.ops.macaron_ops_cuda.without_sm90()
    except native.Refused as reason:
        return _Loaded(str(reason), (), "")
    except (OSError, RuntimeError, AttributeError) as error:
        why = f"its library does not load with torch {torch.__version__}: {error.__cause__ or error}"
        return _Loaded(why, (), "")
    if (found == ("host",)) != on_host():
        return _Loaded(f"{path()} is a library {'for a GPU' if on_host() else 'for tests on the CPU'}", (), "")
    return _Loaded(None, found, without_sm90)


@functools.cache
def why_not_on(device: torch.device) -> str | None:
    """Why the library has nothing for a device."""
    if device.type != "cuda":  # the host's kernels, or shapes without numbers
        return None
    if torch.version.hip:
        return "it is for NVIDIA's GPUs"
    capability = torch.cuda.get_device_capability(device)
    if runs_on(capability, archs()):
        return None
    number = "{}.{}".format(*capability)
    return (
        f"{torch.cuda.get_device_name(device)} has compute capability {number}, it was built for {', '.join(archs())}"
    )


@functools.cache
def why_not_shared(device: torch.device, needed: int) -> str | None:
    """Why a kernel that needs so many bytes of shared memory a block does not start on a device."""
    if device.type != "cuda":
        return None
    there = torch.cuda.get_device_properties(device).shared_memory_per_block_optin
    return None if needed <= there else f"it needs {needed >> 10} KiB of shared memory a block, there are {there >> 10}"


@functools.cache
def why_not_wgmma(device: torch.device) -> str | None:
    """Why the products for sm_90a do not run on a device, or are not in the library."""
    if _load().without_sm90:
        return _load().without_sm90
    if device.type != "cuda":  # the host's products, or shapes without numbers
        return None
    capability = torch.cuda.get_device_capability(device)
    return None if capability == (9, 0) else "they are for compute capability 9.0, not {}.{}".format(*capability)


def runs_on(capability: tuple[int, int], archs: tuple[str, ...]) -> bool:
    """Whether code for one of ``archs`` runs on a GPU: "90a" on 9.0 alone, "80" on 8.0 and later ones (8.x as it is,
    others by the driver's compiler, for which ``tools/build_native.py`` adds what it needs to the oldest of them)."""
    number = 10 * capability[0] + capability[1]
    plain = [int(arch) for arch in archs if arch.isdigit()]
    if f"{number}a" in archs or (plain and number >= min(plain)):
        return True
    return any(
        arch.endswith("f") and number // 10 == int(arch[:-1]) // 10 and number >= int(arch[:-1]) for arch in archs
    )


def untimed(request) -> str | None:
    """Why the next backend is taken where none was asked for: until a GPU has said which is faster, Triton's."""
    return "not yet timed beside Triton's" if TRITON else None


TRITON = importlib.util.find_spec("triton") is not None


def why_not_dtype(dtype: torch.dtype) -> str | None:
    if dtype in (torch.float32, torch.bfloat16, torch.float16):
        return None
    return f"it runs float32, bfloat16 and float16, not {dtype}"
