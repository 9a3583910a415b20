"""What a number needs beside it: the machine, its clocks, the versions, the commit."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch

_PACKAGE = Path(__file__).resolve().parent
_DISTRIBUTIONS = ("torch", "triton", "numpy", "transformers", "pykeops", "macaron_ops")


def record(device: torch.device) -> dict[str, object]:
    """Everything about this process and machine that can change a time, ready for JSON. No host name, no path."""
    return {
        "device": _cuda(device) if device.type == "cuda" else _cpu(),
        "device_type": device.type,
        "os": f"{platform.system()} {platform.release()} {platform.machine()}",
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "load_average": load_average(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in _DISTRIBUTIONS},
        "commit": commit(),
        "sources": sources(device),
        "matmul_precision": torch.get_float32_matmul_precision(),
        "backends": _backends(),
    }


# What must be equal in two runs' records for one to go on where the other stopped.
_SAME = ("device_type", "threads", "python", "versions", "sources", "matmul_precision")
_SAME_DEVICE = ("name", "driver", "cuda", "multiprocessors", "memory_bytes")


def differences(record: dict[str, object], other: dict[str, object]) -> list[str]:
    """What of the device or the software differs between two records, in words."""
    pairs = [(name, record.get(name), other.get(name)) for name in _SAME]
    devices = record.get("device", {}), other.get("device", {})
    pairs += [(f"device {name}", *(device.get(name) for device in devices)) for name in _SAME_DEVICE]
    return [f"{name} was {was}, is {now}" for name, now, was in pairs if now != was]


def sources(device: torch.device) -> str:
    """A digest of the package's code and the kernels' tables, with the library that was compiled for the device: it
    also tells apart what no commit has, or checkouts without git."""
    import macaron_ops
    from macaron_ops import kernels, native
    from macaron_ops.native.cuda import library

    digest = hashlib.sha256()
    folders = (Path(macaron_ops.__file__).parent, Path(kernels.__file__).parent, _PACKAGE)
    files = {path.resolve() for folder in folders for path in folder.rglob("*.py")}
    files |= set(folders[1].rglob("*.json"))
    if device.type == "cpu" and native.library():
        files.add(native.library())
    if device.type == "cuda" and library.why_not_loaded() is None:
        files.add(library.path())
    for path in sorted(files):
        digest.update(f"{path.parent.name}/{path.name}".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def load_average() -> float | None:
    """Programs that ran or waited in the last minute, where the system tells."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """The commit of the checkout that this package runs from, '+changes' if its files differ; None outside of one."""
    folder = Path(__file__).resolve().parent
    try:
        head = _run(["git", "-C", str(folder), "rev-parse", "--short=12", "HEAD"])
        # An installed copy inside someone else's repository must not claim their commit.
        if _run(["git", "-C", str(folder), "ls-files", Path(__file__).name]) != Path(__file__).name:
            return None
        changed = _run(["git", "-C", str(folder), "status", "--porcelain", "--untracked-files=no"])
    except (OSError, subprocess.SubprocessError):
        return None
    return head + ("+changes" if changed else "")


def _cpu() -> dict[str, object]:
    fields = _cpuinfo()
    return {
        "name": fields.get("model name") or platform.processor() or platform.machine(),
        "clock_mhz": float(fields["cpu MHz"]) if "cpu MHz" in fields else None,
        "instruction_sets": torch.backends.cpu.get_cpu_capability(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    }


def _cpuinfo() -> dict[str, str]:
    """The first processor's entries of /proc/cpuinfo, where there is one."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in text.split("\n\n")[0].splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def _cuda(device: torch.device) -> dict[str, object]:
    properties = torch.cuda.get_device_properties(device)
    found = {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "cuda": torch.version.cuda,
        "host": _cpu()["name"],
    }
    return found | _nvidia_smi(device)


_SMI_FIELDS = {
    "driver_version": "driver",
    "clocks.sm": "clock_mhz",
    "clocks.max.sm": "clock_max_mhz",
    "clocks.mem": "memory_clock_mhz",
    "power.limit": "power_limit_w",
    "power.draw": "power_w",
    "temperature.gpu": "temperature_c",
}
_CHANGING = ("clock_mhz", "memory_clock_mhz", "power_w", "temperature_c")


def under_load(device: torch.device) -> dict[str, object]:
    """Clocks, power and temperature of a GPU, for a moment at which it works; an idle one's clocks tell nothing."""
    return {name: value for name, value in _nvidia_smi(device).items() if name in _CHANGING}


def _nvidia_smi(device: torch.device) -> dict[str, object]:
    """Driver, clocks, power limit and temperature as nvidia-smi tells them; empty where it is missing."""
    fields = _SMI_FIELDS
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    command = ["nvidia-smi", f"--id=GPU-{uuid}", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        values = _run(command).split(", ")
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(fields.values(), values, strict=False))


def _backends() -> dict[str, str]:
    """Each backend of macaron_ops: 'usable', the native one with its instruction set, or why it is not; a reason that
    names a file names it within the checkout."""
    import macaron_ops
    from macaron_ops import native

    checkout = f"{Path(macaron_ops.__file__).parents[1]}{os.sep}"
    usable = {"native": f"usable, {native.cpu_isa()}"}
    return {
        name: usable.get(name, "usable") if status.usable else status.reason.replace(checkout, "")
        for name, status in macaron_ops.backends().items()
    }


def _run(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
