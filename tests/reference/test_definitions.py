"""Claim: the definitions compute the formulas of their docstrings, and no others: they equal independent eager code."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from macaron_ops import reference
from tests import twins

D, HIDDEN, T = 12, 10, 5
f64 = torch.float64


def randn(*shape):
    return torch.randn(*shape, dtype=f64)


@pytest.mark.parametrize("placement", ["pre", "post"])
@pytest.mark.parametrize("norm", ["layer", "rms", "sphere", None])
@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu", "swiglu", "geglu"])
def test_ffn_step(activation, norm, placement):
    rows = HIDDEN * (2 if activation in ("swiglu", "geglu") else 1)
    weights = randn(rows, D), randn(rows), randn(D, HIDDEN), randn(D)
    options = dict(norm=norm, activation=activation, placement=placement, step=0.7, residual_scale=1.5, eps=1e-3)
    if norm is not None:
        options |= dict(norm_weight=randn(D), norm_bias=randn(D))
    x, seed = randn(2, T, D), torch.tensor(11)
    options |= dict(dropout=0.25, activation_dropout=0.5, seed=seed)
    actual = reference.ffn_step(x, *weights, **options)
    torch.testing.assert_close(actual, twins.ffn_step(x, *weights, **options))


# Without rotary embedding across a context, and a scale per head only with as many key heads as heads.
ATTENTION = [
    (packed, cross, kv_heads, rotary, qk_scale)
    for packed, cross, kv_heads, rotary, qk_scale in itertools.product(
        [True, False], [True, False], [4, 2, 1], [True, False], [0, 1, 2]
    )
    if not (cross and rotary) and not (qk_scale == 2 and kv_heads != 4)
]


@pytest.mark.parametrize("packed, cross, kv_heads, rotary, qk_scale", ATTENTION)
def test_attend_step(packed, cross, kv_heads, rotary, qk_scale):
    heads, head_dim, s = 4, 6, 7 if cross else T
    width, kv_width, source = heads * head_dim, kv_heads * head_dim, D if packed or not cross else 9
    rows = (width, kv_width, kv_width)
    w = tuple(randn(r, c) for r, c in zip(rows, (D, source, source), strict=True))
    b = tuple(randn(r) for r in rows)
    blocked = torch.zeros(2, 1, T, s, dtype=torch.bool)
    blocked[0, :, :, 1] = True
    bias, seed = randn(1, heads, T, s), torch.tensor(5)
    options = dict(
        norm_weight=randn(D),
        norm="rms",
        step=0.3,
        residual_scale=0.9,
        scale=0.4,
        num_kv_heads=kv_heads,
        context=randn(2, s, source) if cross else None,
        rotary=(randn(T, 2), randn(T, 2)) if rotary else None,
        qk_scale=(None, randn(head_dim), randn(heads, head_dim))[qk_scale],
    )
    args = (torch.cat(w), torch.cat(b)) if packed else (w, b)
    args = (*args, randn(D, width), randn(D), heads)
    x = randn(2, T, D)
    # A boolean and a floating mask at once: one as attn_mask, the other as key padding.
    options |= dict(attn_mask=bias, key_padding_mask=blocked[:, 0, 0], dropout=0.25, attention_dropout=0.5, seed=seed)
    torch.testing.assert_close(reference.attend_step(x, *args, **options), twins.attend_step(x, *args, **options))


def test_attend_step_is_torch_multi_head_attention():
    """With a packed projection the definition is ``F.multi_head_attention_forward`` plus the residual."""
    heads, x = 3, randn(T, 2, D)
    w_in, b_in, w_out, b_out = randn(3 * D, D), randn(3 * D), randn(D, D), randn(D)
    mask = torch.zeros(T, T, dtype=torch.bool).index_fill(1, torch.tensor([2]), True)
    expected, _ = F.multi_head_attention_forward(
        x, x, x, D, heads, w_in, b_in, None, None, False, 0.0, w_out, b_out, attn_mask=mask, need_weights=False
    )
    y = reference.attend_step(x.transpose(0, 1), w_in, b_in, w_out, b_out, heads, norm=None, attn_mask=mask[None, None])
    torch.testing.assert_close(y.transpose(0, 1), x + expected)


def test_causal_is_the_upper_triangle_blocked():
    args = randn(3 * D, D), None, randn(D, D), None, 3
    x, upper = randn(2, T, D), torch.ones(T, T, dtype=torch.bool).triu(1)
    actual = reference.attend_step(x, *args, causal=True)
    torch.testing.assert_close(actual, twins.attend_step(x, *args, attn_mask=upper))


def test_packed_sequences_attend_within_themselves():
    """``cu_seqlens`` gives for each sequence what it gives alone, causal or not."""
    args = randn(3 * D, D), randn(3 * D), randn(D, D), randn(D), 3
    lengths = [3, 1, 0, 6]
    borders = torch.tensor([0, 3, 4, 4, 10], dtype=torch.int32)
    x = randn(10, D)
    for causal in (False, True):
        packed = reference.attend_step(x, *args, cu_seqlens=borders, causal=causal)
        alone = [reference.attend_step(part, *args, causal=causal) for part in x.split(lengths)]
        torch.testing.assert_close(packed, torch.cat(alone))


def test_a_fully_masked_row_attends_to_nothing():
    """Its attention is zero, so the output is ``a x + c b_o``; its gradients are finite."""
    args = randn(3 * D, D), randn(3 * D), randn(D, D), randn(D), 3
    for mask in (torch.ones(1, 1, T, T, dtype=torch.bool), torch.full((1, 1, T, T), -torch.inf, dtype=f64)):
        mask[..., 1:, 0] = False if mask.dtype == torch.bool else 0.0
        x = randn(2, T, D).requires_grad_()
        y = reference.attend_step(x, *args, attn_mask=mask)
        torch.testing.assert_close(y[:, 0], x[:, 0] + args[3])
        (grad,) = torch.autograd.grad(y.square().sum(), x)
        assert grad.isfinite().all()


@pytest.mark.parametrize("direction", ["tangent", "difference", "ambient"])
@pytest.mark.parametrize("step", [0.3, "channels"])
def test_normalize_step(direction, step):
    step = randn(D) if step == "channels" else step
    x, u = F.normalize(randn(3, T, D), dim=-1), randn(3, T, D)
    y = reference.normalize_step(x, u, step, direction=direction)
    torch.testing.assert_close(y, twins.normalize_step(x, u, step, direction=direction))
    torch.testing.assert_close(y.norm(dim=-1), torch.ones(3, T, dtype=f64))


@pytest.mark.parametrize("weighting", ["softmax", "unnormalized"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("n", [1, 7, 1030])
def test_sphere_attend_step(weighting, causal, given, n):
    """Also across the borders of the blocks of rows that it works on."""
    x = F.normalize(randn(2, n, 3), dim=-1)
    others = dict(query=randn(2, n, 4), key=randn(2, n, 4), value=randn(2, n, 3)) if given else {}
    options = dict(weighting=weighting, causal=causal, **others)
    actual = reference.sphere_attend_step(x, 0.1, 1.5, **options)
    torch.testing.assert_close(actual, twins.sphere_attend_step(x, 0.1, 1.5, **options))


def test_split_layer_composes():
    half = lambda x: x + 1.0  # noqa: E731
    double = lambda x: 2.0 * x  # noqa: E731
    x = randn(3)
    torch.testing.assert_close(reference.split_layer(x, [half, double, half]), 2 * (x + 1) + 1)
    torch.testing.assert_close(reference.parallel(half, double)(x), x + 1 + x)
