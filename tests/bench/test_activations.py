"""Claim: the formula tells within 2% what layers of the native backend keep between their passes."""

import pytest
import torch

import macaron_ops
from macaron_ops.bench import activations, memory
from macaron_ops.nn import LieTrotterEncoderLayer, MacaronEncoderLayer

NATIVE = macaron_ops.backends()["native"]
LAYERS = {"Lie-Trotter": LieTrotterEncoderLayer, "Strang": MacaronEncoderLayer}


@pytest.mark.skipif(not NATIVE.usable, reason=f"native: {NATIVE.reason}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("save", ["fast", "lean"])
@pytest.mark.parametrize("scheme", LAYERS)
def test_what_is_kept(scheme, save, dtype):
    width, hidden, heads, shape = 96, 320, 6, (4, 128)
    options = {"dropout": 0.0, "batch_first": True, "norm_first": True, "save": save, "dtype": dtype}
    layer = LAYERS[scheme](width, heads, hidden, **options)
    x = torch.randn(*shape, width, dtype=dtype, requires_grad=True)
    with macaron_ops.use_backend("native"):
        for _ in range(3):
            layer(x).sum().backward()
        found = memory.kept_bytes(lambda: layer(x), x.device)
    expected = activations.kept_bytes(512, width, hidden, heads, scheme, save, dtype.itemsize, "native")
    assert abs(found - expected) < 0.02 * expected


def test_bad_input():
    with pytest.raises(ValueError, match="scheme: expected one of Lie-Trotter, Strang; got 'BAB'"):
        activations.kept_bytes(1, 1, 1, 1, "BAB", "fast", 4, "native")
    with pytest.raises(ValueError, match="save: expected one of fast, lean; got 'none'"):
        activations.kept_bytes(1, 1, 1, 1, "Strang", "none", 4, "native")
