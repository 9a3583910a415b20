"""Builds the native libraries of macaron_ops with ninja, and puts them into the package.

usage: python tools/build_native.py              what changed since the last time; nothing changed: no work, at once
       python tools/build_native.py --sanitize   build/sanitize/: with AddressSanitizer and UBSan, the package untouched
       python tools/build_native.py --emulate    build/emulate/: the instruction sets of AVX-512 on a machine with AVX2
                                                 (csrc/emulated), to be tested, the package untouched; or with both
       python tools/build_native.py --cuda-on-host   build/cuda-on-host/: the CUDA kernels for the CPU (csrc/cuda/host),
                                                 to be tested without a GPU, the package untouched; or with --sanitize

Needs a C++ compiler, ninja, and the headers of any torch from 2.11 on: they are found, torch is not imported, and the
library runs with every torch from 2.11 on (LibTorch's stable ABI) and with every Python. `pip install` runs this file
through setup.py, where a part that cannot be built is left out with a loud message. Variables:

    MACARON_OPS_BUILD  the parts to build ("cpu,cuda"), and then one that is missing is an error; "none" builds nothing.
                       Not set: "cpu", and "cuda" where nvcc and a torch with CUDA are
    MACARON_OPS_CUDA_ARCHS   the GPUs to compile for ("80;90a"); not set: those of this machine, or these two
    MACARON_OPS_CUTLASS      CUTLASS 4, for the wide FFN on sm_90a; not set: that of the wheel nvidia-cutlass
    CXX, NVCC, MAX_JOBS      the compilers, and how many files they compile at a time
"""

import fcntl
import filecmp
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "macaron_ops" / "native"
RECORD = "build.json"  # beside the libraries: what was built, with what, and why something was not
OLDEST_TORCH = "2.11"


class BuildError(Exception):
    """A part cannot be built; the message says why, in a line or two."""


class NotHere(BuildError):
    """A part that this machine has no use for, or no compiler: no error, unless it is asked for by name."""


class Modes(NamedTuple):
    """What a library for tests is built with."""

    emulate: bool = False
    sanitize: bool = False
    cuda_on_host: bool = False

    @property
    def folder(self) -> str:
        """Relative to ROOT, as all paths of ours in a build.ninja: a copied checkout has nothing to build again."""
        names = [name.replace("_", "-") for name, on in self._asdict().items() if on]
        return "build/" + ("-".join(names) or "native")

    @property
    def parts(self) -> list[str]:
        """What is built for tests in these modes."""
        return ["cuda"] if self.cuda_on_host else ["cpu"]


class Part(NamedTuple):
    library: str
    about: str
    plan: Callable[[Modes], tuple[str, dict]]  # -> the text of its build.ninja, what to record


# --- cpu: the kernels once per instruction set, without a header of torch; what binds them to torch once ------------

AVX2 = "-mavx2 -mfma -mf16c"
AVX512 = f"{AVX2} -mavx512f -mavx512bw -mavx512vl -mavx512dq -mprefer-vector-width=512"
AMX = f"{AVX512} -mavx512bf16 -mamx-tile -mamx-bf16"
ISAS = {  # of each machine, from the oldest to the newest; the library chooses among them when it is loaded
    "x86_64": {
        "base": "",
        "avx2": AVX2,
        "avx512": AVX512,
        "avx512_bf16": f"{AVX512} -mavx512bf16",
        "amx": AMX,
    },
    "aarch64": {"base": ""},
}
BY_AVX2 = f"{AVX2} -Wno-psabi -include csrc/emulated/avx512.h"
EMULATED_ISAS = {"x86_64": {"avx512": BY_AVX2, "avx512_bf16": f"{BY_AVX2} -DMACARON_OPS_EMULATED_BF16"}}
LANGUAGE = "-std=c++17 -fPIC -fvisibility=hidden -Wall -Wextra -Icsrc"
# A NaN or an infinity must come out where one went in: never -ffast-math.
KERNELS = "-fno-math-errno -fno-trapping-math -ffp-contract=fast"
# The level of LibTorch's stable ABI: 2.11.
TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"
# libtorch.so registers torch's operators: it must be among the libraries that ours names, though none of its symbols is
# used. There is no rpath: torch has loaded its libraries before ours is.
LIBRARIES = "-Wl,--no-as-needed -ltorch -Wl,--as-needed -ltorch_cpu -lc10 -Wl,-z,defs -Wl,--exclude-libs,ALL"
# Quick to compile, with products fused with their sums as -O3 does it: their errors are what tests of numbers see.
QUICK = "-O1 -fexpensive-optimizations"
SANITIZE = f"{QUICK} -g1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all"


def plan_cpu(modes: Modes) -> tuple[str, dict]:
    cxx, version = compiler()
    torch = find_torch()
    known = EMULATED_ISAS if modes.emulate else ISAS
    isas = known.get(platform.machine()) if sys.platform == "linux" else None
    if isas and AMX in isas.values() and not assembles(cxx, AMX, "tdpbf16ps %tmm0, %tmm1, %tmm2"):
        print(f"{PARTS['cpu'].library}: without amx, which {version} or its assembler does not know (GCC 11 does)")
        isas = {isa: flags for isa, flags in isas.items() if flags != AMX}
    if isas is None:
        raise BuildError(
            f"there are no CPU kernels for {sys.platform} on {platform.machine()}: {', '.join(known)} only"
        )
    kernels = sorted(ROOT.glob("csrc/cpu/*.cpp"))
    glue = sorted(ROOT.glob("csrc/cpu/torch/*.cpp"))
    if not kernels or not glue:
        raise BuildError("csrc/cpu holds no sources: this is not a whole checkout or source distribution")
    folder = f"{modes.folder}/cpu"
    library = f"{folder}/{PARTS['cpu'].library}"
    lines = [
        "ninja_required_version = 1.5",
        f"builddir = {folder}",
        rule("compile", f"{cxx} $flags -MD -MF $out.d -c $in -o $out", "c++ $what", "depfile = $out.d", "deps = gcc"),
        rule("link", f"{cxx} -shared $flags $in -o $out {option('-L', torch.folder / 'lib')} {LIBRARIES}", "link $out"),
    ]
    objects = []

    def compile_one(source: Path, kind: str, flags: str):
        objects.append(f"{folder}/{kind}/{source.stem}.o")
        lines.append(f"build {objects[-1]}: compile {source.relative_to(ROOT)}")
        lines.append(f"  what = {source.relative_to(ROOT)} ({kind})\n  flags = {flags}")

    def optimised(level: str) -> str:
        return SANITIZE if modes.sanitize else level

    for isa, flags in isas.items():
        for source in kernels:
            optimise = optimised(QUICK if modes.emulate else "-O3")
            compile_one(source, isa, f"{LANGUAGE} {optimise} {KERNELS} -DMACARON_OPS_ISA={isa} {flags}".strip())
    built = option("-DMACARON_OPS_ISAS(X)=", " ".join(f"X({isa})" for isa in isas))
    headers = f"{TORCH_TARGET} {option('-isystem', torch.folder / 'include')} {built}"
    if modes.emulate:
        headers += " -DMACARON_OPS_EMULATED"
    for source in glue:
        compile_one(source, "torch", f"{LANGUAGE} {optimised('-O2')} {headers}")
    lines.append(f"build {library}: link {' '.join(objects)}\n  flags = {optimised('')}")
    record = {"instruction sets": list(isas), "compiler": version, "torch headers": torch.version}
    return "\n".join(lines) + "\n", record


# --- cuda: kernels by nvcc, without a header of torch; what binds them to torch by the C++ compiler ------------------

DEFAULT_ARCHS = "80;90a"
# What tests ask of the compiled kernels (no spills, no local memory) is shown while they are compiled.
NVCC = "-O3 -std=c++17 -Icsrc -Xcompiler -fPIC,-fvisibility=hidden -Xptxas -warn-spills,-warn-lmem-usage"
# The products by CUTLASS: wgmma and TMA, which sm_90a alone has. Its checks of itself would take a stack.
HOPPER = "-gencode=arch=compute_90a,code=sm_90a --expt-relaxed-constexpr -DNDEBUG"
HOPPER_BYTES = 8 << 30  # that a compiler of one of these takes, rounded up
# Switching stacks by longjmp is what fibers are, and what _FORTIFY_SOURCE forbids.
ON_HOST = "-DMACARON_OPS_CUDA_ON_HOST -Wno-unknown-pragmas -U_FORTIFY_SOURCE"


def plan_cuda(modes: Modes) -> tuple[str, dict]:
    kernels = sorted(ROOT.glob("csrc/cuda/*.cu"))
    glue = sorted(ROOT.glob("csrc/cuda/torch/*.cpp"))
    if not kernels or not glue:
        raise NotHere("csrc/cuda holds no sources: this is not a whole checkout or source distribution")
    torch = find_torch()
    nvcc, nvcc_version = ("", "") if modes.cuda_on_host else cuda_compiler(torch)
    cxx, version = compiler()
    hopper, without = [], ""
    optimise = SANITIZE if modes.sanitize else "-O1" if modes.cuda_on_host else "-O2"
    if modes.cuda_on_host:
        record = {"on host": True, "compiler": version}
        archs, libraries = "host", ""
        kernels += ROOT.glob("csrc/cuda/host/*.cpp")  # in place of CUTLASS's
        cu = f"{cxx} -x c++ {LANGUAGE} {optimise} {ON_HOST}"
    else:
        names = cuda_archs()
        archs = " ".join(names)
        record = {"archs": names, "compiler": nvcc_version}
        libraries = f"{cuda_libraries(nvcc)} -lcudart_static -lrt -lpthread -ldl"
        cu = f"{nvcc} -ccbin {cxx} {NVCC} {' '.join(flag for name in names for flag in generate(name, names))}"
        include, without = cutlass(names)
        if include is not None:
            hopper = sorted(ROOT.glob("csrc/cuda/sm90/*.cu"))
            hopper_cu = f"{nvcc} -ccbin {cxx} {NVCC} {HOPPER} -isystem {option('', include)}"
        record["wide FFN"] = without or "with CUTLASS"
    folder = f"{modes.folder}/cuda"
    lines = [
        "ninja_required_version = 1.5",
        f"builddir = {folder}",
        rule("kernel", f"{cu} -MD -MF $out.d -c $in -o $out", "cu $in", "depfile = $out.d", "deps = gcc"),
        rule("glue", f"{cxx} $flags -MD -MF $out.d -c $in -o $out", "c++ $in", "depfile = $out.d", "deps = gcc"),
        rule(
            "link",
            f"{cxx} -shared $flags $in -o $out {option('-L', torch.folder / 'lib')} {libraries} {LIBRARIES}",
            "link $out",
        ),
    ]
    if hopper:
        lines += [
            f"pool sm90\n  depth = {at_a_time(HOPPER_BYTES)}",
            rule(
                "sm90",
                f"{hopper_cu} -MD -MF $out.d -c $in -o $out",
                "cu $in",
                "depfile = $out.d",
                "deps = gcc",
                "pool = sm90",
            ),
        ]
    objects = []
    for source in (*hopper, *kernels, *glue):  # what takes longest first
        kind = "sm90" if source in hopper else "kernel" if source in kernels else "glue"
        objects.append(f"{folder}/{kind}/{source.stem}.o")
        lines.append(f"build {objects[-1]}: {kind} {source.relative_to(ROOT)}")
    headers = f"{TORCH_TARGET} {option('-isystem', torch.folder / 'include')}"
    headers += " " + option("-DMACARON_OPS_CUDA_ARCHS=", f'"{archs}"')
    if without:
        headers += " " + option("-DMACARON_OPS_WITHOUT_SM90=", f'"{without}"')
    lines.insert(2, f"flags = {LANGUAGE} {optimise} {headers} {ON_HOST if modes.cuda_on_host else ''}")
    lines.append(f"build {folder}/{PARTS['cuda'].library}: link {' '.join(objects)}")
    return "\n".join(lines) + "\n", record | {"torch headers": torch.version}


def cuda_compiler(torch: "Torch") -> tuple[str, str]:
    """The command of nvcc, and its version.

    Raises:
        NotHere: there is none, or this torch has no use for what it compiles.
    """
    command = os.environ.get("NVCC") or "nvcc"
    try:
        done = subprocess.run([*shlex.split(command), "--version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError, ValueError, IndexError):
        raise NotHere(f"the CUDA compiler {command} is not there, or does not run") from None
    if "cuda" not in (asked_for() or ()) and not list(torch.folder.glob("lib/libtorch_cuda.so*")):
        raise NotHere(
            f"torch {torch.version} was built without CUDA (MACARON_OPS_BUILD=cpu,cuda builds it all the same)"
        )
    return escaped(command), next((line for line in done.stdout.splitlines() if "release" in line), command)


def cuda_libraries(nvcc: str) -> str:
    """The folders in which nvcc has its libraries, as options."""
    command = [*shlex.split(nvcc), "--dryrun", "-x", "cu", "-c", os.devnull]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = [line.split("LIBRARIES=", 1)[1] for line in done.stderr.splitlines() if "LIBRARIES=" in line]
    if not lines:
        raise BuildError(f"{nvcc} --dryrun does not say where its libraries are")
    return " ".join(escaped(shlex.quote(folder)) for folder in shlex.split(lines[0]) if folder.startswith("-L"))


def cuda_archs() -> list[str]:
    """The GPUs to compile for, as nvcc names them."""
    value = os.environ.get("MACARON_OPS_CUDA_ARCHS")
    if not value:
        try:
            done = subprocess.run(
                ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"], capture_output=True, text=True
            )
            found = sorted({line.strip().replace(".", "") for line in done.stdout.splitlines() if "." in line}, key=int)
            value = ";".join("90a" if name == "90" else name for name in found)
        except (OSError, ValueError):
            value = ""
    names = (value or DEFAULT_ARCHS).replace(",", ";").split(";")
    names = [name.strip() for name in names if name.strip()]
    for name in names:
        number = re.fullmatch(r"(\d+)[af]?", name)
        if number is None or int(number[1]) < 80:
            raise BuildError(f"MACARON_OPS_CUDA_ARCHS={value}: {name!r} is no GPU from 80 (Ampere) on; such as 80;90a")
    return names


def cutlass(archs: list[str]) -> tuple[Path | None, str]:
    """The folder of CUTLASS's headers, and why there are no products by CUTLASS ("" where there are).

    They come with the wheel nvidia-cutlass, of which nothing else is used, or as MACARON_OPS_CUTLASS says.
    """
    if "90a" not in archs:
        return None, "it was not built for sm_90a"
    given = os.environ.get("MACARON_OPS_CUTLASS")
    found = None if given else importlib.util.find_spec("cutlass_library")
    places = [Path(given)] if given else [Path(p, "source") for p in (found and found.submodule_search_locations) or ()]
    for place in places:
        if place.joinpath("include", "cutlass", "cutlass.h").exists():
            return place / "include", ""
    if given:
        raise BuildError(f"MACARON_OPS_CUTLASS={given}: there is no include/cutlass/cutlass.h in it")
    return None, "it was built without CUTLASS's headers (pip install --no-deps nvidia-cutlass)"


def at_a_time(size: int) -> int:
    """How many compilers of ``size`` bytes this machine's memory has room for; at least one."""
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (OSError, ValueError):
        memory = 0
    return max(1, memory // size)


def generate(arch: str, archs: list[str]) -> list[str]:
    """nvcc's options for one of ``archs``. The oldest that is not for one GPU alone is also there as PTX, which drivers
    compile for newer GPUs."""
    portable = [name for name in archs if name.isdigit()]
    codes = [f"sm_{arch}"] + ([f"compute_{arch}"] if portable and arch == min(portable, key=int) else [])
    return [f"-gencode=arch=compute_{arch},code={code}" for code in codes]


PARTS = {
    "cpu": Part("libmacaron_ops_cpu.so", "the CPU kernels (backend `native`)", plan_cpu),
    "cuda": Part("libmacaron_cuda.so", "the CUDA kernels (backend `cuda`)", plan_cuda),
}


# --- what a part needs ----------------------------------------------------------------------------------------------


def compiler() -> tuple[str, str]:
    """The command of the C++ compiler, and its version."""
    command = os.environ.get("CXX") or next(filter(shutil.which, ("g++", "c++", "clang++")), "g++")
    try:
        done = subprocess.run([*shlex.split(command), "--version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError, ValueError, IndexError):
        raise BuildError(f"the C++ compiler {command} is not there, or does not run") from None
    return escaped(command), next(iter(done.stdout.splitlines()), command)


def assembles(cxx: str, flags: str, instruction: str) -> bool:
    """Whether the compiler knows these flags, and its assembler an instruction."""
    command = [*shlex.split(cxx.replace("$$", "$")), *shlex.split(flags), "-x", "c++", "-c", "-o", os.devnull, "-"]
    return subprocess.run(command, input=f'asm("{instruction}");', capture_output=True, text=True).returncode == 0


class Torch(NamedTuple):
    folder: Path
    version: str


def find_torch() -> Torch:
    """The installed torch, without the seconds of importing it."""
    found = importlib.util.find_spec("torch")
    if found is None or not found.submodule_search_locations:
        raise BuildError(
            f"torch's headers are not there: {sys.executable} has no torch (it needs {OLDEST_TORCH} or newer)"
        )
    folder, version = Path(found.submodule_search_locations[0]), importlib.metadata.version("torch")
    if not folder.joinpath("include/torch/csrc/stable/library.h").exists():
        raise BuildError(
            f"torch {version} in {folder} lacks the headers of the stable ABI ({OLDEST_TORCH} or newer has)"
        )
    return Torch(folder, version)


def ninja() -> str:
    """ninja from the environment of this Python, or else from the PATH (which comes first in an isolated build)."""
    places = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    found = shutil.which("ninja", path=places)
    if found is None:
        raise BuildError(f"ninja is not there: {sys.executable} -m pip install ninja")
    return found


# --- ninja ----------------------------------------------------------------------------------------------------------


def escaped(text: str) -> str:
    return text.replace("$", "$$")


def option(name: str, value: Path | str) -> str:
    """A compiler's option with a value that may hold anything."""
    return escaped(shlex.quote(f"{name}{value}"))


def rule(name: str, command: str, description: str, *more: str) -> str:
    return "\n  ".join([f"rule {name}", f"command = {command}", f"description = {description}", *more])


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """One build at a time in a folder: two ninjas would spoil each other's log."""
    folder.mkdir(parents=True, exist_ok=True)
    with folder.joinpath("lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def run_ninja(build_file: Path) -> None:
    """Runs ninja and shows its lines as they come.

    Raises:
        BuildError: with the first error that the compiler reported.
    """
    command = [ninja(), "-f", str(build_file.relative_to(ROOT))]
    if os.environ.get("MAX_JOBS"):
        command += ["-j", os.environ["MAX_JOBS"]]
    environment = {"NINJA_STATUS": "[%f/%t, %es] ", **os.environ, "LC_ALL": "C"}
    output = []
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        for line in process.stdout:
            output.append(line.rstrip())
            print(output[-1], flush=True)
    if process.returncode:
        errors = [line for line in output if "error:" in line] or [line for line in output if line][-1:]
        raise BuildError(errors[0] if errors else f"{command[0]} failed without a word")


def build(part: str, modes: Modes) -> tuple[Path, dict]:
    """Builds a part in its folder under build/: its library, and what to record about it."""
    text, record = PARTS[part].plan(modes)
    folder = ROOT / modes.folder / part
    build_file = folder / "build.ninja"
    with alone(folder):
        if not build_file.exists() or build_file.read_text() != text:
            build_file.write_text(text)
        run_ninja(build_file)
    return folder / PARTS[part].library, record


# --- installing -----------------------------------------------------------------------------------------------------


def asked_for() -> list[str] | None:
    """The parts that MACARON_OPS_BUILD names; None where it is not set: all that can be built.

    Raises:
        BuildError: there is no part of that name.
    """
    value = os.environ.get("MACARON_OPS_BUILD")
    if value is None:
        return None
    names = [name.strip() for name in value.split(",") if name.strip()]
    names = [] if names == ["none"] else names
    for name in names:
        if name not in PARTS:
            raise BuildError(
                f"MACARON_OPS_BUILD={value}: there is no part {name!r}; expected none, or of {', '.join(PARTS)}"
            )
    return names


def put(file: Path, folder: Path) -> None:
    """Copies a library unless it is there already, never over the bytes that a running process has mapped."""
    target = folder / file.name
    if target.exists() and filecmp.cmp(file, target):
        return
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy2(file, target.with_suffix(".new"))
    target.with_suffix(".new").replace(target)


def install(folder: Path, optional: bool) -> bool:
    """Builds what is wanted and puts it into ``folder``, with the record; whether a library is there then.

    Raises:
        BuildError: a part cannot be built, and either MACARON_OPS_BUILD names it or nothing is ``optional``.
    """
    asked = asked_for()
    record = {}
    for name, part in PARTS.items():
        try:
            if asked is not None and name not in asked:
                raise BuildError(f"it was built with MACARON_OPS_BUILD={','.join(asked) or 'none'}")
            library, record[name] = build(name, Modes())
            put(library, folder)
        except BuildError as error:
            wanted = name in asked if asked is not None else not isinstance(error, NotHere)
            if wanted and (asked or not optional):
                raise
            folder.joinpath(part.library).unlink(missing_ok=True)
            record[name] = {"missing": str(error)}
            print(missing(part, error) if wanted else f"{part.library}: left out, {error}", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    folder.joinpath(RECORD).write_text(json.dumps(record, indent=1) + "\n")
    return any("missing" not in entry for entry in record.values())


def missing(part: Part, error: BuildError) -> str:
    """The screen that says that a part is left out."""
    line = "*" * 100
    return f"""
{line}
macaron_ops is installed WITHOUT {part.about}.
Everything works, on the backend `reference`, which is slower.

why:      {error}
to mend:  {MEND}
          and install again: pip install --no-build-isolation --no-deps --force-reinstall -v .
          `macaron-ops doctor` repeats this. MACARON_OPS_BUILD=cpu makes it an error,
          MACARON_OPS_BUILD=none says that it is meant so.
{line}
"""


MEND = f"a C++ compiler (GCC 10, clang 12 or newer: apt install g++), ninja and torch {OLDEST_TORCH} or newer,"


def main(arguments: list[str]) -> str | None:
    """What went wrong, or None."""
    flags = [f"--{name.replace('_', '-')}" for name in Modes._fields]
    if not set(arguments) <= set(flags):
        return __doc__
    modes = Modes(*(flag in arguments for flag in flags))
    try:
        if any(modes):
            for name in modes.parts:
                put(build(name, modes)[0], ROOT / modes.folder)
        else:
            install(PACKAGE, optional=False)
    except BuildError as error:
        return f"\nThe native libraries were not built: {error}\nMACARON_OPS_BUILD=none does without them."
    return None


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
