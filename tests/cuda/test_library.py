"""Claim: the library of CUDA kernels is refused with a sentence where it cannot run; and where it was built, it loads
with any torch, also one without CUDA, names nothing of Python, and none of its kernels spills or uses local memory."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import macaron_ops
from macaron_ops import native
from macaron_ops.native.cuda import library
from tests.native.compiled import build

ROOT = Path(__file__).parents[2]
BUILT = ROOT / "build" / "native" / "cuda" / "libmacaron_cuda.so"
VARIANTS = 4  # csrc/cuda/sm90/product.h


def why_no_library(built):
    """Why there is nothing to look into: it was not built, or not from the sources that are here."""
    if not built.exists():
        return "the library was not built here"
    sources = ROOT / "csrc" / "cuda"
    compiled = set(
        re.findall(r"^build \S+: (?:kernel|glue|sm90) (\S+)$", built.with_name("build.ninja").read_text(), re.M)
    )
    folders = ["*.cu", "torch/*.cpp"] + ["sm90/*.cu"] * any("/sm90/" in source for source in compiled)
    there = {str(path.relative_to(ROOT)) for folder in folders for path in sources.glob(folder)}
    age = built.stat().st_mtime
    newer = {str(path.relative_to(ROOT)) for path in sources.rglob("*.*") if path.stat().st_mtime > age}
    host = {path for path in newer if path.startswith("csrc/cuda/host/")}  # of the kernels on the CPU
    changed = sorted((compiled ^ there) | (newer - host))
    if not changed:
        return None
    return f"{built} is older than {changed[0]}: MACARON_OPS_BUILD=cpu,cuda python tools/build_native.py"


WHY_NO_LIBRARY = why_no_library(BUILT)
needs_library = pytest.mark.skipif(WHY_NO_LIBRARY is not None, reason=f"{WHY_NO_LIBRARY}")


def in_another_process(script, python=sys.executable, **environment):
    done = subprocess.run([python, "-c", script], capture_output=True, text=True, env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# -- which GPUs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("archs", "runs", "does_not"),
    [
        (("90a",), [(9, 0)], [(8, 0), (8, 9), (10, 0)]),
        (("80", "90a"), [(8, 0), (8, 6), (9, 0), (10, 0)], [(7, 5)]),
        (("89",), [(8, 9), (9, 0), (12, 0)], [(8, 0), (8, 6)]),
        (("100f",), [(10, 0), (10, 3)], [(9, 0), (12, 0)]),
        (("host",), [], [(9, 0)]),
    ],
)
def test_gpus_that_the_code_runs_on(archs, runs, does_not):
    assert all(library.runs_on(capability, archs) for capability in runs)
    assert not any(library.runs_on(capability, archs) for capability in does_not)


def test_what_is_compiled_for_each_gpu(monkeypatch):
    """The oldest of those that newer ones can run also as PTX; a name that is none is refused."""
    monkeypatch.setenv("MACARON_OPS_CUDA_ARCHS", "80; 90a")
    names = build.cuda_archs()
    assert [flag for name in names for flag in build.generate(name, names)] == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_80,code=compute_80",
        "-gencode=arch=compute_90a,code=sm_90a",
    ]
    for wrong in ("hopper", "75", "90aa", "sm_90"):
        monkeypatch.setenv("MACARON_OPS_CUDA_ARCHS", wrong)
        with pytest.raises(build.BuildError, match=f"MACARON_OPS_CUDA_ARCHS={wrong}: '{wrong}' is no GPU"):
            build.cuda_archs()


@pytest.mark.parametrize(
    ("answer", "archs"), [("9.0\\n8.6\\n9.0", ["86", "90a"]), (None, ["80", "90a"]), ("", ["80", "90a"])]
)
def test_the_gpus_of_the_machine_unless_others_are_asked_for(answer, archs, tmp_path, monkeypatch):
    monkeypatch.delenv("MACARON_OPS_CUDA_ARCHS", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    if answer is not None:
        tmp_path.joinpath("nvidia-smi").write_text(f"#!/bin/sh\nprintf '{answer}'\n")
        tmp_path.joinpath("nvidia-smi").chmod(0o755)
    assert build.cuda_archs() == archs


@pytest.mark.parametrize(("gigabytes", "depth"), [(4, 1), (20, 2), (128, 16)])
def test_so_many_compilers_of_cutlass_as_there_is_memory_for(gigabytes, depth, monkeypatch, tmp_path):
    """On 20 GB two, whatever ninja would run on its own."""
    tmp_path.joinpath("include", "cutlass").mkdir(parents=True)
    tmp_path.joinpath("include", "cutlass", "cutlass.h").touch()
    for name, value in {"CUTLASS": tmp_path, "CUDA_ARCHS": "90a", "BUILD": "cuda"}.items():
        monkeypatch.setenv(f"MACARON_OPS_{name}", str(value))
    monkeypatch.setattr(build, "cuda_compiler", lambda torch: ("nvcc", "release 13"))
    monkeypatch.setattr(build, "cuda_libraries", lambda nvcc: "")
    monkeypatch.setattr(build.os, "sysconf", {"SC_PAGE_SIZE": 1 << 12, "SC_PHYS_PAGES": gigabytes << 18}.__getitem__)
    text, record = build.plan_cuda(build.Modes())
    assert f"pool sm90\n  depth = {depth}\n" in text and record["wide FFN"] == "with CUTLASS"
    rules = {rule.split("\n")[0]: "  pool = sm90" in rule for rule in text.split("rule ")[1:]}
    assert rules == {"kernel": False, "glue": False, "link": False, "sm90": True}


def test_without_nvcc_it_is_left_out(monkeypatch):
    monkeypatch.setenv("NVCC", "/nonexistent")
    with pytest.raises(build.NotHere, match="the CUDA compiler /nonexistent is not there"):
        build.plan_cuda(build.Modes())


def test_without_cutlass_the_rest_is_built(monkeypatch, tmp_path):
    """Its headers are looked for where sm_90a is compiled for; the library will say why it lacks what needs them."""
    monkeypatch.delenv("MACARON_OPS_CUTLASS", raising=False)
    assert build.cutlass(["80", "90"]) == (None, "it was not built for sm_90a")
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: None)
    include, why = build.cutlass(["90a"])
    assert include is None and "pip install --no-deps nvidia-cutlass" in why
    monkeypatch.setenv("MACARON_OPS_CUTLASS", str(tmp_path))
    with pytest.raises(build.BuildError, match="there is no include/cutlass/cutlass.h in it"):
        build.cutlass(["90a"])
    tmp_path.joinpath("include", "cutlass").mkdir(parents=True)
    tmp_path.joinpath("include", "cutlass", "cutlass.h").touch()
    assert build.cutlass(["90a"]) == (tmp_path / "include", "")


def test_torch_compile_traces_the_choice():
    """What the library says of itself, once it was loaded, is a constant for torch.compile."""

    def asked(x):
        return x + len(library.archs()) if library.why_not_loaded() is None else x - 1

    x = torch.zeros(2)
    expected = asked(x)
    assert torch.equal(torch.compile(asked, fullgraph=True, backend="eager")(x), expected)


# -- refusals --------------------------------------------------------------------------------------------------------

WHY = "import macaron_ops; print(macaron_ops.backends()['cuda'].reason)"


def test_a_file_that_is_not_there(tmp_path):
    file = str(tmp_path / "nothing.so")
    why = in_another_process(WHY, MACARON_OPS_CUDA_LIBRARY=file, MACARON_OPS_CUDA_ON_HOST="0")
    assert why == f"MACARON_OPS_CUDA_LIBRARY={file}: {os.strerror(2)}"
    why = in_another_process(WHY, MACARON_OPS_CUDA_LIBRARY=file, MACARON_OPS_CUDA_ON_HOST="1")
    assert why.startswith(f"MACARON_OPS_CUDA_ON_HOST=1, and {file} was not built: ")


@needs_library
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu():
    environment = {"MACARON_OPS_CUDA_LIBRARY": str(BUILT)}
    assert in_another_process(WHY, **environment, MACARON_OPS_CUDA_ON_HOST="0") == "torch sees no CUDA device"
    why = in_another_process(WHY, **environment, MACARON_OPS_CUDA_ON_HOST="1")
    assert why == f"{BUILT} is a library for a GPU"


@pytest.mark.skipif(not library.on_host(), reason="the kernels of this process are for a GPU")
def test_what_it_declines():
    x = torch.zeros(2, 17)
    with macaron_ops.use_backend("cuda"):
        with pytest.raises(macaron_ops.BackendError, match="at most 16 channels, not 17"):
            macaron_ops.sphere_attend_step(x, 0.3, 2.0)
        with pytest.raises(macaron_ops.BackendError, match="not torch.float64"):
            macaron_ops.normalize_step(x.double(), x.double(), 0.3)
        for width, message in ((8200, "at most 8192 channels, not 8200"), (4097, "no multiple of 16 bytes, not 4097")):
            wide = torch.zeros(1, width)
            with pytest.raises(macaron_ops.BackendError, match=message):
                macaron_ops.normalize_step(wide, wide, 0.3)
    assert macaron_ops.explain(macaron_ops.normalize_step, x, x, 0.3).backend != "cuda"  # not without being asked for


# -- what was built --------------------------------------------------------------------------------------------------


def test_a_library_of_other_sources_is_told(tmp_path):
    """It is not looked into: what it lacks would be an error of nobody's."""
    built, ninja = tmp_path / "libmacaron_cuda.so", tmp_path / "build.ninja"
    assert why_no_library(built) == "the library was not built here"
    sources = [*ROOT.glob("csrc/cuda/*.cu"), *ROOT.glob("csrc/cuda/torch/*.cpp"), *ROOT.glob("csrc/cuda/sm90/*.cu")]
    lines = [f"build x/{path.stem}.o: glue {path.relative_to(ROOT)}\n" for path in sources]
    ninja.write_text("".join(lines))
    built.touch()
    assert why_no_library(built) is None
    ninja.write_text("".join(line for line in lines if "/sm90/" not in line))  # without CUTLASS
    assert why_no_library(built) is None
    ninja.write_text("".join(line for line in lines if "wide_ffn.cpp" not in line))
    assert f"{built} is older than csrc/cuda/torch/wide_ffn.cpp: MACARON_OPS_BUILD=" in why_no_library(built)
    ninja.write_text("".join(lines))
    os.utime(built, (0, 0))
    assert f"{built} is older than csrc/cuda/activation.h: " in why_no_library(built)


def test_what_is_newer_than_the_library(tmp_path, monkeypatch):
    """As doctor tells it: all but what runs the kernels on the CPU, of which the library has nothing."""
    old = tmp_path / "old.so"
    old.touch()
    os.utime(old, (0, 0))
    monkeypatch.setenv("MACARON_OPS_CUDA_LIBRARY", str(old))
    newer = native.newer_sources("cuda")
    assert {"rows.h", "norm_rows.cu", "sm90/gemm.h", "torch/tensors.h"} <= set(newer)
    assert not [name for name in newer if name.startswith("host")]


@needs_library
def test_nothing_that_a_capture_refuses():
    """No object allocates, copies, or waits through the CUDA runtime: launches alone, on the stream that is current."""
    objects = [path for kind in ("kernel", "sm90", "glue") for path in sorted(BUILT.parent.glob(f"{kind}/*.o"))]
    text = subprocess.check_output(["nm", "--undefined-only", "--no-sort", *objects], text=True)
    called = set(re.findall(r" U ((?:__)?cuda[A-Z]\w*)", text))
    assert "cudaFuncSetAttribute" in called
    questions = {"cudaDeviceGetAttribute", "cudaGetDevice", "cudaGetDriverEntryPointByVersion", "cudaFuncSetAttribute"}
    questions.add("cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags")
    errors = {"cudaGetErrorString", "cudaGetLastError", "cudaPeekAtLastError"}
    others = called - questions - errors
    assert not {name for name in others if not re.search("Launch|[Rr]egister|CallConfiguration|GetKernel", name)}


@needs_library
def test_it_names_libtorch_and_looks_nowhere_of_its_own():
    dynamic = subprocess.check_output(["readelf", "-d", BUILT], text=True)
    needed = {line.split("[")[1].rstrip("]") for line in dynamic.splitlines() if "(NEEDED)" in line}
    assert {"libtorch.so", "libtorch_cpu.so"} <= needed
    assert not {name for name in needed if "python" in name or "cuda" in name}
    assert "RUNPATH" not in dynamic and "RPATH" not in dynamic
    undefined = subprocess.check_output(["nm", "-D", "--undefined-only", BUILT], text=True).splitlines()
    assert ["w", "aoti_torch_get_current_cuda_stream"] in [line.split() for line in undefined]
    # What the driver exports is asked for when it is needed: cuTensorMapEncodeTiled, of CUTLASS.
    assert not [line for line in undefined if re.match(r"(cu[A-Z]|cuda[A-Z]|Py)", line.split()[-1])]


# Interpreters with another torch, of any Python, apart from this one: "/a/bin/python:/b/bin/python".
PYTHONS = [python for python in os.environ.get("MACARON_OPS_TEST_PYTHONS", "").split(os.pathsep) if python]


@needs_library
@pytest.mark.parametrize("python", [sys.executable, *PYTHONS])
def test_it_loads_without_cuda(python):
    """The same file, whichever torch it meets, and knows why it has no products for Hopper, or that it has them."""
    script = (
        f"import torch; torch.ops.load_library({str(BUILT)!r}); ops = torch.ops.macaron_ops_cuda;"
        "assert bool(ops.without_sm90()) != hasattr(ops, 'ffn_hidden'); print(ops.archs())"
    )
    assert re.fullmatch(r"[0-9af ]+", in_another_process(script, python, CUDA_VISIBLE_DEVICES=""))


def cuobjdump(*arguments):
    """What Triton's copy of the tool says."""
    triton = pytest.importorskip("triton")
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists():
        pytest.skip("needs cuobjdump")
    return subprocess.check_output([tool, *arguments], text=True)


@needs_library
def test_no_kernel_spills():
    text = cuobjdump("--dump-resource-usage", BUILT)
    kernels = re.findall(r"Function (\S+):\s*\n\s*REG:\d+ STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    assert len(kernels) > 100
    assert sum("cutlass" in name for name, *_ in kernels) == len(HOPPER) * VARIANTS
    assert not [name for name, stack, local in kernels if stack != "0" or local != "0"]


@needs_library
@pytest.mark.parametrize(
    ("kernels", "instructions"),
    [
        ("ffn_step", ["HMMA.16816.F32.BF16", "LDGSTS", "LDSM"]),
        ("ffn_step_backward", ["HMMA.16816.F32.BF16", "LDGSTS", "LDSM.16.MT88"]),
        ("sphere_attend_step", ["MUFU.EX2", "LDS.128", "FFMA"]),
        ("sphere_attend_step_backward", ["MUFU.EX2", "LDS.128", "FFMA"]),
        ("normalize_step", ["LDG.E.128", "STG.E.128", "SHFL.BFLY", "BAR.SYNC"]),
        ("norm_rows", ["LDG.E.128", "STG.E.128", "SHFL.BFLY", "BAR.SYNC"]),
    ],
)
def test_instructions(kernels, instructions):
    """Tensor cores, asynchronous copies, 16 bytes a read and write of a row, and a read of shared memory, the
    hardware's exponential."""
    text = cuobjdump("--dump-sass", BUILT.parent / "kernel" / f"{kernels}.o")
    assert not [name for name in instructions if name not in text]


@needs_library
@pytest.mark.parametrize(("kernels", "count"), [("normalize_step", 144), ("norm_rows", 72)])
def test_rows_and_parameters_are_read_by_vectors(kernels, count):
    """Where rows are vectors, two tensors' are on their way before a warp adds up the first sum; and of a parameter
    nothing is read by itself, but a step that is one number."""
    text = cuobjdump("--dump-sass", BUILT.parent / "kernel" / f"{kernels}.o")
    seen = 0
    for kernel in text.split("Function : ")[1:]:
        name, code = kernel.split("\n", 1)
        ((vector, chunks),) = re.findall(r"ShapeI\w+?Li(\d+)ELi(\d+)ELb", name)
        if vector == "1":
            continue
        seen += 1
        reads = re.findall(r"\b(LDG\.E\S*|SHFL\.BFLY)", code)
        before = reads[: reads.index("SHFL.BFLY")]
        # z may not be there; the first sum of the direction "difference" is of u alone.
        tensors = 1 if "norm_forward" in name or "DirectionE1" in name else 2
        assert sum(read.startswith("LDG.E.128") for read in before) >= tensors * int(chunks), name
        alone = [read for read in reads if not read.startswith(("LDG.E.128", "SHFL"))]
        assert len(alone) <= 1, (name, alone)
    assert seen > 0 and seen % count == 0  # for each GPU


HOPPER = sorted(BUILT.parent.glob("sm90/*.o"))


@needs_library
@pytest.mark.skipif(not HOPPER, reason="the library was built without CUTLASS")
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("product", ["hidden", "residual", "backward"])
def test_instructions_of_hopper(product, dtype):
    """A kernel for each tile: it multiplies by wgmma in its dtype with float32 sums, copies by TMA both ways, and its
    producer hands registers to the consumers; nothing in local memory. Blocks of a cluster share a copy: all tiles' but
    those for few rows, whose clusters are one block."""
    text = cuobjdump("--dump-sass", BUILT.parent / "sm90" / f"{product}_{dtype}.o")
    kernels = text.split("Function : ")[1:]
    assert len(kernels) == VARIANTS
    multiplies = r"HGMMA\.64x\d+x16\.F32" + (r"\.BF16" if dtype == "bf16" else r"(?!\.)")
    for kernel in kernels:
        missing = [name for name in (multiplies, "UTMALDG", "UTMASTG", "USETMAXREG") if not re.search(name, kernel)]
        assert not missing, (kernel.splitlines()[0], missing)
        assert not re.search(r"\b(LDL|STL)\b", kernel), kernel.splitlines()[0]
    assert sum("UTMALDG.3D.MULTICAST" in kernel for kernel in kernels) == VARIANTS - 1
