"""The CUDA kernels run where their library does: on the GPU, or, compiled for the CPU (csrc/cuda/host), there."""

import pytest

import macaron_ops
from macaron_ops.native.cuda.library import on_host


@pytest.fixture(autouse=True)
def where_kernels_run(request):
    if "device" not in request.fixturenames:
        return
    if (request.getfixturevalue("device").type == "cpu") != on_host():
        pytest.skip("the kernels of this process are for the CPU" if on_host() else "the kernels are for a GPU")
    status = macaron_ops.backends()["cuda"]
    assert status.usable, status.reason
