"""Claim: the kernels of ``attend_step`` compile for Ampere, Hopper, Blackwell and MI300 without a GPU, fit their shared
memory and use their matrix instructions; on Hopper no register is spilled at head_dim 64 and 128.
``HYPOTHESIS_PROFILE=thorough`` compiles every head in every dtype, with and without masks and dropout."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton.backends.nvidia")
ROOT = Path(__file__).parents[2]
WHAT = "all" if os.environ.get("HYPOTHESIS_PROFILE") == "thorough" else "some"
PRODUCTS = ("attention_forward_kernel", "attention_queries_kernel", "attention_keys_kernel", "mask_gradient_kernel")


@pytest.mark.parametrize("architecture", ["sm80", "sm90", "sm100", "gfx942"])
def test_compiles(architecture):
    """In a process of its own: in this one Triton interprets."""
    from macaron_ops.kernels.offline import SHARED_MEMORY

    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_DEFAULT_FP_FUSION": "1"}
    script = Path(__file__).with_name("compile_attend.py")
    done = subprocess.run(
        [sys.executable, script, architecture, WHAT], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert {*PRODUCTS[:3], "delta_kernel"} <= {kernel["kernel"] for kernel in found}
    for kernel in found:
        assert kernel["shared"] <= SHARED_MEMORY[architecture], kernel
        narrow = kernel["dtype"] != "torch.float32" and kernel["kernel"] in PRODUCTS
        if architecture == "sm90":
            assert kernel["stack"] in (0, None) or kernel["HD"] not in (64, 128), kernel
            assert not narrow or (kernel["wgmma"] > 0 and kernel["mma"] == 0), kernel
        else:
            assert not narrow or kernel["wgmma"] + kernel["mma"] > 0, kernel
