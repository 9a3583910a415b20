"""Kernels compiled for a GPU that is not there, and what their machine code uses.

with recording("sm90", 132) as launches: ...        the launches that the operators make, on meta tensors
compiled = compile_for(launches[0], "sm90")         as Triton would specialise and compile them there
resources(compiled)                                 registers, stack, shared memory, instructions
"""

import re
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from .device import Launch

__all__ = ["SHARED_MEMORY", "TARGETS", "Resources", "compile_for", "resources"]

TARGETS = {
    "sm80": GPUTarget("cuda", 80, 32),
    "sm90": GPUTarget("cuda", 90, 32),
    "sm100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Bytes that one block may have: CUDA's programming guide, "technical specifications"; CDNA3's LDS. For sm80 that of
# its consumer relatives (8.6, 8.9), which take the same tiles.
SHARED_MEMORY = {"sm80": 99 << 10, "sm90": 227 << 10, "sm100": 227 << 10, "gfx942": 64 << 10}
_TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
}
_OPTIONS = ("num_warps", "num_stages", "maxnreg")


class Resources(NamedTuple):
    """Of one kernel's machine code; None where the compiler does not say."""

    registers: int | None
    stack: int | None  # bytes of memory a thread: spilled registers go there
    shared: int
    wgmma: int  # Hopper's matrix instructions
    mma: int  # the older ones
    tma: int  # copies of whole blocks by tensor descriptors
    narrow: int  # reads and writes of memory by fewer than 16 bytes a thread, of those that pass by registers


def compile_for(launch: Launch, architecture: str):
    """The launch's kernel, specialised as Triton specialises it: None and the number 1 are constants, pointers and
    multiples of 16 are known to be such."""
    kernel = launch.kernel
    constants = {name: value for name, value in launch.constants.items() if name in kernel.arg_names}
    options = {name: launch.constants[name] for name in _OPTIONS if name in launch.constants}
    free = [name for name in kernel.arg_names if name not in constants]
    given = dict(zip(free, launch.arguments, strict=True)) | constants
    signature, constexprs, attributes = {}, {}, {}
    declared = {kernel.arg_names[i] for i in kernel.constexprs}
    for i, name in enumerate(kernel.arg_names):
        value = given[name]
        if name in declared or value is None or (type(value) is int and value == 1):
            signature[name], constexprs[name] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[name], aligned = _TYPES[value.dtype], True
        elif isinstance(value, TensorDescriptor):
            block = ", ".join(map(str, value.block_shape))
            signature[name], aligned = f"tensordesc<{_TYPES[value.base.dtype][1:]}[{block}]>", False
        elif isinstance(value, float):
            signature[name], aligned = "fp32", False
        else:
            signature[name], aligned = "i32" if -(2**31) <= value < 2**31 else "i64", value % 16 == 0
        if aligned:
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs, attributes)
    return triton.compile(source, target=TARGETS[architecture], options={**options, "enable_fp_fusion": True})


def resources(compiled) -> Resources:
    """What the compiled kernel uses."""
    if "ptx" in compiled.asm:
        registers, stack = _of_cubin(compiled.asm["cubin"])
        text = compiled.asm["ptx"]
    else:
        text = compiled.asm["amdgcn"]
        found = {name: int(n) for name, n in re.findall(r"\.(vgpr_count|private_segment_fixed_size):\s*(\d+)", text)}
        registers, stack = found.get("vgpr_count"), found.get("private_segment_fixed_size")
    wgmma = len(re.findall(r"wgmma\.mma_async|tcgen05\.mma", text))
    mma = len(re.findall(r"mma\.sync|v_mfma", text))
    tma = len(re.findall(r"cp\.async\.bulk\.tensor", text))
    narrow = len(re.findall(r"(?:ld|st)\.global(?!\S*\.v4\.b32)|global_(?:load|store)_(?!dwordx4)", text))
    return Resources(registers, stack, compiled.metadata.shared, wgmma, mma, tma, narrow)


def _of_cubin(cubin: bytes) -> tuple[int | None, int | None]:
    """Registers a thread and bytes of stack, where spilled registers go, by Triton's own cuobjdump."""
    import subprocess
    import tempfile

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists():
        return None, None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", said)
    return (int(found[1]), int(found[2])) if found else (None, None)
