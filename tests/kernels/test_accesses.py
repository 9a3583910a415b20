"""Claim: the tests of interpreted kernels fail where a kernel touches memory outside of its tensors."""

import pytest
import torch

triton = pytest.importorskip("triton")
tl = triton.language

from tests.kernels.accesses import OutOfBounds  # noqa: E402


@triton.jit
def copy_kernel(to, of, n, shift, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(to + at, tl.load(of + at + shift, mask=at < n), mask=at < n)


@triton.jit
def add_kernel(to, of, n, shift, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.atomic_add(to + at + shift, tl.load(of + at, mask=at < n), mask=at < n)


@pytest.mark.parametrize(("shift", "inside"), [(0, True), (3, True), (4, False), (-1, False)])
@pytest.mark.parametrize("kernel", [copy_kernel, add_kernel])
def test_a_load_or_an_atomic_outside(kernel, shift, inside, device):
    whole = torch.arange(1.0, 16, device=device)
    of, to = (whole[:9], whole[9:11].new_zeros(6)) if kernel is copy_kernel else (whole[:6], whole.new_zeros(9))
    if device.type == "cpu" and not inside:
        with pytest.raises(Exception, match=OutOfBounds.__name__):
            kernel[(1,)](to, of, 6, shift, BLOCK=8)
    elif inside:
        kernel[(1,)](to, of, 6, shift, BLOCK=8)
        assert torch.equal(
            to if kernel is copy_kernel else to[shift : shift + 6], whole[:6] + (shift if kernel is copy_kernel else 0)
        )


def test_a_store_outside(device):
    if device.type != "cpu":
        pytest.skip("a GPU's allocator says nothing of it")
    with pytest.raises(Exception, match="OutOfBounds.*stores 1 of 9"):
        copy_kernel[(1,)](torch.zeros(8), torch.zeros(9), 9, 0, BLOCK=16)
