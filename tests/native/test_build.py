"""Claims: only what changed is compiled; what cannot be built is said loudly and recorded, and is an error only where
it was asked for by name; the kernels of one instruction set leave nothing behind that another machine would run into.

The builds are of a small source tree, with the project's own build script and setup.py."""

import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BUILT = ROOT / "build" / "native" / "cpu"
KERNEL = "namespace macaron_ops::MACARON_OPS_ISA { int %s(int x) { return x + 1; } }\n"
SETUP = ["setup.py", "-q", "build", "--build-lib=out"]

pytest.importorskip("setuptools", minversion="77", reason="pyproject.toml asks for it")
NINJA = shutil.which("ninja") or shutil.which("ninja", path=Path(sys.executable).parent)
COMPILER = sys.platform == "linux" and shutil.which(os.environ.get("CXX", "g++"))
pytestmark = pytest.mark.skipif(not (COMPILER and NINJA), reason="needs a C++ compiler and ninja")


@pytest.fixture
def tree(tmp_path):
    """A package with two kernels, and nothing that needs torch's headers."""
    for name in (
        "setup.py",
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "tools/build_native.py",
        "macaron_ops/__init__.py",
    ):
        tmp_path.joinpath(name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    glue = tmp_path / "csrc/cpu/torch/library.cpp"
    glue.parent.mkdir(parents=True)
    glue.write_text("int glue() { return 1; }\n")
    for name in ("first", "second"):
        tmp_path.joinpath(f"csrc/cpu/{name}.cpp").write_text(KERNEL % name)
    return tmp_path


def run(tree, *command, expect=0, **environment):
    """What this Python prints when it runs ``command`` in a tree."""
    mine = {name: value for name, value in os.environ.items() if name not in ("MACARON_OPS_BUILD", "LD_PRELOAD")}
    done = subprocess.run(
        [sys.executable, *command],
        cwd=tree,
        env={**mine, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == expect, done.stdout
    return done.stdout


def build(tree, *arguments, **options):
    return run(tree, "tools/build_native.py", *arguments, **options)


def install(tree, **options):
    """The part of `pip install` that builds: what it prints, and what it recorded beside the library."""
    text = run(tree, *SETUP, **options)
    record = tree / "out/macaron_ops/native/build.json"
    return text, json.loads(record.read_text())["cpu"] if record.exists() else None


def compiled(text):
    return {line.split("c++ csrc/cpu/")[1] for line in text.splitlines() if "c++ csrc/cpu/" in line}


def test_only_what_changed_is_compiled(tree):
    first = build(tree)
    kinds = json.loads(tree.joinpath("macaron_ops/native/build.json").read_text())["cpu"]["instruction sets"]
    assert compiled(first) == {"torch/library.cpp (torch)"} | {
        f"{name}.cpp ({isa})" for name in ("first", "second") for isa in kinds
    }
    assert tree.joinpath("macaron_ops/native/libmacaron_ops_cpu.so").exists()
    assert "no work to do" in build(tree)

    tree.joinpath("csrc/cpu/first.h").write_text("// read by one kernel\n")
    tree.joinpath("csrc/cpu/first.cpp").write_text('#include "first.h"\n' + KERNEL % "first")
    assert compiled(build(tree)) == {f"first.cpp ({isa})" for isa in kinds}
    tree.joinpath("csrc/cpu/first.h").write_text("// and changed\n")
    assert compiled(build(tree)) == {f"first.cpp ({isa})" for isa in kinds}


def test_a_copied_checkout_has_nothing_to_build(tree, tmp_path_factory):
    build(tree)
    copy = tmp_path_factory.mktemp("copy") / "with a space"
    shutil.copytree(tree, copy)
    assert "no work to do" in build(copy)


def test_setup_and_make_share_what_is_compiled(tree):
    build(tree)
    text, record = install(tree)
    assert "no work to do" in text and record["compiler"]
    assert tree.joinpath("out/macaron_ops/native/libmacaron_ops_cpu.so").exists()


def test_a_library_for_sanitizers_leaves_the_package_alone(tree):
    build(tree, "--sanitize")
    library = tree / "build/sanitize/libmacaron_ops_cpu.so"
    assert b"__asan_init" in library.read_bytes() and b"__ubsan" in library.read_bytes()
    assert not tree.joinpath("macaron_ops/native").exists()


@pytest.mark.skipif(platform.machine() != "x86_64", reason="AVX-512 is emulated on x86-64")
def test_an_emulated_library_holds_no_instruction_of_avx512(tree):
    """Nor another set; and an instruction that csrc/emulated lacks is an error."""
    shutil.copytree(ROOT / "csrc/emulated", tree / "csrc/emulated")
    kernel = (
        "#include <immintrin.h>\nnamespace macaron_ops::MACARON_OPS_ISA { __m512 first(__m512 x) { return %s; } }\n"
    )
    tree.joinpath("csrc/cpu/first.cpp").write_text(kernel % "_mm512_maskz_scalef_ps(0xffff, x, x)")
    text = build(tree, "--emulate")
    assert compiled(text) == {"torch/library.cpp (torch)"} | {
        f"{name}.cpp ({isa})" for name in ("first", "second") for isa in ("avx512", "avx512_bf16")
    }
    code = subprocess.check_output(["objdump", "-d", tree / "build/emulate/libmacaron_ops_cpu.so"], text=True)
    assert "%ymm" in code and "%zmm" not in code and "%k1" not in code
    assert not tree.joinpath("macaron_ops/native").exists()

    tree.joinpath("csrc/cpu/first.cpp").write_text(kernel % "_mm512_sqrt_ps(x)")
    assert "target specific option mismatch" in build(tree, "--emulate", expect=1)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="AMX is of x86-64")
def test_a_compiler_that_does_not_know_amx_builds_the_other_sets(tree):
    old = tree / "old"
    old.write_text(f'#!/bin/sh\ncase "$*" in *-mamx*) exit 1;; esac\nexec {COMPILER} "$@"\n')
    old.chmod(0o755)
    text = build(tree, CXX=str(old))
    assert "without amx" in text and "(avx512_bf16)" in text and "(amx)" not in text


def test_without_a_compiler_one_screen_says_so_and_the_package_is_installed(tree):
    install(tree)
    text, record = install(tree, CXX="/nonexistent")
    assert "WITHOUT the CPU kernels" in text and "apt install g++" in text and len(text.splitlines()) < 24
    assert record == {"missing": "the C++ compiler /nonexistent is not there, or does not run"}
    assert record["missing"] in text
    assert not tree.joinpath("out/macaron_ops/native/libmacaron_ops_cpu.so").exists()  # not that of the build before


def test_a_kernel_that_does_not_compile_is_named(tree):
    tree.joinpath("csrc/cpu/first.cpp").write_text("int broken() { return nothing; }\n")
    text, record = install(tree)
    assert "WITHOUT the CPU kernels" in text
    assert record["missing"].startswith("csrc/cpu/first.cpp:1:23: error: ")
    assert "csrc/cpu/first.cpp:1:23: error: " in build(tree, expect=1)  # make stops


@pytest.mark.parametrize(
    "asked, message",
    [
        ("cpu", "the C++ compiler /nonexistent is not there"),
        ("cuda", "csrc/cuda holds no sources"),
        ("gpu", "there is no part 'gpu'"),
    ],
)
def test_a_part_that_was_asked_for_and_is_missing_is_an_error(tree, asked, message):
    for command in (["tools/build_native.py"], SETUP):
        assert message in run(tree, *command, CXX="/nonexistent", MACARON_OPS_BUILD=asked, expect=1)


@pytest.mark.parametrize("asked", ["none", ""])
def test_nothing_is_built_where_nothing_is_asked_for(tree, asked):
    text, record = install(tree, MACARON_OPS_BUILD=asked, CXX="/nonexistent")
    assert "WITHOUT" not in text
    assert record == {"missing": "it was built with MACARON_OPS_BUILD=none"}
    assert "left out" in build(tree, MACARON_OPS_BUILD=asked)


@pytest.mark.skipif(not BUILT.joinpath("libmacaron_ops_cpu.so").exists(), reason="the library was not built here")
class TestTheLibrary:
    """What was built from csrc/ in this checkout."""

    def test_it_names_libtorch_and_looks_nowhere_of_its_own(self):
        dynamic = subprocess.check_output(["readelf", "-d", BUILT / "libmacaron_ops_cpu.so"], text=True)
        needed = {line.split("[")[1].rstrip("]") for line in dynamic.splitlines() if "(NEEDED)" in line}
        assert {"libtorch.so", "libtorch_cpu.so"} <= needed
        assert not {name for name in needed if "python" in name}
        assert "RUNPATH" not in dynamic and "RPATH" not in dynamic

    def test_kernels_share_no_function_between_instruction_sets(self):
        """The linker keeps one copy of a function that several objects define weakly: it might be that for AVX-512."""
        folders = [folder for folder in BUILT.iterdir() if folder.is_dir() and folder.name != "torch"]
        assert folders
        for folder in folders:
            for file in folder.glob("*.o"):
                defined = subprocess.check_output(["nm", "-C", "--defined-only", file], text=True).splitlines()
                shared = [line.split(" ", 2)[2] for line in defined if line.split(" ", 2)[1] in "Ww"]
                assert not [name for name in shared if f"macaron_ops::{folder.name}::" not in name], file
