"""Kernels run where Triton runs them: on the CPU in its interpreter, or on the GPU, compiled."""

import os

import pytest


@pytest.fixture(autouse=True)
def where_triton_runs(request):
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if "device" in request.fixturenames and (request.getfixturevalue("device").type == "cpu") != interpreted:
        pytest.skip("Triton interprets on the CPU in this process" if interpreted else "Triton compiles for the GPU")
    if not interpreted:
        yield
        return
    from tests.kernels.accesses import checked_accesses

    with checked_accesses():
        yield
