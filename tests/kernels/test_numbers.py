"""Claim: the Triton kernels keep the tolerance rule in the output and every gradient, in the interpreter on the CPU
(where narrow operands of a product are widened, see ``kernels/emulation.py``) and on a GPU."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings

import macaron_ops
from tests import twins
from tests.native.calls import Call, Drawn, check, values
from tests.native.calls import run as run_call
from tests.native.strategies import ffn_calls, normalize_calls, sphere_calls
from tests.ops.cases import CASES, build
from tests.ops.test_numbers import run, upcast
from tests.rule import assert_draws_by_rule

TRITON = macaron_ops.backends()["triton"]
pytestmark = pytest.mark.skipif(not TRITON.usable, reason=f"triton: {TRITON.reason}")
OURS = [case for case in CASES if case.operator.__name__ in ("ffn_step", "normalize_step", "sphere_attend_step")]
few = settings(max_examples=8, suppress_health_check=list(HealthCheck))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# In float16 one call of the particles is enough: they run as in bfloat16, and the interpreter is slow.
EACH = [
    (case, dtype)
    for dtype in DTYPES
    for case in OURS
    if dtype != torch.float16 or not repr(case).startswith("sphere") or repr(case).endswith("softmax")
]


def assert_case_by_rule(case, dtype, device, **policy):
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
        results = enumerate(zip(actual, eager, exact, strict=True))
        return {f"output {i}": tuple(t.detach() for t in ts) for i, ts in results}

    assert_draws_by_rule(draw)


@pytest.mark.parametrize(("case", "dtype"), EACH, ids=str)
def test_rule(case, dtype, device):
    """float32 and float16 keep the pre-activations, bfloat16 computes them again."""
    policy = {"save": "lean" if dtype == torch.bfloat16 else "fast"} if case.operator.__name__ == "ffn_step" else {}
    assert_case_by_rule(case, dtype, device, **policy)


# Wider than the one kernel takes, with everything that the products' epilogues know.
WIDE = {
    "x": Drawn((2, 9, 136), role="x", layout="swapped", shift=3.0),
    "w_in": Drawn((40, 136), kind="fan", layout="every other"),
    "b_in": Drawn((40,), layout="every other"),
    "w_out": Drawn((136, 20), kind="fan", layout="inside"),
    "b_out": Drawn((136,), layout="inside"),
    "norm_weight": Drawn((136,), role="scale", shift=1.0),
    "norm_bias": Drawn((136,), role="scale", layout="every other"),
}
OPTIONS = {"step": 0.5, "residual_scale": -1.5, "dropout": 0.3, "activation_dropout": 0.2, "seed": 11}


@pytest.mark.parametrize("placement", ["pre", "post"])
@pytest.mark.parametrize("save", ["fast", "lean"])
@pytest.mark.parametrize("activation", ["gelu_tanh", "swiglu"])
def test_wide(activation, save, placement, device):
    tensors = WIDE if activation == "swiglu" else {**WIDE, "w_out": Drawn((136, 40), kind="fan")}
    options = {"activation": activation, "placement": placement, "norm": "rms", **OPTIONS}
    check(Call("ffn_step", tensors, options, "autocast", save, "every other"), "triton", device)


@pytest.mark.parametrize("placement", ["pre", "post"])
@pytest.mark.parametrize("norm", ["layer", "sphere", None])
def test_wide_norms(norm, placement, device):
    tensors = {name: t for name, t in WIDE.items() if name not in ("b_in", "b_out") and (norm or "norm" not in name)}
    options = {"activation": "geglu", "placement": placement, "norm": norm}
    check(Call("ffn_step", tensors, options, "bfloat16, float32 scales", "fast"), "triton", device)


def test_the_same_bits_every_time(device):
    """No sum depends on the order in which programs finish."""
    call = Call("ffn_step", WIDE, {"activation": "swiglu", **OPTIONS}, "bfloat16")
    found = values(call, 0)
    first, again = (run_call(call, found, "triton", device) for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)


@few
@given(call=ffn_calls())
def test_any_ffn_step(device, call):
    check(call, "triton", device)


@few
@given(call=normalize_calls())
def test_any_normalize_step(device, call):
    check(call, "triton", device)


@settings(few, max_examples=4)
@given(call=sphere_calls())
def test_any_sphere_attend_step(device, call):
    check(call, "triton", device)
