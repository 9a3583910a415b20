"""Claim: every raw operator is a well-behaved torch.library operator, and the public ones trace without a break."""

import pytest
import torch
import torch._dynamo.testing
from torch.library import opcheck

import macaron_ops
from macaron_ops.ops.dispatch import MODULES
from macaron_ops.ops.registry import BACKWARD, FORWARD, definition
from tests.ops.cases import CASES, build


def flat_call(case, dtype=torch.float32, **policy):
    args, kwargs = build(case, dtype)
    bound = case.operator.bind(*args, **kwargs, **policy)
    return bound, [bound.x, *bound.tensors]


@pytest.mark.parametrize("save", ["none", "lean", "fast"])
@pytest.mark.parametrize("case", CASES, ids=repr)
def test_opcheck(case, save):
    bound, inputs = flat_call(case)
    forward = FORWARD["reference", bound.operator]
    opcheck(forward, (*inputs, *bound.options, save))
    if save == "none":
        return
    outputs = forward(*inputs, *bound.options, save)
    y, saved = (outputs[0], outputs[1:]) if isinstance(outputs, tuple) else (outputs, ())
    constants = ("cos", "sin")  # the operator refuses them where they require a gradient
    names = ("x", *bound.tensors._fields)
    able = [t is not None and t.is_floating_point() and n not in constants for n, t in zip(names, inputs, strict=True)]
    for needs in (able, [i == 1 and need for i, need in enumerate(able)]):
        opcheck(BACKWARD["reference", bound.operator], (torch.randn_like(y), needs, *inputs, *saved, *bound.options))


def test_schema_follows_the_named_tuples():
    for (backend, operator), op in FORWARD.items():
        m, own = definition(operator), MODULES[backend, operator]
        names = [a.name for a in op._schema.arguments]
        ahead = own.Ahead._fields if hasattr(own, "Ahead") else ()
        assert names == ["x", *m.Tensors._fields, *m.Options._fields, "save", *ahead], (backend, operator)
        saved = getattr(own, "Saved", m.Saved)
        assert len(op._schema.returns) == 1 + len(saved._fields) + (len(ahead) > 0)


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_compiles_without_a_graph_break(case):
    torch.compiler.reset()
    args, kwargs = build(case, torch.float64)
    for t in args:
        if isinstance(t, torch.Tensor):
            t.requires_grad_()
    expected = case.operator(*args, **kwargs)
    compiled = torch.compile(case.operator, fullgraph=True, backend="aot_eager")
    actual = compiled(*args, **kwargs)
    torch.testing.assert_close(actual, expected)
    leaves = [t for t in args if isinstance(t, torch.Tensor)]
    grad = torch.randn_like(expected)
    torch.testing.assert_close(torch.autograd.grad(actual, leaves, grad), torch.autograd.grad(expected, leaves, grad))


def test_compiles_for_varying_lengths_without_recompiling():
    """A second length makes the sequence dimension dynamic; a third does not compile again."""
    torch.compiler.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    w = [torch.randn(32, 16), torch.randn(32), torch.randn(16, 32), torch.randn(16)]
    step = torch.compile(lambda x: macaron_ops.ffn_step(x, *w), fullgraph=True, backend=counter)
    for length in (5, 9, 13, 17):
        x = torch.randn(2, length, 16)
        torch.testing.assert_close(step(x), macaron_ops.ffn_step(x, *w))
    assert counter.frame_count == 2


@pytest.mark.inductor
def test_compiles_with_inductor_and_dropout():
    torch.compiler.reset()
    w = [torch.randn(32, 16), torch.randn(32), torch.randn(16, 32), torch.randn(16)]
    step = torch.compile(lambda x, seed: macaron_ops.ffn_step(x, *w, dropout=0.5, seed=seed), fullgraph=True)
    x, seed = torch.randn(3, 16, requires_grad=True), torch.tensor(3)
    expected, actual = macaron_ops.ffn_step(x, *w, dropout=0.5, seed=seed), step(x, seed)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(*(torch.autograd.grad(y.sum(), x)[0] for y in (actual, expected)))


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_meta_tensors(case):
    """Shapes without numbers: what torch.export, FSDP's initialisation and memory planners use."""
    args, kwargs = build(case, torch.bfloat16, "meta")
    y = case.operator(args[0].requires_grad_(), *args[1:], **kwargs)
    assert y.device.type == "meta" and y.shape == args[0].shape and y.dtype == torch.bfloat16
    assert torch.autograd.grad(y.sum(), args[0])[0].shape == args[0].shape


@pytest.mark.gpu
@pytest.mark.parametrize("case", [c for c in CASES if "empty" not in c.name and c.name != "none"], ids=repr)
def test_cuda_graph_capture(case):
    """Forward and backward replay inside a CUDA graph: nothing synchronises, nothing is allocated on the host."""
    args, kwargs = build(case, torch.float32, "cuda")
    x = args[0].requires_grad_()
    grad = torch.randn_like(x)

    def step():
        return torch.autograd.grad(case.operator(x, *args[1:], **kwargs), x, grad)[0]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        expected = step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    captured.zero_()
    graph.replay()
    torch.testing.assert_close(captured, expected)
