"""Claim: a library that cannot be used here is refused with a sentence, never with a crash, and macaron_ops imports all
the same."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from macaron_ops import doctor, native

INSTALLED = Path(native.__file__).with_name("libmacaron_ops_cpu.so")
needs_library = pytest.mark.skipif(not INSTALLED.exists(), reason="the library was not built here")


@pytest.fixture
def refusal(monkeypatch):
    """Why a library is not loaded: asked anew, whatever this process has loaded."""

    def ask(path):
        monkeypatch.setenv("MACARON_OPS_NATIVE_LIBRARY", str(path))
        loaded = native._load.__wrapped__()
        assert loaded.path is None and loaded.isa == "" and loaded.isas == ()
        return loaded.why_not

    return ask


def in_another_process(script, **environment):
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_file_that_is_not_there(refusal, tmp_path):
    assert refusal(tmp_path / "nothing.so") == f"MACARON_OPS_NATIVE_LIBRARY={tmp_path}/nothing.so: " + os.strerror(2)


def test_a_library_that_was_not_built(tmp_path, monkeypatch):
    monkeypatch.delenv("MACARON_OPS_NATIVE_LIBRARY", raising=False)
    monkeypatch.setattr(native, "_FOLDER", tmp_path)
    assert native._load.__wrapped__().why_not == f"its library was not built (to build it: {native.how_to_build()})"
    for broken in ("", "[]", "{}", '{"cpu": 1}'):
        tmp_path.joinpath("build.json").write_text(broken)
        assert native.build_record() == {}
    tmp_path.joinpath("build.json").write_text('{"cpu": {"missing": "no g++"}}')
    assert native._load.__wrapped__().why_not.startswith("its library was not built: no g++ (to build it: ")


def test_something_else_than_a_library(refusal, tmp_path):
    file = tmp_path / "text.so"
    for content in (b"", b"\x7fELF", b"#include <torch/csrc/stable/library.h>\n"):
        file.write_bytes(content)
        assert refusal(file) == f"{file} is not a shared library"


@pytest.mark.skipif(not native.library(), reason="the native library cannot be used here")
@pytest.mark.parametrize("size", [100, 4000, 200_000])
def test_half_a_library(refusal, tmp_path, size):
    """Loading it would end the process."""
    file, whole = tmp_path / "half.so", native.library_path().read_bytes()
    file.write_bytes(whole[:size])
    assert refusal(file) == f"{file} is cut off: {size} bytes of {len(whole)}"


def test_a_library_for_another_machine(refusal, tmp_path):
    file, other = tmp_path / "other.so", 183 if os.uname().machine == "x86_64" else 62
    file.write_bytes(b"\x7fELF\x02\x01\x01" + bytes(9) + b"\x03\x00" + other.to_bytes(2, "little") + bytes(44))
    assert refusal(file).startswith(f"{file} was built for {'aarch64' if other == 183 else 'x86_64'}, this machine is ")


def test_a_library_that_wants_what_this_torch_has_not(refusal, tmp_path):
    file = tmp_path / "newer.so"
    compiler = os.environ.get("CXX", "g++").split()
    source = 'extern "C" int torch_of_the_future(); int use() { return torch_of_the_future(); }'
    try:
        subprocess.run([*compiler, "-shared", "-fPIC", "-xc++", "-", "-o", file], input=source, text=True, check=True)
    except OSError:
        pytest.skip("needs a C++ compiler")
    why = refusal(file)
    assert why.startswith(f"it does not load with torch {torch.__version__}: {file}: ")
    assert "torch_of_the_future" in why


def test_a_torch_that_is_too_old(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.10.1+cpu")
    assert native._load.__wrapped__().why_not == "it needs torch 2.11 or newer, this is torch 2.10.1+cpu"


def test_a_library_of_something_else():
    other = Path(torch.__file__).parent / "lib" / "libc10.so"
    script = "from macaron_ops import native; print(native.why_not_loaded())"
    why = in_another_process(script, MACARON_OPS_NATIVE_LIBRARY=str(other))
    assert why.startswith(f"{other} is not the library of this macaron_ops")


@needs_library
@pytest.mark.parametrize("asked", ["neon", "AVX2"])
def test_an_instruction_set_that_is_not_there(asked):
    why = in_another_process(
        "from macaron_ops import native; print(native.why_not_loaded())", MACARON_OPS_CPU_ISA=asked
    )
    assert why.startswith(f"MACARON_OPS_CPU_ISA={asked}: ") and " ".join(native.cpu_isas()) in why


@needs_library
@pytest.mark.parametrize("isa", native.cpu_isas())
def test_every_instruction_set_of_this_cpu_can_be_asked_for(isa):
    script = "from macaron_ops import doctor, native; print(native.cpu_isa()); print(doctor.report())"
    found, text = in_another_process(script, MACARON_OPS_CPU_ISA=isa).split("\n", 1)
    assert found == isa and f"{isa}, asked for" in text


@needs_library
def test_what_was_built_here_is_used():
    assert native.why_not_loaded() is None and native.library() == native.library_path()


@needs_library
def test_doctor_tells_what_was_built_and_what_runs():
    text = doctor.report()
    assert str(native.library()) in text and native.build_record().get("compiler", "") in text
    assert f"{native.cpu_isa()}, " in text and ", ".join(native.cpu_isas()) in text
    assert native.cpu_isa() == native.cpu_isas()[-1] or os.environ.get("MACARON_OPS_CPU_ISA")


def test_doctor_tells_why_nothing_was_built(monkeypatch, tmp_path):
    monkeypatch.setattr(native, "_FOLDER", tmp_path)
    monkeypatch.setattr(native, "library", lambda: None)
    monkeypatch.setattr(native, "why_not_loaded", lambda: "its library was not built: no g++")
    assert "none: its library was not built: no g++" in doctor.report()
