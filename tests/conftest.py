"""What all tests share: the device, the seed, the threads, Triton's interpreter and hypothesis' profiles."""

import os
import shutil
import sysconfig
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy's, in which Triton's interpreter multiplies; before torch

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

GPU = torch.cuda.is_available()
COMPILER = shutil.which(os.environ.get("CXX", "g++")) and Path(sysconfig.get_paths()["include"], "Python.h").exists()

if not GPU:
    # Triton reads it when it is imported (torch alone does not import it) and for each kernel it decorates.
    os.environ.setdefault("TRITON_INTERPRET", "1")
    os.environ.setdefault("MACARON_OPS_CUDA_ON_HOST", "1")  # the CUDA kernels that were compiled for the CPU
torch.set_num_threads(1)  # the tensors are small, and make test runs a worker per core

settings.register_profile("ci", max_examples=20, deadline=None, derandomize=True)
settings.register_profile("thorough", max_examples=2000, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    needs = {
        "gpu": (GPU, "needs a CUDA device"),
        "inductor": (COMPILER, "needs a C++ compiler and Python.h for torch.compile"),
    }
    for item in items:
        for marker, (there, reason) in needs.items():
            if not there and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))
    if part := os.environ.get("MACARON_OPS_TEST_PART"):  # "3/8": the third of eight processes that share the tests
        index, count = map(int, part.split("/"))
        kept = items[index - 1 :: count]
        config.hook.pytest_deselected(items=[item for i, item in enumerate(items) if i % count != index - 1])
        items[:] = kept


@pytest.fixture(scope="session", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """Each device in turn: a test that takes it runs on the CPU, and again on the GPU where there is one."""
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def seed(request):
    """Every test starts from the same random state, whatever ran before it; an error of its kernels is its own."""
    if _broke_the_context:
        _tell_suite("left", request.node.nodeid)
        pytest.skip(f"the GPU's context was lost in {_broke_the_context[0]}")
    torch.manual_seed(0)
    yield
    if GPU:
        try:
            torch.cuda.synchronize()
        except RuntimeError:  # as will every call from now on in this process
            _broke_the_context.append(request.node.nodeid)
            _tell_suite("lost", request.node.nodeid)
            raise


_broke_the_context: list[str] = []  # the test after which the GPU answers this process no more


def _tell_suite(what: str, test: str) -> None:
    """To whoever started several processes (``bench/gpu_suite/gpu_tests.py``) and does again what this one left."""
    if path := os.environ.get("MACARON_OPS_LOST_TESTS"):
        with open(path, "a") as file:
            print(what, test, file=file)
