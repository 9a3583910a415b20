"""Claim: the wide FFN half-step on Hopper keeps the tolerance rule in y and every gradient, for every activation, norm
and tile of its products, past the edges of tiles, with z kept or not. Without a GPU the
products are plain sums with the same epilogues' code (csrc/cuda/host/products.cpp): all but CUTLASS is proved there."""

import itertools
import json
from pathlib import Path

import pytest
import torch

import macaron_ops
from macaron_ops.native.cuda import library, wide_ffn
from tests import twins
from tests.rule import assert_draws_by_rule

ROOT = Path(__file__).resolve().parents[2]
ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu")
VARIANTS = range(4)  # csrc/cuda/sm90/product.h
# (rows, D, F): one row, parts of tiles, parts of the 64 channels of a stage, several clusters, an odd count of tiles.
SHAPES = [(1, 264, 8), (37, 264, 520), (129, 520, 1032), (300, 1024, 264)]


@pytest.fixture(autouse=True)
def hopper(device):
    if device.type == "cuda" and (why := library.why_not_wgmma(device)):
        pytest.skip(why)


def drawn(shape, norm, dtype, device, seed=0, biases=True):
    """x, w_in, b_in, w_out, b_out and the norm's parameters by name."""
    rows, d, hidden = shape
    generator = torch.Generator().manual_seed(seed)

    def randn(*size, scale=1.0):
        return (scale * torch.randn(size, generator=generator)).to(device, dtype)

    args = [
        randn(rows, d),
        randn(hidden, d, scale=d**-0.5),
        randn(hidden),
        randn(d, hidden, scale=hidden**-0.5),
        randn(d),
    ]
    if not biases:
        args[2] = args[4] = None
    return args, {"norm_weight": randn(d), "norm_bias": randn(d)} if norm is not None and biases else {}


def run(operator, args, affine, grad, **options):
    """y and every gradient."""
    leaves = [t.detach().requires_grad_() for t in (*(t for t in args if t is not None), *affine.values())]
    given = iter(leaves)
    args = [None if t is None else next(given) for t in args]
    y = operator(*args, **dict(zip(affine, given, strict=True)), **options)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad.to(y))]


def check(shape, norm, activation, dtype, device, save="fast", biases=True):
    options = {"norm": norm, "activation": activation, "residual_scale": 1.5, "step": 0.5}

    def draw(seed):
        args, affine = drawn(shape, norm, dtype, device, seed, biases)
        grad = torch.randn(args[0].shape, generator=torch.Generator().manual_seed(seed + 1000)).to(device, dtype)
        wide = [t if t is None else t.double() for t in args]
        with macaron_ops.use_backend("cuda"):
            ours = run(macaron_ops.ffn_step, args, affine, grad, **options, save=save)
        eager = run(twins.ffn_step, args, affine, grad, **options)
        exact = run(twins.ffn_step, wide, {name: t.double() for name, t in affine.items()}, grad, **options)
        return {f"output {i}": found for i, found in enumerate(zip(ours, eager, exact, strict=True))}

    assert_draws_by_rule(draw)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("shape", "norm"), list(zip(SHAPES, ["layer", "rms", "sphere", None], strict=True)))
def test_shapes(shape, norm, dtype, device):
    check(shape, norm, "gelu", dtype, device)


@pytest.mark.parametrize("save", ["fast", "lean"])
@pytest.mark.parametrize("norm", ["layer", None])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_options(activation, norm, save, device):
    check((70, 264, 136), norm, activation, torch.float16, device, save, biases=activation != "silu")


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("swizzle", [1, 8])
def test_tiles(variant, swizzle, activation, monkeypatch, device):
    monkeypatch.setattr(wide_ffn, "variant", lambda *_: (variant, swizzle))
    check((517, 264, 776), "layer", activation, torch.bfloat16, device)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_frozen_subsets(activation, device):
    """Each gradient alone is what it is among all."""
    args, affine = drawn((70, 264, 136), "layer", torch.bfloat16, device)
    leaves = [t.requires_grad_() for t in (*args, *affine.values())]

    def gradients(wanted):
        for leaf in leaves:
            leaf.requires_grad_(any(leaf is w for w in wanted))
        with macaron_ops.use_backend("cuda"):
            y = macaron_ops.ffn_step(
                *leaves[:5], activation=activation, **dict(zip(affine, leaves[5:], strict=True)), residual_scale=1.5
            )
        return torch.autograd.grad(y, wanted, torch.ones_like(y))

    for leaf, expected in zip(leaves, gradients(leaves), strict=True):
        assert torch.equal(*gradients([leaf]), expected)


def test_strides_and_shapes(device):
    """x (2, 3, D) within a wider tensor, transposed weights, an expanded gradient: as with contiguous copies."""
    args, _ = drawn((6, 264, 136), None, torch.bfloat16, device)
    x, w_in, b_in, w_out, b_out = args
    within = torch.zeros(2, 3, 300, device=device, dtype=x.dtype)
    within[..., 5:269] = x.view(2, 3, 264)

    def found(x, w_in, w_out):
        leaves = [t.detach().requires_grad_() for t in (x, w_in, w_out)]
        with macaron_ops.use_backend("cuda"):
            y = macaron_ops.ffn_step(leaves[0], leaves[1], b_in, leaves[2], b_out, activation="gelu")
        return [y, *torch.autograd.grad(y.sum(), leaves)]

    strided = found(within[..., 5:269], w_in.T.contiguous().T, w_out.T.contiguous().T)
    for one, other in zip(strided, found(x.view(2, 3, 264), w_in, w_out), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("norm", ["layer", None])
def test_no_rows(norm, device):
    args, _ = drawn((0, 264, 136), norm, torch.bfloat16, device)
    leaves = [t.requires_grad_() for t in args]
    with macaron_ops.use_backend("cuda"):
        y = macaron_ops.ffn_step(*leaves, norm=norm)
    assert y.shape == (0, 264)
    assert not any(g.any() for g in torch.autograd.grad(y, leaves, y))


def test_torch_compile(device):
    args, affine = drawn((70, 264, 136), "layer", torch.bfloat16, device)
    grad = torch.ones_like(args[0])

    def step(*args, **affine):
        return macaron_ops.ffn_step(*args, **affine, activation="gelu")

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    with macaron_ops.use_backend("cuda"):
        for one, other in zip(run(compiled, args, affine, grad), run(step, args, affine, grad), strict=True):
            assert torch.equal(one, other)


def test_explain(device):
    args, _ = drawn((8, 264, 136), "layer", torch.bfloat16, device)
    with macaron_ops.use_backend("cuda"):
        assert "products by CUTLASS" in str(macaron_ops.explain(macaron_ops.ffn_step, *args))


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((2, 268, 8), {}, "multiples of 8; not D = 268"),
        ((2, 264, 12), {}, "multiples of 8; not D = 264, F = 12"),
        ((2, 264, 0), {}, "at least 8 hidden channels"),
        ((2, 8200, 8), {}, "at most 8192 channels, not 8200"),
        ((2, 264, 8), {"activation": "geglu"}, "not geglu"),
        ((2, 264, 8), {"placement": "post"}, "before, not after"),
        ((2, 264, 8), {"dropout": 0.5}, "no dropout"),
        ((2, 264, 8), {"activation_dropout": 0.5}, "no dropout"),
    ],
)
def test_what_it_declines(shape, options, message, device):
    rows, d, hidden = shape
    gated = 2 if options.get("activation") == "geglu" else 1
    x, w_in, w_out = (torch.zeros(s, device=device).bfloat16() for s in ((rows, d), (gated * hidden, d), (d, hidden)))
    with macaron_ops.use_backend("cuda"), pytest.raises(macaron_ops.BackendError, match=message):
        macaron_ops.ffn_step(x, w_in, None, w_out, None, **options)


def test_the_table_of_tiles():
    """Every product has a tile for every shape, one that the library has."""
    for product in ("hidden", "residual", "backward"):
        for rows, columns in ((1, 264), (128, 128 * 132), (16384, 1024), (1 << 31, 8192)):
            for depth, activation in itertools.product((264, 4096), wide_ffn.ACTIVATIONS):
                tile, swizzle = wide_ffn.variant(product, rows, columns, depth, activation)
                assert tile in VARIANTS and swizzle >= 1


def test_the_table_is_what_was_measured():
    """Within 5% of the best tile that an H200 found for each product."""
    for row in json.loads((ROOT / "bench/results/2026-11-26-nvidia-h200-ffn-tiles.json").read_text())["products"]:
        ours = {tile: time["median"] for tile, time in row["times"].items() if tile != "cuBLAS"}
        out, depth = row["hidden"], row["width"]
        if row["product"] == "residual":
            out, depth = depth, out
        tile = "tile {}, turn {}".format(*wide_ffn.variant(row["product"], row["rows"], out, depth, row["activation"]))
        assert ours[tile] <= 1.05 * min(ours.values()), row
