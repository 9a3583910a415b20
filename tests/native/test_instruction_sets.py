"""Claim: whichever instruction set runs, every operator keeps the tolerance rule in float32, in bfloat16 and under
autocast, whatever it saves between the passes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from macaron_ops import native

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(native.library() is None, reason=f"the native backend: {native.why_not_loaded()}")
@pytest.mark.parametrize("isa", native.cpu_isas())
def test_the_rule(isa):
    done = subprocess.run(
        [sys.executable, "-m", "tests.native.one_instruction_set"],
        cwd=ROOT,
        env={**os.environ, "MACARON_OPS_CPU_ISA": isa},
        capture_output=True,
        text=True,
    )
    ran, *failures = done.stdout.splitlines() or [""]
    assert done.returncode == 0, done.stderr
    assert ran == isa and not failures, "\n".join(failures)
