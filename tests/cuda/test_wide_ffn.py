"""Claim: the wide FFN half-step on Hopper keeps the tolerance rule in y and every gradient, for every activation, norm
and tile of its products, past the edges of tiles, with z kept or not, also inside a CUDA graph. And without a GPU: with
products that PyTorch computes, what is put around them is the definition, whichever gradients are needed."""

import importlib
import itertools
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import macaron_ops
from macaron_ops.native.cuda import library, wide_ffn
from macaron_ops.reference.activation import activate, activate_backward
from macaron_ops.reference.ffn_step import Options, Tensors
from tests import twins
from tests.rule import assert_by_rule, assert_draws_by_rule

ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu")
VARIANTS = range(4)  # csrc/cuda/sm90/product.h
# (rows, D, F): one row, parts of tiles, parts of the 64 channels of a stage, several clusters, an odd count of tiles.
SHAPES = [(1, 264, 8), (37, 264, 520), (129, 520, 1032), (300, 1024, 264)]
DEVICE = torch.device("cuda")


@pytest.fixture(autouse=True)
def hopper(request):
    if request.node.get_closest_marker("gpu"):
        status = macaron_ops.backends()["cuda"]
        assert status.usable, status.reason
        if why := library.why_not_wgmma(DEVICE):
            pytest.skip(why)


def drawn(shape, norm, dtype, seed=0, biases=True):
    """x, w_in, b_in, w_out, b_out and the norm's parameters by name."""
    rows, d, hidden = shape
    generator = torch.Generator().manual_seed(seed)

    def randn(*size, scale=1.0):
        return (scale * torch.randn(size, generator=generator)).to(DEVICE, dtype)

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


def check(shape, norm, activation, dtype, save="fast", biases=True):
    options = {"norm": norm, "activation": activation, "residual_scale": 1.5, "step": 0.5}

    def draw(seed):
        args, affine = drawn(shape, norm, dtype, seed, biases)
        grad = torch.randn(args[0].shape, generator=torch.Generator().manual_seed(seed + 1000)).to(DEVICE, dtype)
        wide = [t if t is None else t.double() for t in args]
        with macaron_ops.use_backend("cuda"):
            ours = run(macaron_ops.ffn_step, args, affine, grad, **options, save=save)
        eager = run(twins.ffn_step, args, affine, grad, **options)
        exact = run(twins.ffn_step, wide, {name: t.double() for name, t in affine.items()}, grad, **options)
        return {f"output {i}": found for i, found in enumerate(zip(ours, eager, exact, strict=True))}

    assert_draws_by_rule(draw)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("shape", "norm"), list(zip(SHAPES, ["layer", "rms", "sphere", None], strict=True)))
def test_shapes(shape, norm, dtype):
    check(shape, norm, "gelu", dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("save", ["fast", "lean"])
@pytest.mark.parametrize("norm", ["layer", None])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_options(activation, norm, save):
    check((70, 264, 136), norm, activation, torch.float16, save, biases=activation != "silu")


@pytest.mark.gpu
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("swizzle", [1, 8])
def test_tiles(variant, swizzle, activation, monkeypatch):
    monkeypatch.setattr(wide_ffn, "variant", lambda *_: (variant, swizzle))
    check((517, 264, 776), "layer", activation, torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_frozen_subsets(activation):
    """Each gradient alone is what it is among all."""
    args, affine = drawn((70, 264, 136), "layer", torch.bfloat16)
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


@pytest.mark.gpu
def test_strides_and_shapes():
    """x (2, 3, D) within a wider tensor, transposed weights, an expanded gradient: as with contiguous copies."""
    args, _ = drawn((6, 264, 136), None, torch.bfloat16)
    x, w_in, b_in, w_out, b_out = args
    within = torch.zeros(2, 3, 300, device=DEVICE, dtype=x.dtype)
    within[..., 5:269] = x.view(2, 3, 264)

    def found(x, w_in, w_out):
        leaves = [t.detach().requires_grad_() for t in (x, w_in, w_out)]
        with macaron_ops.use_backend("cuda"):
            y = macaron_ops.ffn_step(leaves[0], leaves[1], b_in, leaves[2], b_out, activation="gelu")
        return [y, *torch.autograd.grad(y.sum(), leaves)]

    strided = found(within[..., 5:269], w_in.T.contiguous().T, w_out.T.contiguous().T)
    for one, other in zip(strided, found(x.view(2, 3, 264), w_in, w_out), strict=True):
        assert torch.equal(one, other)


@pytest.mark.gpu
@pytest.mark.parametrize("norm", ["layer", None])
def test_no_rows(norm):
    args, _ = drawn((0, 264, 136), norm, torch.bfloat16)
    leaves = [t.requires_grad_() for t in args]
    with macaron_ops.use_backend("cuda"):
        y = macaron_ops.ffn_step(*leaves, norm=norm)
    assert y.shape == (0, 264)
    assert not any(g.any() for g in torch.autograd.grad(y, leaves, y))


@pytest.mark.gpu
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_cuda_graph(activation):
    """Forward and backward replay in a graph, on what its inputs hold then, with the same bits as without it."""
    args, affine = drawn((300, 264, 520), "layer", torch.bfloat16)
    others, _ = drawn((300, 264, 520), "layer", torch.bfloat16, seed=1)
    grad = torch.ones_like(args[0])

    def step():
        with macaron_ops.use_backend("cuda"):
            return run(macaron_ops.ffn_step, args, affine, grad, activation=activation)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for tensor, other in zip(args, others, strict=True):
        tensor.copy_(other)
    graph.replay()
    assert all(torch.equal(one, other) for one, other in zip(captured, step(), strict=True))


@pytest.mark.gpu
def test_torch_compile():
    args, affine = drawn((70, 264, 136), "layer", torch.bfloat16)
    grad = torch.ones_like(args[0])

    def step(*args, **affine):
        return macaron_ops.ffn_step(*args, **affine, activation="gelu")

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    with macaron_ops.use_backend("cuda"):
        for one, other in zip(run(compiled, args, affine, grad), run(step, args, affine, grad), strict=True):
            assert torch.equal(one, other)


@pytest.mark.gpu
def test_explain():
    args, _ = drawn((8, 264, 136), "layer", torch.bfloat16)
    with macaron_ops.use_backend("cuda"):
        assert "products by CUTLASS" in str(macaron_ops.explain(macaron_ops.ffn_step, *args))


# -- without a GPU ---------------------------------------------------------------------------------------------------


def hidden(n, w_in, b_in, activation, keep, *_):
    z = F.linear(n, w_in, b_in)
    return activate(z, ACTIVATIONS[activation]), z if keep else z.new_empty(0)


def residual(h, w_out, b_out, x, a, c, *_):
    return a * x + c * F.linear(h, w_out, b_out)


def hidden_backward(grad, w_out, z, activation, c, need_h, need_sums, *_):
    name, columns = ACTIVATIONS[activation], 16  # of a tile of 2 rows
    dz = activate_backward(c * grad @ w_out, z, name)
    padded = F.pad(dz, (0, -dz.shape[1] % columns, 0, -len(dz) % 2))
    sums = padded.view(-1, 2, padded.shape[1]).sum(1)
    return dz, activate(z, name) if need_h else z.new_empty(0), sums if need_sums else sums[:0]


@pytest.mark.skipif(not library.on_host(), reason="the row kernels of this process are for a GPU")
@pytest.mark.parametrize("save", ["fast", "lean"])
@pytest.mark.parametrize("norm", ["layer", "sphere", None])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_what_is_around_the_products(activation, norm, save, monkeypatch):
    products = SimpleNamespace(ffn_hidden=hidden, ffn_residual=residual, ffn_hidden_backward=hidden_backward)
    monkeypatch.setattr(wide_ffn, "_ops", products)
    definition = importlib.import_module("macaron_ops.reference.ffn_step")
    x, dy, w_in, b_in, w_out, b_out = (torch.randn(s) for s in ((2, 5, 24), (2, 5, 24), (40, 24), 40, (24, 40), 24))
    affine = (None, None) if norm is None else (torch.randn(24), torch.randn(24))
    tensors = Tensors(w_in / 24**0.5, b_in, w_out / 40**0.5, b_out, *affine, None)
    options = Options(norm, 1e-5, activation, 0.5, 1.5, "pre", 0.0, 0.0, 0)
    wide = Tensors(*(None if t is None else t.double() for t in tensors))
    there = [True, *(t is not None for t in tensors)]
    alone = [tuple(i == j for j in range(len(there))) for i, given in enumerate(there) if given]
    for needs in (tuple(there), *alone):
        found = []
        for module, x_, dy_, t in itertools.chain(
            [(wide_ffn, x, dy, tensors)],
            ((definition, x.to(w), dy.to(w), t) for w, t in ((x, tensors), (wide[0], wide))),
        ):
            y, saved = module.forward(x_, t, options, save)
            grad_x, grads = module.backward(dy_, needs, x_, t, saved, options)
            found.append((y, grad_x, *grads))
        for i, (ours, eager, exact) in enumerate(zip(*found, strict=True)):
            assert (ours is None) == (exact is None) == (i > 0 and not needs[i - 1])
            if ours is not None:
                assert_by_rule(f"output {i}", ours, eager, exact)
