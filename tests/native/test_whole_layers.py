"""Claim: a layer in one call of the library is its substeps one after the other, forward and backward."""

import pytest
import torch

import macaron_ops
from macaron_ops import attend_step, ffn_step, native, parallel, split_layer, substep
from macaron_ops.ops import dispatch
from tests.rule import assert_by_rule

pytestmark = pytest.mark.skipif(native.library() is None, reason=f"the native backend: {native.why_not_loaded()}")

D, F, HEADS = 36, 52, 3


def parameters(dtype=torch.float64):
    def randn(*shape, scale=1.0):
        return (torch.randn(shape, dtype=torch.float64) * scale).to(dtype).requires_grad_()

    def ffn():
        return [randn(F, D, scale=D**-0.5), randn(F), randn(D, F, scale=F**-0.5), randn(D)]

    return {
        "x": [randn(2, 37, D)],
        "first": ffn(),
        "attend": [randn(3 * D, D, scale=D**-0.5), randn(3 * D), randn(D, D, scale=D**-0.5), randn(D)],
        "second": ffn(),
    }


def strang(p, **options):
    return [
        substep(ffn_step, *p["first"], activation="gelu", **options),
        substep(attend_step, *p["attend"], HEADS, **options),
        substep(ffn_step, *p["second"], activation="silu", **options),
    ]


LAYERS = {
    "pre": lambda p: strang(p),
    "post": lambda p: strang(p, placement="post"),
    "dropout": lambda p: strang(p, dropout=0.2),
    "tied": lambda p: strang({**p, "second": p["first"]}),
    "parallel": lambda p: [
        parallel(
            substep(attend_step, *p["attend"], HEADS), substep(ffn_step, *p["first"], activation="gelu", step=1.0)
        ),
        substep(ffn_step, *p["second"]),
    ],
}


def gradients(p, layer, save, trained=None):
    leaves = [t for group in p.values() for t in group]
    torch.manual_seed(5)  # of the dropouts' seed
    y = split_layer(p["x"][0], LAYERS[layer](p), save=save)
    wanted = leaves if trained is None else trained
    grad = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, wanted, grad, allow_unused=True)]


def cast(p, dtype):
    return {name: [t.detach().to(dtype).requires_grad_() for t in group] for name, group in p.items()}


@pytest.mark.parametrize("save", ["fast", "lean"])
@pytest.mark.parametrize("layer", LAYERS)
def test_the_rule_holds_for_the_whole(layer, save):
    p = cast(parameters(), torch.float32)
    with macaron_ops.use_backend("reference"):
        exact, eager = gradients(cast(p, torch.float64), layer, save), gradients(p, layer, save)
    with macaron_ops.use_backend("native"):
        actual = gradients(p, layer, save)
    for i, (a, b, c) in enumerate(zip(actual, eager, exact, strict=True)):
        assert (a is None) == (c is None)
        if a is not None:
            assert_by_rule(f"result {i}", a, b, c)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layer", LAYERS)
def test_one_call_is_one_substep_after_the_other(layer, dtype, monkeypatch):
    """To the last bit: the same kernels run, once as one plan and once by the raw operators."""
    p = cast(parameters(), dtype)
    with macaron_ops.use_backend("native"):
        whole = gradients(p, layer, "fast")
        monkeypatch.setattr(dispatch, "WHOLE", {})
        monkeypatch.setattr("macaron_ops.ops.run.WHOLE", {})
        apart = gradients(p, layer, "fast")
    for a, b in zip(whole, apart, strict=True):
        assert a is b is None or torch.equal(a, b)


@pytest.mark.parametrize("save", ["fast", "lean"])
def test_frozen_parts_change_nothing_else(save):
    p = cast(parameters(), torch.float32)
    full = dict(zip(["y", *(t for g in p.values() for t in g)], gradients(p, "pre", save), strict=True))
    for kept in ("second", "attend", "first", "x"):
        for group in p.values():
            for t in group:
                t.requires_grad_(False)
        for t in p[kept]:
            t.requires_grad_()
        for t, grad in zip(p[kept], gradients(p, "pre", save, p[kept])[1:], strict=True):
            torch.testing.assert_close(grad, full[t])


def test_it_compiles_without_a_graph_break():
    p = cast(parameters(), torch.float32)
    torch.compiler.reset()
    compiled = torch.compile(lambda x: split_layer(x, strang(p)), fullgraph=True, backend="aot_eager")
    x = p["x"][0]
    expected, actual = split_layer(x, strang(p)), compiled(x)
    torch.testing.assert_close(actual, expected)
    leaves = [t for group in p.values() for t in group]
    for a, b in zip(*(torch.autograd.grad(y.sum(), leaves) for y in (actual, expected)), strict=True):
        torch.testing.assert_close(a, b)


def test_the_second_derivative_goes_through_the_definition():
    p = cast(parameters(), torch.float32)
    y = split_layer(p["x"][0], strang(p))
    grad = torch.autograd.grad(y.square().sum(), p["x"][0], create_graph=True)[0]
    assert torch.autograd.grad(grad.square().sum(), p["first"][0])[0].isfinite().all()


def test_nothing_is_kept_below_the_first_trained_substep():
    p = parameters(torch.float32)
    frozen = [t for name in ("x", "first", "attend") for t in p[name]]
    for t in frozen:
        t.requires_grad_(False)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = split_layer(p["x"][0], strang(p), save="lean")
    inputs = [t for t in kept if t.shape == y.shape and t is not p["x"][0]]
    assert len(inputs) == 1  # that of the last substep
    exact = split_layer(p["x"][0].double(), strang({name: [t.double() for t in group] for name, group in p.items()}))
    torch.testing.assert_close(y.double(), exact, rtol=1e-4, atol=1e-5)
    grads = torch.autograd.grad(y.sum(), p["second"])
    for g, e in zip(grads, torch.autograd.grad(exact.sum(), p["second"]), strict=True):
        torch.testing.assert_close(g, e, rtol=1e-3, atol=1e-3)
