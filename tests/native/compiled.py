"""Small sources, compiled as the build compiles the kernels of an instruction set: with its flags, or emulated."""

import ctypes
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

__all__ = ["COMPILER", "ISAS", "compiled", "machine_has"]

ROOT = Path(__file__).parents[2]
COMPILER = sys.platform == "linux" and shutil.which(os.environ.get("CXX", "g++"))
NEEDS = {  # as supported() of csrc/cpu/torch/kernels.cpp asks
    "base": set(),
    "avx2": {"avx2", "fma"},
    "avx512": {"avx2", "fma", "avx512f", "avx512bw", "avx512vl", "avx512dq"},
    "avx512_bf16": {"avx2", "fma", "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16"},
    "amx": {"avx2", "fma", "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16", "amx_tile", "amx_bf16"},
}


def _build_script():
    spec = importlib.util.spec_from_file_location("build_native", ROOT / "tools/build_native.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


build = _build_script()
ISAS = build.ISAS.get(platform.machine(), {})
EMULATED = build.EMULATED_ISAS.get(platform.machine(), {})


def machine_has(isa: str) -> bool:
    """Whether the CPU itself executes an instruction set, whatever a library says."""
    lines = [line.split(":")[1] for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")]
    return NEEDS[isa] <= set(lines[0].split() if lines else ())


def compiled(source: Path, isa: str, folder: Path, emulated: bool) -> ctypes.CDLL:
    """The library of one source for an instruction set."""
    library = folder / f"{source.stem}-{isa}{'-emulated' * emulated}.so"
    flags = f"{build.LANGUAGE} -fvisibility=default -O2 {build.KERNELS} {(EMULATED if emulated else ISAS)[isa]}"
    command = [COMPILER, *shlex.split(flags), f"-DMACARON_OPS_ISA={isa}", "-shared", source, "-o", library]
    subprocess.run(command, cwd=ROOT, check=True)
    return ctypes.CDLL(str(library))
