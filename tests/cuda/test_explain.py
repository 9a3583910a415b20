"""Claim: ``explain`` says which backend each operator of the CUDA library would take on a GPU, and why: what the GPU is
capable of, what the kernels take, and what was timed. For GPUs that are not here, by shapes alone."""

import types

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import macaron_ops
from macaron_ops.native.cuda import library

pytestmark = [
    pytest.mark.skipif(not library.on_host(), reason="asks the library for the CPU"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="speaks of other GPUs than the one that is here"),
    pytest.mark.skipif(not macaron_ops.backends()["triton"].usable, reason="speaks of Triton beside it"),
]
KIB = 1 << 10
SHARED = {(7, 5): 64 * KIB, (8, 0): 163 * KIB, (8, 6): 99 * KIB, (8, 9): 99 * KIB, (9, 0): 227 * KIB}
UNTIMED = "not yet timed beside Triton's"
SLOWER = "with relu, D = 1024 and F = 4096 an H200 takes 1.08 times Triton's time in training, 0.97 forward"
ROWS_SLOWER = "on an H200 Triton's takes 0.92 (bfloat16) to 0.99 (float32) of its time"


@pytest.fixture
def explained(monkeypatch):
    """``explained(capability, operator, shapes, dtype, ...)`` on a GPU of that capability."""
    questions = (library.why_not_on, library.why_not_wgmma, library.why_not_shared)

    def explain(capability, operator, shapes, dtype, archs=("80", "90a"), without_sm90="", **options):
        for question in questions:
            question.cache_clear()
        properties = types.SimpleNamespace(shared_memory_per_block_optin=SHARED.get(capability, 227 * KIB))
        monkeypatch.setattr(library, "_loaded", library._Loaded(None, archs, without_sm90))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        with FakeTensorMode():
            args = [torch.empty(shape, device="cuda", dtype=dtype) for shape in shapes]
            return macaron_ops.explain(operator, *(a.requires_grad_() for a in args), **options)

    yield explain
    for question in questions:
        question.cache_clear()


def of_cuda(found):
    """Whether it can, and why it is not taken or how it runs."""
    ((_, able, why),) = (row for row in found.rows if row[0] == "cuda")
    return able, why


F32, BF16 = torch.float32, torch.bfloat16


def sphere(width):
    return macaron_ops.sphere_attend_step, [(64, width), (), ()]


def rows(width):
    return macaron_ops.normalize_step, [(64, width), (64, width), ()]


def ffn(width, hidden):
    return macaron_ops.ffn_step, [(64, width), (hidden, width), (hidden,), (width, hidden), (width,)]


@pytest.mark.parametrize(
    ("capability", "call", "dtype", "backend", "able", "why"),
    [
        ((9, 0), sphere(3), F32, "cuda", True, ""),
        ((8, 0), sphere(4), F32, "cuda", True, ""),
        ((12, 0), sphere(3), F32, "cuda", True, ""),
        ((9, 0), sphere(3), BF16, "triton", True, UNTIMED),
        ((9, 0), sphere(16), F32, "triton", True, UNTIMED),
        ((9, 0), sphere(17), F32, "triton", False, "particles have at most 16 channels, not 17"),
        ((9, 0), rows(512), BF16, "triton", True, ROWS_SLOWER),
        ((9, 0), rows(8200), F32, "triton", False, "its rows have at most 8192 channels, not 8200"),
        ((8, 0), ffn(256, 512), BF16, "triton", True, f"{UNTIMED}; one kernel a pass"),
        ((8, 6), ffn(128, 512), BF16, "triton", True, f"{UNTIMED}; one kernel a pass"),
        ((8, 6), ffn(256, 512), BF16, "triton", False, "it needs 128 KiB of shared memory a block, there are 99"),
        ((9, 0), ffn(64, 512), F32, "triton", False, "its ffn_step runs bfloat16 and float16, not x in torch.float32"),
        ((9, 0), ffn(1024, 4096), BF16, "triton", True, f"{SLOWER}; products by CUTLASS with their epilogues"),
        ((8, 0), ffn(1024, 4096), BF16, "triton", False, "they are for compute capability 9.0, not 8.0"),
        ((10, 0), ffn(1024, 4096), BF16, "triton", False, "they are for compute capability 9.0, not 10.0"),
        ((7, 5), sphere(3), F32, "triton", False, "a GPU has compute capability 7.5, it was built for 80, 90a"),
        ((7, 5), rows(512), F32, "triton", False, "a GPU has compute capability 7.5, it was built for 80, 90a"),
        ((7, 5), ffn(64, 512), BF16, "triton", False, "a GPU has compute capability 7.5, it was built for 80, 90a"),
    ],
)
def test_the_backend_and_why(capability, call, dtype, backend, able, why, explained):
    found = explained(capability, *call, dtype)
    assert found.backend == backend, found
    assert of_cuda(found)[0] == able and why in of_cuda(found)[1], found
    with macaron_ops.use_backend("cuda"):  # what it can it does where it is asked for
        assert explained(capability, *call, dtype).backend == ("cuda" if able else None)


def test_a_library_for_other_gpus_and_one_without_cutlass(explained):
    found = explained((8, 0), *sphere(3), F32, archs=("90a",))
    assert found.backend == "triton" and "compute capability 8.0, it was built for 90a" in of_cuda(found)[1]
    found = explained((9, 0), *ffn(1024, 4096), BF16, without_sm90="built without CUTLASS")
    assert found.backend == "triton" and "for sm_90a: built without CUTLASS" in of_cuda(found)[1]
