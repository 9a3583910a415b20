"""Claim: tools/time_products.py computes what torch.mm does with the kernels' products, and prints a line for each."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.native.compiled import COMPILER, ISAS, machine_has

ROOT = Path(__file__).parents[2]
HERE = [isa for isa in ISAS if COMPILER and machine_has(isa)]


@pytest.mark.skipif("avx2" not in HERE, reason="needs a C++ compiler and a CPU with AVX2")
def test_every_product_is_timed():
    command = [sys.executable, "tools/time_products.py", HERE[-1], "1"]
    lines = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(lines) == 16
    assert all("GFLOP/s, torch.mm" in line for line in lines)
