"""The compiled libraries: found, checked and loaded once, and the reason where one is not.

``tools/build_native.py`` puts the libraries and a record of their build (``build.json``) beside this file. Nothing
here raises because of a library: what keeps it from being used is a sentence that ``macaron_ops.backends()``,
``explain`` and ``macaron-ops doctor`` show, and the backend ``reference`` runs. This module loads the part "cpu",
:mod:`cuda.library` the part "cuda".

    MACARON_OPS_NATIVE_LIBRARY   another library than the installed one (``make sanitize``)
    MACARON_OPS_CUDA_LIBRARY     the same for the part "cuda"
    MACARON_OPS_CPU_ISA          the instruction set whose kernels run, instead of the newest that the CPU has
"""

import functools
import json
import os
import platform
from pathlib import Path
from typing import NamedTuple

import torch

__all__ = [
    "Refused",
    "build_record",
    "check",
    "cpu_isa",
    "cpu_isas",
    "how_to_build",
    "library",
    "library_path",
    "newer_sources",
    "why_not_loaded",
]

OLDEST_TORCH = (2, 11)
_FOLDER = Path(__file__).parent
_LIBRARIES = {"cpu": "libmacaron_ops_cpu.so", "cuda": "libmacaron_cuda.so"}
_VARIABLES = {"cpu": "MACARON_OPS_NATIVE_LIBRARY", "cuda": "MACARON_OPS_CUDA_LIBRARY"}
_MACHINES = {62: "x86_64", 183: "aarch64"}  # e_machine of an ELF file -> platform.machine()


class _Loaded(NamedTuple):
    path: Path | None
    why_not: str | None
    isa: str
    isas: tuple[str, ...]


class Refused(Exception):
    """Why a library is not used."""


def library() -> Path | None:
    """The library whose operators are in ``torch.ops.macaron_ops_cpu``, loaded by the first call."""
    return _load().path


def why_not_loaded() -> str | None:
    """Why :func:`library` is None; None where it is not."""
    return _load().why_not


def cpu_isa() -> str:
    """The instruction set whose kernels run: base, avx2, avx512, avx512_bf16, amx; "" without a library."""
    return _load().isa


def words_are_pairs(dtype: torch.dtype) -> bool:
    """Whether its kernels keep numbers of a dtype as pairs of bf16, not as float32: where the CPU multiplies pairs."""
    return dtype == torch.bfloat16 and cpu_isa() in ("avx512_bf16", "amx")


def cpu_isas() -> tuple[str, ...]:
    """Every instruction set that the library was built for and this CPU has, the oldest first."""
    return _load().isas


def library_path(part: str = "cpu") -> Path:
    """Where the library is looked for."""
    return Path(os.environ.get(_VARIABLES[part]) or _FOLDER / _LIBRARIES[part])


def build_record(part: str = "cpu") -> dict:
    """What the build recorded about a part: what it was built for, compiler and torch, or why it is missing."""
    if os.environ.get(_VARIABLES[part]):
        return {}  # the record is the installed library's
    try:
        record = json.loads(_FOLDER.joinpath("build.json").read_text())[part]
    except (OSError, ValueError, LookupError, TypeError):
        return {}
    return record if isinstance(record, dict) else {}


def how_to_build() -> str:
    checkout = _FOLDER.parent.parent
    if checkout.joinpath("tools", "build_native.py").exists():
        return f"python {checkout}/tools/build_native.py"
    return "pip install --no-build-isolation --no-deps --force-reinstall -v . in a checkout of macaron_ops"


def newer_sources(part: str = "cpu") -> list[str]:
    """The sources of a checkout that were changed after its library was built."""
    sources, path = _FOLDER.parent.parent / "csrc" / part, library_path(part)
    if not path.exists():
        return []
    built = path.stat().st_mtime
    newer = (file.relative_to(sources) for file in sources.rglob("*.*") if file.stat().st_mtime > built)
    return sorted(str(file) for file in newer if file.parts[0] != "host")  # which runs kernels on the CPU, for tests


def check(part: str) -> Path:
    """The library of a part, if nothing that can be seen from outside keeps it from being loaded.

    Raises:
        Refused: something does.
    """
    path = library_path(part)
    _check_torch()
    _check_file(path, part)
    return path


@functools.cache
def _load() -> _Loaded:
    try:
        path = check("cpu")
        return _Loaded(path, None, *_open(path))
    except Refused as reason:
        return _Loaded(None, str(reason), "", ())


def _check_torch() -> None:
    release = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if release < OLDEST_TORCH:
        raise Refused(f"it needs torch {'.'.join(map(str, OLDEST_TORCH))} or newer, this is torch {torch.__version__}")


def _check_file(path: Path, part: str) -> None:
    """Says in words what the dynamic loader would report as a missing file."""
    try:
        with path.open("rb") as file:
            head = file.read(64)
        size = path.stat().st_size
    except OSError as error:
        if os.environ.get(_VARIABLES[part]):
            raise Refused(f"{_VARIABLES[part]}={path}: {error.strerror}") from None
        missing = build_record(part).get("missing")
        why = f": {missing}" if missing else ""
        raise Refused(f"its library was not built{why} (to build it: {how_to_build()})") from None
    if len(head) < 64 or head[:5] != b"\x7fELF\x02":
        raise Refused(f"{path} is not a shared library")

    def field(begin: int, end: int) -> int:
        return int.from_bytes(head[begin:end], "little" if head[5] == 1 else "big")

    machine = field(18, 20)
    built_for = _MACHINES.get(machine, f"another machine (e_machine {machine})")
    if built_for != platform.machine():
        raise Refused(f"{path} was built for {built_for}, this machine is {platform.machine()}")
    whole = field(40, 48) + field(58, 60) * field(60, 62)  # the section headers are a file's end; loading half of one
    if size < whole:  # would end the process
        raise Refused(f"{path} is cut off: {size} bytes of {whole}")


def _open(path: Path) -> tuple[str, tuple[str, ...]]:
    """Loads the library; the instruction set that it chose, and all that it could have chosen."""
    try:
        torch.ops.load_library(str(path.absolute()))
    except (OSError, RuntimeError) as error:  # a symbol that this torch lacks, a library of another system
        raise Refused(f"it does not load with torch {torch.__version__}: {error.__cause__ or error}") from None
    try:
        operators = torch.ops.macaron_ops_cpu.isa, torch.ops.macaron_ops_cpu.isas
    except AttributeError:
        raise Refused(f"{path} is not the library of this macaron_ops: {how_to_build()}") from None
    try:
        return operators[0](), tuple(operators[1]().split())
    except RuntimeError as error:  # it refuses MACARON_OPS_CPU_ISA; before that, its message says where in the source
        raise Refused("MACARON_OPS_CPU_ISA" + str(error).splitlines()[0].split("MACARON_OPS_CPU_ISA")[-1]) from None
