"""Claim: row kernels take rows of any strides and any length, walk over long ones in blocks with the same result, and
lose nothing to a large mean. Rows in registers are read and written once, several of them by a program."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import macaron_ops

TRITON = macaron_ops.backends()["triton"]
if not TRITON.usable:
    pytest.skip(f"triton: {TRITON.reason}", allow_module_level=True)

from macaron_ops.kernels import rows as rows_module  # noqa: E402
from macaron_ops.kernels.device import recording  # noqa: E402
from macaron_ops.kernels.norm_rows import normalize_rows, normalize_rows_backward  # noqa: E402
from macaron_ops.kernels.rows import as_rows  # noqa: E402
from macaron_ops.kernels.sums import Sum  # noqa: E402
from macaron_ops.reference.norm import normalize, normalize_backward  # noqa: E402
from tests.kernels.accesses import noted_accesses  # noqa: E402
from tests.kernels.test_numbers import assert_case_by_rule  # noqa: E402
from tests.ops.cases import Case, _normalize  # noqa: E402
from tests.rule import assert_by_rule  # noqa: E402


@pytest.fixture(params=["in registers", "in blocks"])
def length(request, monkeypatch):
    """Rows of 100 channels in one piece, or in blocks of 32."""
    if request.param == "in blocks":
        monkeypatch.setattr(rows_module, "WIDEST", 64)
        monkeypatch.setattr(rows_module, "WIDE_BLOCK", 32)


LAYOUTS = {
    "contiguous": lambda x: x,
    "swapped": lambda x: x.transpose(0, 1),
    "inside": lambda x: F.pad(x, (3, 5), value=torch.nan)[..., 3:-5],
    "every other": lambda x: torch.stack([x, torch.full_like(x, torch.nan)], -1).flatten(-2)[..., ::2],
    "expanded": lambda x: x[:1].expand(x.shape),
    "three strides": lambda x: F.pad(x, (0, 0, 0, 1)).unflatten(0, (2, 2)).transpose(0, 1)[:, :, :-1],
    "one row": lambda x: x[0, 0],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(layout):
    x = LAYOUTS[layout](torch.randn(4, 7, 100))
    found = as_rows(x)
    r = torch.arange(found.count)
    begin = found.tensor.storage_offset() + r // found.inner * found.outer_stride + r % found.inner * found.stride
    storage = found.tensor.as_strided((found.tensor.untyped_storage().nbytes() // 4,), (1,), 0)
    assert torch.equal(storage[begin[:, None] + torch.arange(100)], x.reshape(-1, 100))
    assert (found.tensor is x) == (layout not in ("every other", "three strides"))


@pytest.mark.parametrize("norm", ["layer", "rms", "sphere"])
def test_norm(norm, length, device):
    """A mean of 100: the rule, forward and backward, against float64."""
    x = (torch.randn(6, 5, 100) + 100).to(device).transpose(0, 1)
    weight, bias, grad = (t.to(device) for t in (torch.randn(100), torch.randn(100), torch.randn(5, 6, 100)))
    y = normalize_rows(as_rows(x), norm, weight, bias, 1e-5, torch.float32)
    sums, again = (Sum(torch.float32), Sum(torch.float32), Sum(torch.float32, -2.0)), torch.empty_like(y)
    dx, _, (by_weight, by_bias, by_residual) = normalize_rows_backward(
        as_rows(grad), as_rows(x), norm, weight, 1e-5, bias=bias, n=again,
        residual=as_rows(x), a=0.5, total=torch.float32, sums=sums, of_residual=True,
    )  # fmt: skip

    assert torch.equal(again, y)

    def expected(dtype):
        t = [v.to(dtype) for v in (grad, x, weight, bias)]
        d = normalize_backward(t[0], t[1], norm, t[2], 1e-5, (True, True, True))
        by_x = -2.0 * t[1].sum((0, 1))
        return normalize(t[1], norm, t[2], t[3], 1e-5).flatten(0, 1), (d[0] + 0.5 * t[1]).flatten(0, 1), *d[1:], by_x

    ours = (y, dx, by_weight, by_bias, by_residual)
    for actual, eager, exact in zip(ours, expected(torch.float32), expected(torch.float64), strict=True):
        assert_by_rule(norm, actual, eager, exact)


def test_a_residual_without_a_sum(length, device):
    """As where a dropout's own row kernel has summed before: the total is the same."""
    x, grad = (torch.randn(5, 100, device=device) for _ in range(2))
    found = [
        normalize_rows_backward(
            as_rows(grad), as_rows(x), "layer", None, 1e-5,
            residual=as_rows(x), total=torch.float32, sums=(None, None, wanted), of_residual=True,
        )[0]
        for wanted in (None, Sum(torch.float32))
    ]  # fmt: skip
    assert torch.equal(*found)


def assert_once(accesses, tensors):
    """Each element of each of the tensors once, and no others of theirs."""
    addresses = np.concatenate([np.ravel(a) for a in accesses])
    for name, t in tensors.items():
        first = t.data_ptr()
        inside = addresses[(addresses >= first) & (addresses < first + t.numel() * t.element_size())]
        assert np.array_equal(np.sort(inside), first + np.arange(t.numel()) * t.element_size()), name


@pytest.mark.skipif(torch.cuda.is_available(), reason="looks into the interpreter")
@pytest.mark.parametrize("norm", ["layer", "rms", "sphere", None])
def test_one_read_and_one_write_of_each_tensor(norm):
    """Of a norm, forward and backward with the residual's gradient and the norm again."""
    x, grad, residual = torch.randn(3, 37, 100).unbind()
    with noted_accesses() as (loads, stores):
        y = normalize_rows(as_rows(x), norm, None, None, 1e-5, torch.float32)
    assert_once(loads, {"x": x})
    assert_once(stores, {"y": y})
    n, sums = torch.empty_like(x) if norm else None, (Sum(torch.float32) if norm else None, None, Sum(torch.float32))
    with noted_accesses() as (loads, stores):
        dx, dropped, _ = normalize_rows_backward(
            as_rows(grad), as_rows(x), norm, None, 1e-5, n=n, residual=as_rows(residual),
            total=torch.float32, dropped=torch.bfloat16, sums=sums,
        )  # fmt: skip
    assert_once(loads, {"grad": grad, "residual": residual} | ({"x": x} if norm else {}))
    assert_once(stores, {"dx": dx, "dropped": dropped} | ({"n": n} if norm else {}))


@pytest.mark.skipif(torch.cuda.is_available(), reason="looks into the interpreter")
def test_one_read_and_one_write_of_a_step():
    x, u = (t.requires_grad_() for t in F.normalize(torch.randn(2, 37, 100), dim=-1).unbind())
    grad, step = torch.randn(37, 100), torch.full((100,), 0.3, requires_grad=True)
    with macaron_ops.use_backend("triton"):
        with noted_accesses() as (loads, stores):
            y = macaron_ops.normalize_step(x, u, step)
        assert_once(loads, {"x": x, "u": u})
        assert_once(stores, {"y": y})
        with noted_accesses() as (loads, stores):
            dx, du, _ = torch.autograd.grad(y, (x, u, step), grad)
    assert_once(loads, {"grad": grad, "x": x, "u": u})
    assert_once(stores, {"dx": dx, "du": du})


def test_short_rows_share_a_program(device):
    """16 elements a thread, or 256 rows; and backward no more programs than a device holds, each with its sums."""
    for width in (1, 3, 64, 100, 128, 1000, 1024):
        tiles = rows_module.row_tiles(width)
        assert tiles.BLOCK >= width and tiles.ROWS == min(rows_module.TILE // tiles.BLOCK, 256), width
        with recording("sm90", 132):
            assert tiles.programs(1 << 20, device) == 4 * 132


@pytest.mark.parametrize("direction", ["tangent", "difference", "ambient"])
@pytest.mark.parametrize("learned", [False, True], ids=["number", "per channel"])
def test_normalize_step(direction, learned, length, device):
    case = Case(macaron_ops.normalize_step, direction, _normalize((2, 5), 100, learned=learned, direction=direction))
    assert_case_by_rule(case, torch.float32, device)


def test_step_of_one_tensor_number(length, device):
    x, u = F.normalize(torch.randn(5, 100, device=device), dim=-1), torch.randn(5, 100, device=device)
    found = []
    for backend in ("triton", "reference"):
        step = torch.tensor(0.3, device=device, requires_grad=True)
        with macaron_ops.use_backend(backend):
            y = macaron_ops.normalize_step(x, u, step)
        found.append((y, *torch.autograd.grad(y.sum(), step)))
    torch.testing.assert_close(*found)


def test_rows_that_are_not_there_add_nothing(device):
    """Without an eps they would be 0 / 0."""
    x, u = (torch.randn(5, 3, device=device) for _ in range(2))
    found = []
    for backend in ("triton", "reference"):
        step = torch.full((3,), 0.3, device=device, requires_grad=True)
        with macaron_ops.use_backend(backend):
            y = macaron_ops.normalize_step(x, u, step, eps=0.0)
        found.append(torch.autograd.grad(y.sum(), step)[0])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("norm", ["layer", "rms", "sphere"])
@pytest.mark.parametrize("placement", ["pre", "post"])
def test_rows_that_are_not_there_add_nothing_to_a_norms_gradient(norm, placement, device):
    x, w = torch.randn(5, 8, device=device), torch.randn(8, 8, device=device) / 3
    found = []
    for backend in ("triton", "reference"):
        scale = torch.ones(8, device=device, requires_grad=True)
        with macaron_ops.use_backend(backend):
            y = macaron_ops.ffn_step(
                x, w, None, w, None, norm=norm, norm_weight=scale, eps=0.0, placement=placement, activation="silu"
            )
        found.append(torch.autograd.grad(y.square().sum(), scale)[0])
    torch.testing.assert_close(*found)
