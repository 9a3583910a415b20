"""Claim: NaN and infinities in any argument get exactly where they get in the definition."""

import pytest
import torch

import macaron_ops
from macaron_ops import native
from tests.ops.cases import CASES, build
from tests.ops.test_numbers import leaves_of, run

pytestmark = pytest.mark.skipif(native.library() is None, reason=f"the native backend: {native.why_not_loaded()}")

NAMES = {
    *(f"ffn_step-{name}" for name in ("relu", "gelu", "gelu_tanh", "silu", "swiglu", "post", "sphere", "no-norm")),
    *(f"attend_step-{name}" for name in ("self", "separate", "grouped", "cross", "post")),
    *(f"sphere_attend_step-{name}" for name in ("softmax", "unnormalized", "given", "past-a-tile")),
    *(f"normalize_step-{name}" for name in ("tangent", "difference", "ambient")),
}
CHOSEN = [case for case in CASES if repr(case) in NAMES]


def finite(case, spoilt, value, backend):
    """Which numbers of the output and of every gradient are finite, with one number of one argument replaced."""
    args, kwargs = build(case, torch.float32)
    flat = leaves_of(args, kwargs)[spoilt].detach().view(-1)
    flat[len(flat) // 2] = value
    with macaron_ops.use_backend(backend):
        results = run(case.operator, args, kwargs, torch.ones(args[0].shape))
    return [result.isfinite() for result in results]


def test_the_chosen_cases_are_there():
    assert len(CHOSEN) == len(NAMES)


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("case", CHOSEN, ids=repr)
def test_they_go_where_the_references_go(case, value):
    for spoilt in range(len(leaves_of(*build(case, torch.float32)))):
        native_finite, exact = (finite(case, spoilt, value, backend) for backend in ("native", "reference"))
        for i, (ours, theirs) in enumerate(zip(native_finite, exact, strict=True)):
            assert torch.equal(ours, theirs), f"argument {spoilt}, result {i}: {(ours != theirs).sum()} differ"


@pytest.mark.parametrize("activation", ["relu", "gelu_tanh", "silu"])  # torch's own gelu of inf is NaN, ours is inf
def test_padding_stays_out_of_real_rows(activation):
    """37 tokens fill a panel and part of another one, whose padding sees infinite weights."""
    w_in, b_in, w_out = torch.randn(13, 20), torch.randn(13), torch.randn(20, 13)
    w_in[4, 7] = torch.inf
    x = torch.randn(37, 20)
    x[:, 7] = x[:, 7].abs() + 1
    found = []
    for backend in ("native", "reference"):
        leaves = [t.clone().requires_grad_() for t in (x, w_in, b_in, w_out)]
        with macaron_ops.use_backend(backend):
            y = macaron_ops.ffn_step(*leaves, None, norm=None, activation=activation)
            found.append([y, *torch.autograd.grad(y.sum(), leaves)])
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours.isnan(), theirs.isnan()) and torch.equal(ours.isfinite(), theirs.isfinite())
