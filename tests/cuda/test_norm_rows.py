"""Claim: normalised rows in CUDA keep the tolerance rule against eager PyTorch, with the residual sum before them and
the residual gradient after, for every norm and width, also where a row's mean is a thousand times its deviation."""

import pytest
import torch

from macaron_ops.reference.norm import normalize, normalize_backward
from tests.rule import assert_draws_by_rule

A, C, EPS = 0.75, -0.5, 1e-5
# Each kind of row: lanes with one vector, two or four, a block; by vectors and not.
WIDTHS = [(3, 40), (24, 9), (200, 5), (257, 5), (512, 4), (1000, 3), (1032, 3), (2050, 2), (8192, 2)]


def draw_rows(rows, width, dtype, seed, shift=0.0, scale=1.0):
    """x, z, weight, bias, the gradient of n and that of s by another way, in ``dtype``."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype)

    x, z = scale * randn(rows, width) + shift, scale * randn(rows, width)
    return x, z, *(randn(*s) for s in ((width,), (width,), (rows, width), (rows, width)))


def plain(x, z, weight, bias, grad, residual, norm):
    """n and the gradients in s, weight and bias, of whatever dtype."""
    s = A * x + C * z
    d = normalize_backward(grad, s, norm, weight, EPS, (True, True, True))
    return normalize(s, norm, weight, bias, EPS), d[0] + A * residual, d[1], d[2]


def ours(x, z, weight, bias, grad, residual, norm):
    from macaron_ops.native.cuda.norm_rows import norm_rows, norm_rows_backward

    n, s = norm_rows(x, z, norm, weight, bias, EPS, residual_scale=A, step=C, keep_sum=True)
    needs = (True, True, True)
    d = norm_rows_backward(grad, s, norm, weight, EPS, needs, residual=residual, residual_scale=A)
    return n, d[0], *(g.to(x.dtype) for g in d[1:])


def check(rows, width, norm, dtype, device, shift=0.0, scale=1.0):
    def draw(seed):
        drawn = [t.to(device) for t in draw_rows(rows, width, dtype, seed, shift, scale)]
        found = (
            ours(*drawn, norm),
            plain(*drawn, norm),
            plain(*(t.double() for t in drawn), norm),
        )
        return dict(zip(("n", "s", "weight", "bias"), zip(*found, strict=True), strict=True))

    assert_draws_by_rule(draw)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("norm", ["layer", "rms", "sphere"])
@pytest.mark.parametrize(("width", "rows"), WIDTHS)
def test_rule(width, rows, norm, dtype, device):
    check(rows, width, norm, dtype, device)


@pytest.mark.parametrize("order", ["in-turn", "backward", "5"])
@pytest.mark.parametrize(
    ("width", "norm", "dtype"),
    [(24, "layer", "float32"), (257, "rms", "bfloat16"), (1032, "layer", "float32"), (2050, "sphere", "float16")],
)
def test_every_order_of_threads(width, norm, dtype, order, device, monkeypatch):
    """Some lanes a row and a block, by vectors and by elements."""
    if device.type == "cuda":
        pytest.skip("a GPU has an order of its own")
    monkeypatch.setenv("MACARON_OPS_THREAD_ORDER", order)
    check(5, width, norm, getattr(torch, dtype), device)


def test_a_large_mean(device):
    check(4, 512, "layer", torch.float32, device, shift=1000.0)


@pytest.mark.parametrize("norm", ["layer", "rms", "sphere"])
def test_rows_shorter_than_eps(norm, device):
    """They are divided by eps, or its root, and the gradient has no part along them."""
    check(5, 40, norm, torch.float32, device, scale=1e-7)


def test_parameters_that_begin_where_no_vector_does(device):
    """Slices, as of one tensor that holds all parameters: what they are read by begins at multiples of 16 bytes."""
    from macaron_ops.native.cuda.norm_rows import norm_rows

    x, weight, bias = torch.randn(5, 40, device=device), *torch.randn(2, 41, device=device)[:, 1:]
    n, _ = norm_rows(x, None, "layer", weight, bias, EPS)
    assert torch.equal(n, norm_rows(x, None, "layer", weight.clone(), bias.clone(), EPS)[0])


def test_nothing_but_what_is_needed(device):
    """Without z, parameters and residual; of no rows; and each gradient alone."""
    from macaron_ops.native.cuda.norm_rows import norm_rows, norm_rows_backward

    x, grad = torch.randn(7, 40, device=device), torch.randn(7, 40, device=device)
    n, s = norm_rows(x, None, "rms", None, None, EPS)
    torch.testing.assert_close(n, normalize(x, "rms", None, None, EPS))
    assert s.numel() == 0
    expected = normalize_backward(grad, x, "rms", None, EPS, (True, True, True))
    for i in range(3):
        needs = tuple(i == j for j in range(3))
        found = norm_rows_backward(grad, x, "rms", None, EPS, needs)
        assert [g is not None for g in found] == list(needs)
        torch.testing.assert_close(found[i], expected[i])
    found = norm_rows_backward(grad[:0], x[:0], "layer", None, EPS, (True, True, True))
    assert found[0].shape == (0, 40) and not found[1].any() and not found[2].any()
