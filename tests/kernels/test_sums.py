"""Claim: sums over rows that wait for each other are those that each is alone, bit for bit, of however many partial
sums; as few launches as can hold them start them, and what nothing waits for starts none."""

import pytest
import torch

import macaron_ops

TRITON = macaron_ops.backends()["triton"]
pytestmark = pytest.mark.skipif(not TRITON.usable, reason=f"triton: {TRITON.reason}")

from macaron_ops.kernels.device import recording  # noqa: E402
from macaron_ops.kernels.sums import TOGETHER, Later, Sum, sums_of  # noqa: E402
from macaron_ops.kernels.tiles import MOST_PARTS  # noqa: E402

SHAPES = [(1, 40), (MOST_PARTS, 600), (MOST_PARTS + 1, 17), (528, 24), (700, 3, 5), (7,), (2, 0), (0, 8)]
DTYPES = torch.float32, torch.bfloat16, torch.float16


def partial_sums(device):
    generator = torch.Generator().manual_seed(0)
    wanted = [Sum(DTYPES[i % 3], 1.0 - 0.5 * i) for i in range(len(SHAPES))]
    return [torch.randn(shape, generator=generator).to(device) for shape in SHAPES], wanted


def test_together_as_alone(device):
    partial, wanted = partial_sums(device)
    later = Later()
    found = [later.add(p, w) for p, w in zip(partial, wanted, strict=True)]
    later.end()
    for p, w, out in zip(partial, wanted, found, strict=True):
        exact = w.c * p.double().sum(0)
        assert out.dtype == w.dtype and out.shape == p.shape[1:]
        assert torch.equal(out, sums_of([p], [w])[0])
        torch.testing.assert_close(out, exact.to(w.dtype), rtol=2 * torch.finfo(w.dtype).eps, atol=1e-4)


def test_launches(device):
    partial, wanted = partial_sums(device)
    later = Later()
    with recording("sm90", 132) as launches:
        later.end()
        assert not launches
        sums_of([*partial, None], [*wanted, None], later)
        assert not launches
        later.end()
        later.end()
    assert len(launches) == -(-len(SHAPES) // TOGETHER)
    given = [a for launch in launches for a in launch.arguments[::5] if a is not None]
    assert [t.data_ptr() for t in given] == [t.data_ptr() for t in partial]
