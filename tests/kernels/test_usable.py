"""Claim: where no kernel could be compiled or started the backend's reason says so, `macaron-ops doctor` shows it, and
calls go to another backend: a GPU before Ampere, no C compiler for Triton's launcher, no headers of Python."""

import sysconfig
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from macaron_ops import doctor, kernels  # noqa: E402
from macaron_ops.kernels import device  # noqa: E402
from macaron_ops.ops import dispatch  # noqa: E402

T4, A100, H100 = (
    SimpleNamespace(name=name, major=major, minor=minor, multi_processor_count=processors)
    for name, major, minor, processors in (("Tesla T4", 7, 5, 40), ("A100", 8, 0, 108), ("H100", 9, 0, 132))
)
OLD = "Tesla T4 has compute capability 7.5, the kernels need 8.0"


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """One with these GPUs, commands and, unless told otherwise, Python's headers."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    for name in ("CC", "CPATH", "C_INCLUDE_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sysconfig, "get_path", lambda *arguments: str(tmp_path))
    device.why_not_on.cache_clear()

    def asked_too_early(*_):
        raise AssertionError("initialises CUDA")

    def make(*gpus, commands=("gcc",), headers=True):
        tmp_path.joinpath("Python.h").touch() if headers else tmp_path.joinpath("Python.h").unlink(missing_ok=True)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(gpus))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
        monkeypatch.setattr(torch.cuda, "get_device_properties", asked_too_early)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda d: (gpus[d.index].major, gpus[d.index].minor))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda d: gpus[d.index].name)
        monkeypatch.setattr(kernels.shutil, "which", lambda name, **_: name if name in commands else None)

    yield make
    device.why_not_on.cache_clear()


def request_on(index):
    """A call whose x lies on that GPU, as far as ``why_not`` looks."""
    x = SimpleNamespace(dtype=torch.float32, shape=(2, 3), device=torch.device("cuda", index))
    none = SimpleNamespace(query=None, w_in=x, w_q=x, w_out=x)
    return SimpleNamespace(x=x, tensors=none, options=SimpleNamespace(num_heads=1))


@pytest.mark.parametrize("operator", ["ffn_step", "attend_step", "normalize_step", "sphere_attend_step"])
def test_a_gpu_before_ampere_is_refused_where_a_call_lies_on_it(operator, machine):
    machine(H100, T4)
    assert kernels.why_unusable() is None
    module = dispatch.provider("triton", operator)
    assert module.why_not(request_on(0)) is None
    assert module.why_not(request_on(1)) == OLD


def test_amd_counts_otherwise(machine, monkeypatch):
    machine(SimpleNamespace(name="MI50", major=7, minor=0))
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert device.why_not_on(torch.device("cuda", 0)) is None


def test_doctor_tells_why(machine, monkeypatch):
    machine(A100, commands=())
    _, modules, reason = dispatch._load(dispatch._BY_NAME["triton"])
    assert modules == {} and "finds no compiler" in reason
    monkeypatch.setitem(dispatch.UNUSABLE, "triton", reason)
    assert ("triton", f"{'no':<8}{reason}") in doctor._backends()


def test_triton_needs_a_c_compiler(machine, monkeypatch):
    machine(A100, commands=())
    assert "finds no compiler: install gcc or clang, or set CC" in kernels.why_unusable()
    machine(A100, commands=("clang",))
    assert kernels.why_unusable() is None
    monkeypatch.setenv("CC", "/opt/cc")
    assert "CC=/opt/cc is no compiler here" in kernels.why_unusable()
    machine(A100, commands=("/opt/cc",))
    assert kernels.why_unusable() is None


def test_triton_needs_the_headers_of_python(machine, monkeypatch, tmp_path):
    machine(A100, headers=False)
    assert f"{tmp_path} has no Python.h" in kernels.why_unusable()
    elsewhere = tmp_path / "include"
    elsewhere.mkdir()
    elsewhere.joinpath("Python.h").touch()
    monkeypatch.setenv("CPATH", str(elsewhere))
    assert kernels.why_unusable() is None
