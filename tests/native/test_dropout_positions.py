"""Claim: dropout keeps what the definition keeps at every position below 2^52, whatever the stride between lanes.

Tensors that are so large do not fit a test: what the kernels include is compiled alone and called by position."""

import ctypes
import random
from pathlib import Path

import pytest
import torch

from macaron_ops.reference.dropout import philox
from tests.native.compiled import COMPILER, EMULATED, ISAS, compiled, machine_has

pytestmark = pytest.mark.skipif(not COMPILER, reason="needs a C++ compiler")
BORDERS = (2**28, 2**29, 2**32 // 15, 2**31, 2**32, 3 * 2**32 + 7, 2**40, 2**47)


@pytest.fixture(scope="module", params=ISAS)
def kept(request, tmp_path_factory):
    """``kept(p, seed, stream, position, stride)`` of an instruction set, emulated where the machine lacks it: a bool
    for each lane."""
    isa = request.param
    if not machine_has(isa) and (isa not in EMULATED or not machine_has("avx2")):
        pytest.skip("needs a CPU with " + ("AVX2" if isa in EMULATED else isa))
    source = Path(__file__).with_name("dropout_positions.cpp")
    function = compiled(source, isa, tmp_path_factory.mktemp("dropout"), emulated=not machine_has(isa)).kept
    function.argtypes = [ctypes.c_double, ctypes.c_uint64, *[ctypes.c_int64] * 3, ctypes.c_void_p]

    def call(*args):
        lanes = (ctypes.c_int32 * 64)()
        return [bool(lane) for lane in lanes[: function(*args, lanes)]]

    return call


def expected(p, seed, stream, positions):
    position = torch.tensor(positions)
    r = philox(torch.tensor(seed), position & 0xFFFFFFFF, (position >> 32) | (stream << 20))
    r = torch.where(r > 0x7FFFFFFF, 0xFFFFFFFF - r, r)
    return (r.to(torch.float32) * 4.6566127342e-10 >= p).tolist()


def test_positions_in_64_bits(kept):
    draw = random.Random(0)
    strides = [1, 2, 240, 65535, 65537, *(border + near for border in BORDERS for near in (-1, 0, 1))]
    for stride in strides:
        for start in (0, 1, 2**32 - 3, 2**32 - stride % 2**32, 2**51, draw.randrange(2**51)):
            p, seed, stream = draw.choice([0.1, 0.5, 0.9]), draw.randrange(2**63), draw.randrange(4)
            found = kept(p, seed, stream, start, stride)
            assert found == expected(p, seed, stream, [start + i * stride for i in range(len(found))]), (start, stride)
