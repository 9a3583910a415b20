"""Claim: every definition is differentiable twice, and each explicit backward pass is the gradient of its forward."""

import importlib
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

D, HIDDEN, T = 4, 3, 3
SEED = torch.tensor(1234567890123)


def leaf(*shape, requires_grad=True):
    return torch.randn(shape, dtype=torch.float64).requires_grad_(requires_grad)


def module(name):
    return importlib.import_module(f"macaron_ops.reference.{name}")


def check(name, x, tensors, options):
    """gradcheck, gradgradcheck, and the explicit backward against autograd under every memory policy."""
    m = module(name)
    arguments = [x, *tensors]
    needs = [t is not None and t.requires_grad for t in arguments]
    wanted = [t for t, need in zip(arguments, needs, strict=True) if need]

    def function(*leaves):
        given = iter(leaves)
        filled = [next(given) if need else t for t, need in zip(arguments, needs, strict=True)]
        return m.forward(filled[0], m.Tensors(*filled[1:]), options)[0]

    assert gradcheck(function, wanted)
    assert gradgradcheck(function, wanted, fast_mode=True)

    y = function(*wanted)
    grad = torch.randn_like(y)
    expected = torch.autograd.grad(y, wanted, grad)
    for save in ("lean", "fast"):
        with torch.no_grad():
            _, saved = m.forward(x, tensors, options, save)
            for kept, (shape, dtype) in zip(saved, m.saved_shapes(x, tensors, options, save), strict=True):
                assert (tuple(kept.shape), kept.dtype) == (tuple(shape), dtype)
            grad_x, grads = m.backward(grad, tuple(needs), x, tensors, saved, options)
        for got, need in zip((grad_x, *grads), needs, strict=True):
            assert (got is not None) == need
        torch.testing.assert_close([g for g in (grad_x, *grads) if g is not None], list(expected))


@pytest.mark.parametrize("placement", ["pre", "post"])
@pytest.mark.parametrize("norm", ["layer", "rms", "sphere", None])
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu", "swiglu", "geglu", "relu"])
def test_ffn_step(activation, norm, placement):
    m = module("ffn_step")
    rows = HIDDEN * (2 if activation in ("swiglu", "geglu") else 1)
    affine = (leaf(D), leaf(D)) if norm else (None, None)
    tensors = m.Tensors(leaf(rows, D), leaf(rows), leaf(D, HIDDEN), leaf(D), *affine, SEED)
    options = m.Options(norm, 1e-3, activation, 0.5, 1.5, placement, 0.2, 0.3, 0)
    check("ffn_step", leaf(2, D), tensors, options)


@pytest.mark.parametrize("placement", ["pre", "post"])
@pytest.mark.parametrize("hidden", [HIDDEN, 0])
def test_ffn_step_of_one_token_without_other_dimensions(hidden, placement):
    m = module("ffn_step")
    tensors = m.Tensors(leaf(hidden, D), leaf(hidden), leaf(D, hidden), leaf(D), leaf(D), leaf(D), SEED)
    check("ffn_step", leaf(D), tensors, m.Options("layer", 1e-3, "silu", 0.5, 1.5, placement, 0.2, 0.3, 0))


ATTENTION = [
    dict(zip(("packed", "cross", "placement", "rotary", "masks"), case, strict=True))
    for case in itertools.product([True, False], [True, False], ["pre", "post"], [True, False], ["causal", "all"])
    if not (case[1] and case[3])
]


@pytest.mark.parametrize("case", ATTENTION, ids=lambda c: "-".join(map(str, c.values())))
def test_attend_step(case):
    m = module("attend_step")
    heads, kv_heads, head_dim = 2, 1, 2
    width, kv_width = heads * head_dim, kv_heads * head_dim
    s = 4 if case["cross"] else T
    source = D if case["packed"] or not case["cross"] else 3
    if case["packed"]:
        rows = width + 2 * kv_width
        projection = (leaf(rows, D), None, None, leaf(rows), None, None)
    else:
        projection = (leaf(width, D), leaf(kv_width, source), leaf(kv_width, source))
        projection += (leaf(width), leaf(kv_width), leaf(kv_width))
    everything = case["masks"] == "all"
    padding = torch.zeros(2, s, dtype=torch.bool)
    padding[0] = True  # the first sequence sees nothing at all
    padding[1, 1] = True
    tensors = m.Tensors(
        *projection,
        leaf(D, width),
        leaf(D),
        leaf(D),
        leaf(D),
        leaf(2, s, source) if case["cross"] else None,
        leaf(1, heads, T, s) if everything else None,
        padding if everything else None,
        None,
        leaf(T, 1, requires_grad=False) if case["rotary"] else None,
        leaf(T, 1, requires_grad=False) if case["rotary"] else None,
        leaf(head_dim) if case["rotary"] else None,
        SEED,
    )
    causal = case["masks"] == "causal"
    options = m.Options(heads, kv_heads, "layer", 1e-2, 0.7, 1.3, case["placement"], causal, 0.4, 0.2, 0.3, 0)
    check("attend_step", leaf(2, T, D), tensors, options)


def test_attend_step_learned_key_padding_bias():
    m = module("attend_step")
    empty = dict.fromkeys(m.Tensors._fields)
    tensors = m.Tensors(**{**empty, "w_q": leaf(3 * D, D), "w_out": leaf(D, D), "key_padding_mask": leaf(2, T)})
    options = m.Options(2, 2, None, 1e-5, 1.0, 1.0, "pre", False, 0.5, 0.0, 0.0, 0)
    check("attend_step", leaf(2, T, D), tensors, options)


def test_attend_step_packed_sequences():
    m = module("attend_step")
    empty = dict.fromkeys(m.Tensors._fields)
    borders = torch.tensor([0, 2, 2, 5], dtype=torch.int32)
    tensors = m.Tensors(**{**empty, "w_q": leaf(3 * D, D), "w_out": leaf(D, D), "cu_seqlens": borders})
    options = m.Options(2, 2, "rms", 1e-2, 1.0, 1.0, "pre", True, 0.5, 0.0, 0.0, 0)
    check("attend_step", leaf(5, D), tensors, options)


@pytest.mark.parametrize("direction", ["tangent", "difference", "ambient"])
@pytest.mark.parametrize("shape", [None, (), (D,)])
def test_normalize_step(direction, shape):
    m = module("normalize_step")
    step = None if shape is None else leaf(*shape)
    check("normalize_step", leaf(2, D), m.Tensors(leaf(2, D), step), m.Options(0.3, direction, 1e-12))


@pytest.mark.parametrize("weighting", ["softmax", "unnormalized"])
@pytest.mark.parametrize("direction", ["tangent", "difference", "ambient"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("given", [False, True])
def test_sphere_attend_step(weighting, direction, causal, given, monkeypatch):
    m = module("sphere_attend_step")
    monkeypatch.setattr(m, "BLOCK", 2)  # several blocks of rows
    x = F.normalize(leaf(1, T, D), dim=-1).detach().requires_grad_()
    options = m.Options(0.3, 1.2, weighting, direction, causal, 1e-12)
    if given:
        tensors = m.Tensors(leaf(1, T, 2), leaf(1, T, 2), leaf(1, T, D), leaf(D), leaf())
    else:
        tensors = m.Tensors(None, None, None, None, None)
    check("sphere_attend_step", x, tensors, options)
