"""Kernels compiled for a GPU that is not there, and what their machine code uses.

with recording("sm90", 132) as launches: ...        the launches that the operators make, on meta tensors
compiled = compile_for(launches[0], "sm90")         as Triton would specialise and compile them there
used = resources(compiled)                          registers, stack, shared memory, instructions
faults(used, launches[0], "sm90")                   the rules that it breaks
cache_key(launches[0], "sm90")                      launches with the same key run the same compiled kernel
"""

import functools
import re
import struct
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import compute_cache_key, create_function_from_signature

from .device import Launch
from .machine_code import unwritten

__all__ = ["SHARED_MEMORY", "TARGETS", "Resources", "cache_key", "compile_for", "faults", "resources"]

TARGETS = {
    "sm80": GPUTarget("cuda", 80, 32),
    "sm90": GPUTarget("cuda", 90, 32),
    "sm100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Bytes that one block may have: CUDA's programming guide, "technical specifications"; CDNA3's LDS. For sm80 that of
# its consumer relatives (8.6, 8.9), which take the same tiles.
SHARED_MEMORY = {"sm80": 99 << 10, "sm90": 227 << 10, "sm100": 227 << 10, "gfx942": 64 << 10}
# Accesses of fewer than 16 bytes a thread; and those of them that are one number for all threads, dropout's seed.
_NARROW = r"(?:ld|st)\.global(?!\S*\.v4\.b32)|global_(?:load|store)_(?!dwordx4)"
_ONE_NUMBER = r"tt\.load .*: !tt\.ptr<"
_ATOMIC = r"tt\.(?:atomic_|descriptor_reduce)"
_WGMMA = r"ttng\.warp_group_dot\b"  # a product on Hopper
_EXECUTABLE = 4  # SHF_EXECINSTR
# Bytes of stack that are let pass, by Triton 3.7's compiler. For a few kernels ptxas spills two to six registers rather
# than leave room for a program fewer on a processor: of norm_backward four of at most 128, of hidden_of_parts 32; of
# hidden_forward, bounded so that two share one, with relu and dropout in float16. Timed
# was norm_backward at 1024 channels alone, on an H200: faster with its three stages all the same.
_SPILLED = {
    ("sm80", "norm_backward"): 8,
    ("sm90", "norm_backward"): 8,
    ("sm100", "norm_backward"): 24,
    ("sm100", "hidden_of_parts_kernel"): 8,
    ("sm100", "hidden_forward_kernel"): 16,
}
WIDE_ROW = 1000  # channels from which on a row kernel must move 16 bytes a thread


class Resources(NamedTuple):
    """Of one kernel's machine code; None where the compiler does not say."""

    registers: int | None
    stack: int | None  # bytes of memory a thread: spilled registers go there
    shared: int
    wgmma: int  # the matrix instructions of Hopper and Blackwell
    mma: int  # the older ones, and AMD's
    tma: int  # bulk copies by tensor descriptors
    narrow: int  # reads and writes of memory by fewer than 16 bytes a thread, of tiles, by registers
    instructions: int  # of the machine code, padding included
    multiplies: bool  # has a product of 16-bit matrices
    serialized: bool  # wgmma of which each waits for the last, by ptxas' own account
    atomics: int  # additions and exchanges in memory, in whichever order programs come
    unwritten: int  # instructions that read a register which nothing wrote, where there are two products by wgmma


@functools.cache
def _binder(kernel, architecture: str):
    """Triton's ``(backend, function that binds and specialises arguments)``: written anew at each call of its own."""
    backend = make_backend(TARGETS[architecture])
    return backend, create_function_from_signature(kernel.signature, kernel.params, backend)


def _constants(launch: Launch) -> dict:
    return {**launch.constants, "enable_fp_fusion": True}


def cache_key(launch: Launch, architecture: str) -> str:
    """Launches of a kernel with equal keys share one compiled kernel: what Triton itself looks it up by."""
    _, bind = _binder(launch.kernel, architecture)
    _, specialization, rest = bind(*launch.arguments, **_constants(launch))
    return f"{launch.kernel.__name__} {compute_cache_key({}, specialization, rest)}"


def compile_for(launch: Launch, architecture: str):
    """The launch's kernel as Triton would specialise and compile it there."""
    backend, bind = _binder(launch.kernel, architecture)
    constants = _constants(launch)
    options, *source = launch.kernel._pack_args(backend, constants, *bind(*launch.arguments, **constants))
    return triton.compile(ASTSource(launch.kernel, *source), target=TARGETS[architecture], options=vars(options))


def resources(compiled) -> Resources:
    """What the compiled kernel uses."""
    asm = compiled.asm
    if "ptx" in asm:
        registers, stack = _of_cubin(asm["cubin"])
        text, instructions = asm["ptx"], _instructions(asm["cubin"])
    else:
        text = asm["amdgcn"]
        found = {name: int(n) for name, n in re.findall(r"\.(vgpr_count|private_segment_fixed_size):\s*(\d+)", text)}
        registers, stack = found.get("vgpr_count"), found.get("private_segment_fixed_size")
        instructions = len(re.findall(r"^\s+(?:v|s|ds|global|buffer|flat|scratch)_\w+", text, re.MULTILINE))
    return Resources(
        registers=registers,
        stack=stack,
        shared=compiled.metadata.shared,
        wgmma=len(re.findall(r"wgmma\.mma_async|tcgen05\.mma", text)),
        mma=len(re.findall(r"mma\.sync|v_mfma", text)),
        tma=len(re.findall(r"cp\.async\.bulk\.tensor", text)),
        narrow=max(len(re.findall(_NARROW, text)) - len(re.findall(_ONE_NUMBER, asm["ttgir"])), 0),
        instructions=instructions,
        serialized="wgmma.mma_async" in text and _serialized(text),
        multiplies=re.search(r"tt\.dot\b.*x(?:bf16|f16)", asm["ttir"]) is not None,
        atomics=len(re.findall(_ATOMIC, asm["ttir"])),
        unwritten=len(unwritten(asm["sass"])) if len(re.findall(_WGMMA, asm["ttgir"])) > 1 else 0,
    )


def _of_cubin(cubin: bytes) -> tuple[int | None, int | None]:
    """Registers a thread and bytes of stack, where spilled registers go, by Triton's own cuobjdump."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists():
        return None, None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", said)
    return (int(found[1]), int(found[2])) if found else (None, None)


def _serialized(ptx: str) -> bool:
    """Whether ptxas, which Triton asks for no such notes, says that it lets asynchronous products wait (C7510 to
    C7515): where something else writes to an accumulator meanwhile, or registers do not suffice."""
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [knobs.nvidia.ptxas.path, "-v", "--gpu-name=sm_90a", file.name, "-o", "/dev/null"]
        notes = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return "wgmma.mma_async instructions are serialized" in notes


def _instructions(cubin: bytes) -> int:
    """By the size of the ELF file's executable sections, 16 bytes each: disassembling takes longer than compiling."""
    table, size, count = struct.unpack_from("<Q10xHH", cubin, 0x28)
    sections = (struct.unpack_from("<8xQ16xQ", cubin, table + i * size) for i in range(count))
    return sum(length for flags, length in sections if flags & _EXECUTABLE) // 16


def faults(used: Resources, launch: Launch, architecture: str) -> list[str]:
    """The rules that a shipped kernel breaks: it would not start, or lose much of its time. Hopper, which the tiles
    were chosen for, has more of them."""
    found = []
    if used.unwritten:
        found.append(f"{used.unwritten} reads of a register that nothing wrote: ptxas lost an instruction")
    if used.serialized:
        found.append("asynchronous products that wait for one another")
    if used.shared > SHARED_MEMORY[architecture]:
        found.append(f"{used.shared} bytes of shared memory, a block has {SHARED_MEMORY[architecture]}")
    if used.multiplies and not used.wgmma + used.mma:
        found.append("no matrix instruction")
    if used.atomics:
        found.append(f"{used.atomics} atomic operations: other bits every time")
    if (used.stack or 0) > _SPILLED.get((architecture, launch.kernel.__name__), 0):
        found.append(f"{used.stack} bytes of stack a thread: registers are spilled")
    if architecture != "sm90":
        return found
    if used.multiplies and used.mma:
        found.append("the matrix instructions of older devices")
    constants = launch.constants
    if used.narrow and "ROWS" in constants and constants.get("D", 0) >= WIDE_ROW:
        found.append(f"{used.narrow} accesses of fewer than 16 bytes a thread")
    return found
