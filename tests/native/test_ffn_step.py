"""Claim: the native FFN step keeps the tolerance rule where its products read weights in each of their ways."""

import pytest
import torch

import macaron_ops
from tests.native.calls import Call, Drawn, check

pytestmark = pytest.mark.skipif(
    not macaron_ops.backends()["native"].usable, reason="the native library cannot be used here"
)


@pytest.mark.parametrize("dtypes", ["float32", "bfloat16", "autocast"])
@pytest.mark.parametrize("rows", [5, 70])
@pytest.mark.parametrize(("width", "hidden"), [(1024, 37), (37, 1024), (2048, 16), (16, 2048), (1000, 40)])
def test_rows_a_page_apart(width, hidden, rows, dtypes):
    """Weights whose rows meet in one set of the cache are copied where several panels pass by, else read in place."""
    tensors = {
        "x": Drawn((rows, width), role="x"),
        "w_in": Drawn((hidden, width), "fan"),
        "b_in": Drawn((hidden,)),
        "w_out": Drawn((width, hidden), "fan"),
        "b_out": Drawn((width,)),
    }
    for save in ("fast", "lean"):
        check(Call("ffn_step", tensors, {"norm": "layer", "activation": "gelu"}, dtypes, save))


@pytest.mark.parametrize("width", [3, 7, 10, 48, 100])
def test_a_row_of_equal_numbers_has_no_variance(width):
    """Its mean is one of them, to the last bit: what rounding left of it would be divided by the root of eps."""
    x = torch.rand(64, 1).expand(64, width)
    nothing = torch.zeros(4, width), None, torch.zeros(width, 4), None
    with macaron_ops.use_backend("native"):
        y = macaron_ops.ffn_step(x, *nothing, placement="post", activation="relu")
    assert not y.any()


@pytest.mark.parametrize("placement", ["pre", "post"])
def test_gradients_of_vectors_over_equal_rows(placement):
    """Eight times that of one row, to the last bit: the terms are added pairwise."""
    x, grad = torch.randn(2, 1, 100)
    w_in, w_out = torch.randn(24, 100) / 10, torch.randn(100, 24) / 5
    vectors = [torch.randn(n, requires_grad=True) for n in (24, 100, 100, 100)]
    b_in, b_out, weight, bias = vectors

    def gradients(rows):
        with macaron_ops.use_backend("native"):
            norm = {"norm_weight": weight, "norm_bias": bias, "placement": placement}
            y = macaron_ops.ffn_step(x.expand(rows, 100), w_in, b_in, w_out, b_out, **norm)
        return torch.autograd.grad(y, vectors, grad.expand(rows, 100))

    for one, eight in zip(gradients(1), gradients(8), strict=True):
        assert torch.equal(8 * one, eight)


def test_matrices_that_lie_transposed_run_where_they_are_not_copied():
    """For few tokens in float32; a call by name, many tokens and dropout, which is slow there, run here."""
    w_in, w_out = torch.randn(8, 12), torch.randn(12, 8)  # (in, out), as GPT-2's

    def chosen(tokens: int, w_in: torch.Tensor, w_out: torch.Tensor, **options) -> str:
        return macaron_ops.explain(
            macaron_ops.ffn_step, torch.zeros(tokens, 8, dtype=w_in.dtype), w_in, None, w_out, None, **options
        ).backend

    few, many = 2047, 2048
    assert chosen(few, w_in.T, w_out.T) == "reference"
    assert chosen(few, w_in.T.contiguous(), w_out.T.contiguous()) == "native"
    assert chosen(many, w_in.T, w_out.T) == "native"
    assert chosen(few, w_in.T, w_out.T, dropout=0.5, seed=1) == "native"
    assert chosen(few, w_in.bfloat16().T, w_out.bfloat16().T) == "native"
    with macaron_ops.use_backend("native"):
        assert chosen(few, w_in.T, w_out.T) == "native"
