"""Claim: the narrow FFN half-step in one kernel keeps the tolerance rule for every width, norm and activation that it
takes, in y and every gradient, also past the edges of its tiles, and declines the rest with the reason."""

import pytest
import torch

import macaron_ops
from tests import twins
from tests.rule import assert_draws_by_rule

ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu")
# (rows, D, F): each width of the kernel, whole and in part; hidden channels in part; several blocks.
SHAPES = [(1, 8, 8), (70, 64, 72), (150, 24, 40), (131, 128, 64), (40, 136, 104), (66, 256, 96)]


def drawn(rows, d, hidden, norm, biases, seed):
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    x, w_in, w_out = randn(rows, d), randn(hidden, d) / d**0.5, randn(d, hidden) / hidden**0.5
    b_in, b_out = (randn(hidden), randn(d)) if biases else (None, None)
    affine = {"norm_weight": randn(d), "norm_bias": randn(d)} if norm is not None and biases else {}
    return (x, w_in, b_in, w_out, b_out), affine


def check(shape, norm, activation, dtype, device, biases=True):
    """y and every gradient."""
    options = {"norm": norm, "activation": activation, "residual_scale": 1.5, "step": 0.5}

    def run(operator, args, affine, grad):
        leaves = [t.detach().requires_grad_() for t in (*(t for t in args if t is not None), *affine.values())]
        given = iter(leaves)
        args = [None if t is None else next(given) for t in args]
        y = operator(*args, **dict(zip(affine, given, strict=True)), **options)
        return [y.detach(), *torch.autograd.grad(y, leaves, grad.to(y))]

    def draw(seed):
        args, affine = drawn(*shape, norm, biases, seed)
        grad = torch.randn(args[0].shape, generator=torch.Generator().manual_seed(seed + 1000)).to(device, dtype)
        narrow = [t if t is None else t.to(device, dtype) for t in args]
        affine = {name: t.to(device, dtype) for name, t in affine.items()}
        wide = [t if t is None else t.double() for t in narrow]
        with macaron_ops.use_backend("cuda"):
            ours = run(macaron_ops.ffn_step, narrow, affine, grad)
        eager = run(twins.ffn_step, narrow, affine, grad)
        exact = run(twins.ffn_step, wide, {name: t.double() for name, t in affine.items()}, grad)
        return {f"output {i}": found for i, found in enumerate(zip(ours, eager, exact, strict=True))}

    assert_draws_by_rule(draw)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("shape", "norm"), list(zip(SHAPES, ["layer", "rms", "sphere", None, "layer", "rms"], strict=True))
)
def test_shapes(shape, norm, dtype, device):
    check(shape, norm, "gelu", dtype, device)


@pytest.mark.parametrize("norm", ["layer", "rms", "sphere", None])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_options(activation, norm, device):
    check((20, 24, 40), norm, activation, torch.bfloat16, device, biases=activation != "silu")


@pytest.mark.parametrize("order", ["in-turn", "backward", "5"])
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((70, 24, 40), torch.float16), ((70, 72, 104), torch.bfloat16), ((66, 200, 72), torch.bfloat16)],
)
def test_every_order_of_threads(shape, dtype, order, device, monkeypatch):
    """In each width of the kernels, with rows, channels and hidden channels past the edges of tiles."""
    if device.type == "cuda":
        pytest.skip("a GPU has an order of its own")
    monkeypatch.setenv("MACARON_OPS_THREAD_ORDER", order)
    check(shape, "layer", "gelu", dtype, device)


@pytest.mark.parametrize("norm", ["layer", None])
def test_no_rows(norm, device):
    args = [
        t if t is None else t.to(device, torch.bfloat16).requires_grad_() for t in drawn(0, 16, 8, norm, False, 0)[0]
    ]
    with macaron_ops.use_backend("cuda"):
        y = macaron_ops.ffn_step(*args, norm=norm)
    assert y.shape == (0, 16)
    assert not any(g.any() for g in torch.autograd.grad(y, [t for t in args if t is not None], y))


@pytest.mark.parametrize("norm", ["layer", None])
def test_frozen_subsets(norm, device):
    """Each gradient alone is what it is among all."""
    args, affine = drawn(20, 24, 40, norm, True, 0)
    leaves = [t.to(device, torch.bfloat16).requires_grad_() for t in (*args, *affine.values())]

    def gradients(wanted):
        for leaf in leaves:
            leaf.requires_grad_(any(leaf is w for w in wanted))
        with macaron_ops.use_backend("cuda"):
            y = macaron_ops.ffn_step(*leaves[:5], norm=norm, **dict(zip(affine, leaves[5:], strict=True)))
        return torch.autograd.grad(y, wanted, torch.ones_like(y))

    for leaf, expected in zip(leaves, gradients(leaves), strict=True):
        assert torch.equal(*gradients([leaf]), expected)


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((2, 12, 8), {}, "multiples of 8"),
        ((2, 16, 12), {}, "multiples of 8"),
        ((2, 16, 8), {"activation": "swiglu"}, "not swiglu"),
        ((2, 16, 8), {"placement": "post"}, "before, not after"),
        ((2, 16, 8), {"dropout": 0.5}, "no dropout"),
    ],
)
def test_what_it_declines(shape, options, message, device):
    rows, d, hidden = shape
    gated = 2 if options.get("activation") == "swiglu" else 1
    x, w_in, w_out = (torch.zeros(s, device=device).bfloat16() for s in ((rows, d), (gated * hidden, d), (d, hidden)))
    with macaron_ops.use_backend("cuda"):
        with pytest.raises(macaron_ops.BackendError, match=message):
            macaron_ops.ffn_step(x, w_in, None, w_out, None, **options)
        with pytest.raises(macaron_ops.BackendError, match="not x in torch.float32"):
            macaron_ops.ffn_step(x.float(), w_in.float(), None, w_out.float(), None, **options)
