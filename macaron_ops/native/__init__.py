"""The compiled libraries: found, checked and loaded once, and the reason where one is not.

``tools/build_native.py`` puts the library and a record of its build (``build.json``) beside this file. Nothing here
raises because of a library: what keeps it from being used is a sentence that ``macaron_ops.backends()``, ``explain``
and ``macaron-ops doctor`` show, and the backend ``reference`` runs.

    MACARON_OPS_NATIVE_LIBRARY   another library than the installed one (``make sanitize``)
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
    "build_record",
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
_LIBRARY = "libmacaron_ops_cpu.so"
_MACHINES = {62: "x86_64", 183: "aarch64"}  # e_machine of an ELF file -> platform.machine()


class _Loaded(NamedTuple):
    path: Path | None
    why_not: str | None
    isa: str
    isas: tuple[str, ...]


class _Refused(Exception):
    """Why a library is not used."""


def library() -> Path | None:
    """The library whose operators are in ``torch.ops.macaron_ops_cpu``, loaded by the first call."""
    return _load().path


def why_not_loaded() -> str | None:
    """Why :func:`library` is None; None where it is not."""
    return _load().why_not


def cpu_isa() -> str:
    """The instruction set whose kernels run: base, avx2, avx512, avx512_bf16; "" without a library."""
    return _load().isa


def cpu_isas() -> tuple[str, ...]:
    """Every instruction set that the library was built for and this CPU has, the oldest first."""
    return _load().isas


def library_path() -> Path:
    """Where the library is looked for."""
    return Path(os.environ.get("MACARON_OPS_NATIVE_LIBRARY") or _FOLDER / _LIBRARY)


def build_record() -> dict:
    """What the build recorded about the part ``cpu``: instruction sets, compiler and torch, or why it is missing."""
    if os.environ.get("MACARON_OPS_NATIVE_LIBRARY"):
        return {}  # the record is the installed library's
    try:
        record = json.loads(_FOLDER.joinpath("build.json").read_text())["cpu"]
    except (OSError, ValueError, LookupError, TypeError):
        return {}
    return record if isinstance(record, dict) else {}


def how_to_build() -> str:
    checkout = _FOLDER.parent.parent
    if checkout.joinpath("tools", "build_native.py").exists():
        return f"python {checkout}/tools/build_native.py"
    return "pip install --no-build-isolation --no-deps --force-reinstall -v . in a checkout of macaron_ops"


def newer_sources() -> list[str]:
    """The sources of a checkout that were changed after its library was built."""
    sources, path = _FOLDER.parent.parent / "csrc" / "cpu", library_path()
    if not path.exists():
        return []
    built = path.stat().st_mtime
    return sorted(str(file.relative_to(sources)) for file in sources.rglob("*.*") if file.stat().st_mtime > built)


@functools.cache
def _load() -> _Loaded:
    path = library_path()
    try:
        _check_torch()
        _check_file(path)
        return _Loaded(path, None, *_open(path))
    except _Refused as reason:
        return _Loaded(None, str(reason), "", ())


def _check_torch() -> None:
    release = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if release < OLDEST_TORCH:
        raise _Refused(f"it needs torch {'.'.join(map(str, OLDEST_TORCH))} or newer, this is torch {torch.__version__}")


def _check_file(path: Path) -> None:
    """Says in words what the dynamic loader would report as a missing file."""
    try:
        with path.open("rb") as file:
            head = file.read(64)
        size = path.stat().st_size
    except OSError as error:
        if os.environ.get("MACARON_OPS_NATIVE_LIBRARY"):
            raise _Refused(f"MACARON_OPS_NATIVE_LIBRARY={path}: {error.strerror}") from None
        missing = build_record().get("missing")
        why = f": {missing}" if missing else ""
        raise _Refused(f"its library was not built{why} (to build it: {how_to_build()})") from None
    if len(head) < 64 or head[:5] != b"\x7fELF\x02":
        raise _Refused(f"{path} is not a shared library")

    def field(begin: int, end: int) -> int:
        return int.from_bytes(head[begin:end], "little" if head[5] == 1 else "big")

    machine = field(18, 20)
    built_for = _MACHINES.get(machine, f"another machine (e_machine {machine})")
    if built_for != platform.machine():
        raise _Refused(f"{path} was built for {built_for}, this machine is {platform.machine()}")
    whole = field(40, 48) + field(58, 60) * field(60, 62)  # the section headers are a file's end; loading half of one
    if size < whole:  # would end the process
        raise _Refused(f"{path} is cut off: {size} bytes of {whole}")


def _open(path: Path) -> tuple[str, tuple[str, ...]]:
    """Loads the library; the instruction set that it chose, and all that it could have chosen."""
    try:
        torch.ops.load_library(str(path.absolute()))
    except (OSError, RuntimeError) as error:  # a symbol that this torch lacks, a library of another system
        raise _Refused(f"it does not load with torch {torch.__version__}: {error.__cause__ or error}") from None
    try:
        operators = torch.ops.macaron_ops_cpu.isa, torch.ops.macaron_ops_cpu.isas
    except AttributeError:
        raise _Refused(f"{path} is not the library of this macaron_ops: {how_to_build()}") from None
    try:
        return operators[0](), tuple(operators[1]().split())
    except RuntimeError as error:  # it refuses MACARON_OPS_CPU_ISA; before that, its message says where in the source
        raise _Refused("MACARON_OPS_CPU_ISA" + str(error).splitlines()[0].split("MACARON_OPS_CPU_ISA")[-1]) from None
