"""Claim: every operator's outputs and gradients keep the tolerance rule against its eager twin in every narrow dtype,
and equal it in float64."""

import pytest
import torch

import macaron_ops
from tests import twins
from tests.ops.cases import CASES, build
from tests.rule import assert_draws_by_rule


def leaves_of(args, kwargs):
    found = []

    def visit(value):
        if isinstance(value, tuple):
            for v in value:
                visit(v)
        elif isinstance(value, torch.Tensor) and value.is_floating_point():
            found.append(value.requires_grad_())

    visit(args)
    for name, value in kwargs.items():
        if name != "rotary":
            visit(value)
    return found


def run(function, args, kwargs, grad):
    leaves = leaves_of(args, kwargs)
    y = function(*args, **kwargs)
    return [y, *torch.autograd.grad(y, leaves, grad.to(y))]


def upcast(value):
    if isinstance(value, tuple):
        return tuple(upcast(v) for v in value)
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return value
    return value.detach().double()


@pytest.mark.parametrize("save", ["fast", "lean"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=repr)
def test_rule(case, dtype, save, device):
    twin = getattr(twins, case.operator.__name__)
    policy = {"save": save} if case.operator.__name__ in ("ffn_step", "attend_step") else {}

    def draw(seed):
        args, kwargs = build(case, dtype, device, seed)
        generator = torch.Generator().manual_seed(seed + 1000)
        grad = torch.randn(args[0].shape, dtype=torch.float64, generator=generator).to(device, dtype)
        eager = run(twin, *build(case, dtype, device, seed), grad)
        exact = run(twin, tuple(upcast(a) for a in args), {name: upcast(v) for name, v in kwargs.items()}, grad)
        found = {}
        for backend, usable, _ in macaron_ops.explain(case.operator, *args, **kwargs, **policy).rows:
            if usable:
                with macaron_ops.use_backend(backend):
                    actual = run(case.operator, args, {**kwargs, **policy}, grad)
                for i, numbers in enumerate(zip(actual, eager, exact, strict=True)):
                    assert numbers[0].dtype == dtype
                    found[f"{backend}: output {i}"] = tuple(t.detach() for t in numbers)
        return found

    if dtype == torch.float64:  # eager is the exact value itself here
        for actual, _, exact in draw(0).values():
            torch.testing.assert_close(actual, exact)
    else:
        assert_draws_by_rule(draw)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", CASES, ids=repr)
def test_strided_inputs_and_gradients(case, dtype, device):
    """Inputs and incoming gradients of any strides give what contiguous ones give. Products may be summed in another
    order for them, so that in float32 the rule holds, with the contiguous call as its eager one."""

    def strided(value):
        if isinstance(value, tuple):
            return tuple(strided(v) for v in value)
        if not isinstance(value, torch.Tensor) or value.dim() == 0:
            return value
        other = torch.nan if value.is_floating_point() else 1
        spread = value.new_full((*value.shape[:-1], 2 * value.shape[-1]), other)
        view = spread[..., ::2]
        view.copy_(value.detach())
        return view.detach()

    def draw(seed):
        args, kwargs = build(case, dtype, device, seed)
        generator = torch.Generator().manual_seed(seed + 1000)
        grad = torch.randn(args[0].shape, dtype=dtype, generator=generator).to(device)
        exact = run(case.operator, tuple(map(upcast, args)), {n: upcast(v) for n, v in kwargs.items()}, grad)
        expected = run(case.operator, args, kwargs, grad)
        actual = run(case.operator, strided(args), {n: strided(v) for n, v in kwargs.items()}, strided(grad))
        results = enumerate(zip(actual, expected, exact, strict=True))
        return {f"output {i}": tuple(t.detach() for t in ts) for i, ts in results}

    if dtype == torch.float64:
        for actual, expected, _ in draw(0).values():
            torch.testing.assert_close(actual, expected)
    else:
        assert_draws_by_rule(draw)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", CASES, ids=repr)
def test_frozen_subsets(case, dtype):
    """Whatever is frozen, the other gradients are the same and the frozen ones are None."""
    args, kwargs = build(case, dtype)
    grad = torch.randn(args[0].shape, dtype=dtype)
    _, *all_grads = run(case.operator, args, kwargs, grad)
    leaves = leaves_of(args, kwargs)
    for kept in range(len(leaves)):
        for i, leaf in enumerate(leaves):
            leaf.requires_grad_(i == kept)
            leaf.grad = None
        case.operator(*args, **kwargs).backward(grad)
        for i, leaf in enumerate(leaves):
            if i == kept:
                torch.testing.assert_close(leaf.grad, all_grads[i])
            else:
                assert leaf.grad is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", [c for c in CASES if "per-channel" in repr(c) or "given" in repr(c)], ids=repr)
def test_a_learned_step_and_beta_in_float32(case, dtype, device):
    """Beside a narrower x they are used as they are, and their gradients are not rounded to its dtype: with numbers
    that it has, the same bits as in it but for that rounding."""
    args, kwargs = build(case, dtype, device)
    scales = [i for i, t in enumerate(args) if isinstance(t, torch.Tensor) and t.dim() < 2]
    wide = tuple(t.float() if i in scales else t for i, t in enumerate(args))
    grad = torch.randn(args[0].shape).to(args[0])
    backends = [name for name, usable, _ in macaron_ops.explain(case.operator, *wide, **kwargs).rows if usable]
    assert scales and "reference" in backends
    for backend in backends:
        with macaron_ops.use_backend(backend):
            narrow_run, wide_run = (run(case.operator, each, kwargs, grad) for each in (args, wide))
            off = (t + 2**-12 if i in scales else t for i, t in enumerate(wide))
            moved = run(case.operator, tuple(off), kwargs, grad)
        for place, (actual, expected) in enumerate(zip(wide_run, narrow_run, strict=True)):
            assert actual.dtype == (torch.float32 if place - 1 in scales else dtype), backend
            assert torch.equal(actual.to(dtype), expected), backend
        assert not all(torch.equal(a, b) for a, b in zip(moved, wide_run, strict=True))
    with torch.autocast(args[0].device.type, dtype=torch.bfloat16):
        assert run(case.operator, wide, kwargs, grad)[1 + scales[0]].dtype == torch.float32


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_inputs_are_not_written(case):
    args, kwargs = build(case, torch.float32)
    before = [t.clone() for t in leaves_of(args, kwargs)]
    run(case.operator, args, kwargs, torch.randn(args[0].shape))
    for t, b in zip(leaves_of(args, kwargs), before, strict=True):
        assert torch.equal(t, b)
