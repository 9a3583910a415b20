"""Claim: the kernels compile for Ampere, Hopper, Blackwell and MI300 without a GPU, fit their shared memory and use
their matrix instructions; on Hopper no register is spilled, and row kernels read and write 16 bytes a thread.
``HYPOTHESIS_PROFILE=thorough`` compiles every tile of the table in every dtype, with and without dropout."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton.backends.nvidia")
ROOT = Path(__file__).parents[2]
WHAT = "all" if os.environ.get("HYPOTHESIS_PROFILE") == "thorough" else "some"
PRODUCTS = (
    "hidden_forward_kernel",
    "hidden_backward_kernel",
    "linear_residual_kernel",
    "weight_gradient_kernel",
    "narrow_ffn_kernel",
    "wide_forward_kernel",
    "wide_queries_kernel",
    "wide_keys_kernel",
)
PAIRS = ("narrow_forward_kernel", "narrow_queries_kernel", "narrow_keys_kernel", "rows_backward_kernel")
ROW_KERNELS = ("norm_forward", "norm_backward", "step_forward", "step_backward", "step_forward_wide")


@pytest.mark.parametrize("architecture", ["sm80", "sm90", "sm100", "gfx942"])
def test_compiles(architecture):
    """In a process of its own: in this one Triton interprets."""
    from macaron_ops.kernels.offline import SHARED_MEMORY

    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_DEFAULT_FP_FUSION": "1"}
    script = Path(__file__).with_name("compile_offline.py")
    done = subprocess.run(
        [sys.executable, script, architecture, WHAT], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert {*PRODUCTS, *PAIRS, *ROW_KERNELS} <= {kernel["kernel"] for kernel in found}
    for kernel in found:
        assert kernel["shared"] <= SHARED_MEMORY[architecture], kernel
        narrow = kernel["dtype"] != "torch.float32" and kernel["kernel"] in PRODUCTS
        if architecture == "sm90":
            assert kernel["stack"] in (0, None), kernel
            assert not narrow or (kernel["wgmma"] > 0 and kernel["mma"] == 0), kernel
            rows = kernel["kernel"].startswith(("norm", "step")) and kernel["D"] >= 1024
            assert not rows or kernel["narrow"] == 0, kernel
        else:
            assert not narrow or kernel["wgmma"] + kernel["mma"] > 0, kernel
