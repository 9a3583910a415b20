"""Claim: what docs/triton_kernels.md says of the least time that kernels take is what their launches are counted to."""

from pathlib import Path

import pytest

pytest.importorskip("triton")
from macaron_ops.bench import roofline

TOLD = Path(__file__).parents[2] / "docs" / "triton_kernels.md"


@pytest.mark.parametrize("shape", roofline.SHAPES, ids=str)
def test_the_steps(shape):
    assert roofline.line(*shape) in TOLD.read_text().splitlines()


def test_the_kernels():
    """Each of ours, and of eager's, at D = 1024, F = 4096."""
    told = TOLD.read_text().splitlines()
    for side in (roofline.ours, roofline.eager):
        found = roofline.lines(side(16384, 1024, 4096, backward=True))
        assert len(found) >= 9 and set(found) <= set(told)


def test_a_count_by_hand():
    """M = 16, D = 256, F = 512 in bfloat16: few rows, where a bound is bytes alone."""
    layer_norm, first, gelu, *_ = roofline.eager(16, 256, 512, backward=False)
    assert layer_norm.bytes == 2 * 16 * 256 * 2 and gelu.bytes == 2 * 16 * 512 * 2
    assert (first.flop, first.bytes) == (2 * 16 * 256 * 512, 2 * (16 * 256 + 256 * 512 + 16 * 512))
    assert first.microseconds == pytest.approx(first.bytes / roofline.BANDWIDTH * 1e6)
    forward = roofline.ours(16384, 256, 512, backward=False)
    normalize, hidden, residual = (kernel.bytes for kernel in forward)
    x, h, w = 2 * 16384 * 256, 2 * 16384 * 512, 2 * 256 * 512
    assert normalize == 2 * x + 2 * 2 * 256  # and the norm's weight and bias
    assert hidden == x + w + 2 * 512 + h and residual == h + w + 2 * 256 + 2 * x
