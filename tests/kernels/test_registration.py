"""Claim: the backend's raw operators are well-behaved torch.library operators, trace without a break, and an empty
batch launches nothing."""

import pytest
import torch
from torch.library import opcheck

import macaron_ops
from macaron_ops.ops.registry import BACKWARD, FORWARD, SAVED
from tests.ops.cases import CASES, build

TRITON = macaron_ops.backends()["triton"]
pytestmark = pytest.mark.skipif(not TRITON.usable, reason=f"triton: {TRITON.reason}")
NAMES = (
    *("ffn_step-swiglu", "ffn_step-post", "ffn_step-empty-batch", "attend_step-one-token"),
    *("normalize_step-per-channel", "sphere_attend_step-given", "sphere_attend_step-none"),
)
SOME = [case for case in CASES if repr(case) in NAMES]


@pytest.mark.parametrize("save", ["none", "lean", "fast"])
@pytest.mark.parametrize("case", SOME, ids=repr)
def test_opcheck(case, save, device):
    args, kwargs = build(case, torch.float32, device)
    bound = case.operator.bind(*args, **kwargs)
    inputs = [bound.x, *bound.tensors]
    utils = ("test_schema", "test_faketensor")
    forward = FORWARD["triton", bound.operator]
    opcheck(forward, (*inputs, *bound.options, save), test_utils=utils)
    if save != "none":
        outputs = forward(*inputs, *bound.options, save)
        y, *others = outputs if isinstance(outputs, tuple) else (outputs,)
        saved = others[: SAVED["triton", bound.operator]]
        needs = [t is not None and t.is_floating_point() for t in inputs]
        arguments = (torch.randn_like(y), needs, *inputs, *saved, *bound.options)
        opcheck(BACKWARD["triton", bound.operator], arguments, test_utils=utils)


@pytest.mark.parametrize("case", [c for c in SOME if "empty" not in repr(c)], ids=repr)
def test_compiles_without_a_graph_break(case, device):
    torch.compiler.reset()
    args, kwargs = build(case, torch.float32, device)
    leaves = [t.requires_grad_() for t in args if isinstance(t, torch.Tensor)]
    with macaron_ops.use_backend("triton"):
        expected = case.operator(*args, **kwargs)
        compiled = torch.compile(case.operator, fullgraph=True, backend="aot_eager")(*args, **kwargs)
    torch.testing.assert_close(compiled, expected)
    grad = torch.randn_like(expected)
    torch.testing.assert_close(torch.autograd.grad(compiled, leaves, grad), torch.autograd.grad(expected, leaves, grad))
