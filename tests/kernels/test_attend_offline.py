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


def test_compiles():
    """In one process, not this one: here Triton interprets."""
    from macaron_ops.kernels.offline import SHARED_MEMORY, TARGETS

    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_DEFAULT_FP_FUSION": "1"}
    script = Path(__file__).with_name("compile_attend.py")
    done = subprocess.run(
        [sys.executable, script, WHAT, *TARGETS], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert {(a, name) for a in TARGETS for name in PRODUCTS[:3]} <= {(k["architecture"], k["kernel"]) for k in found}
    for kernel in found:
        architecture, narrow = kernel["architecture"], kernel["dtype"] != "torch.float32"
        assert kernel["shared"] <= SHARED_MEMORY[architecture], kernel
        if architecture == "sm90":
            assert kernel["stack"] in (0, None) or not narrow or kernel["HD"] > 128, kernel
        if narrow and kernel["kernel"] in PRODUCTS:
            assert kernel["wgmma"] + kernel["mma"] > 0, kernel
            assert architecture != "sm90" or kernel["mma"] == 0, kernel
