"""Claim: the Triton kernels keep the tolerance rule in the output and every gradient, in the interpreter on the CPU
(where narrow operands of a product are widened, see ``kernels/product.py``) and on a GPU."""

import pytest
import torch

import macaron_ops
from tests import twins
from tests.ops.cases import CASES, build
from tests.ops.test_numbers import run, upcast
from tests.rule import assert_draws_by_rule

TRITON = macaron_ops.backends()["triton"]
pytestmark = pytest.mark.skipif(not TRITON.usable, reason=f"triton: {TRITON.reason}")
OURS = [case for case in CASES if case.operator.__name__ in TRITON.operators]
POLICIES = {"ffn_step": ("fast", "lean")}


def by_rule(case, dtype, device, **policy):
    twin = getattr(twins, case.operator.__name__)

    def draw(seed):
        args, kwargs = build(case, dtype, device, seed)
        generator = torch.Generator().manual_seed(seed + 1000)
        grad = torch.randn(args[0].shape, dtype=torch.float64, generator=generator).to(device, dtype)
        eager = run(twin, *build(case, dtype, device, seed), grad)
        exact = run(twin, tuple(upcast(a) for a in args), {name: upcast(v) for name, v in kwargs.items()}, grad)
        with macaron_ops.use_backend("triton"):
            actual = run(case.operator, args, {**kwargs, **policy}, grad)
        assert all(t.dtype == dtype for t in actual)
        return {
            f"output {i}": tuple(t.detach() for t in ts) for i, ts in enumerate(zip(actual, eager, exact, strict=True))
        }

    assert_draws_by_rule(draw)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", OURS, ids=repr)
def test_rule(case, dtype, device):
    for save in POLICIES.get(case.operator.__name__, (None,)):
        by_rule(case, dtype, device, **({} if save is None else {"save": save}))
