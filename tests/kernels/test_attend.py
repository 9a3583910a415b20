"""Claim: the Triton kernels of ``attend_step`` keep the tolerance rule in the output and every gradient, give the same
bits every time, launch no kernel that is not needed, and do with special values what the definition does.
``HYPOTHESIS_PROFILE=thorough`` runs every case of the operators' tests in every dtype."""

import math
import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings

import macaron_ops
from tests.kernels.test_numbers import assert_case_by_rule
from tests.kernels.tools import attend_arguments, launches_of_attend
from tests.native.calls import Call, Drawn, check, values
from tests.native.calls import run as run_call
from tests.native.strategies import attend_calls
from tests.ops.cases import CASES

TRITON = macaron_ops.backends()["triton"]
pytestmark = pytest.mark.skipif(not TRITON.usable, reason=f"triton: {TRITON.reason}")
THOROUGH = os.environ.get("HYPOTHESIS_PROFILE") == "thorough"
BY_NAME = {case.name: case for case in CASES if case.operator.__name__ == "attend_step"}
FLOAT32, BFLOAT16, FLOAT16 = torch.float32, torch.bfloat16, torch.float16
SOME = [("everything", FLOAT32), ("cross", BFLOAT16), ("learned-padding", FLOAT16)]
EVERY = [(name, dtype) for name in BY_NAME for dtype in (FLOAT32, BFLOAT16, FLOAT16)]
few = settings(max_examples=2000 if THOROUGH else 2, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize(("name", "dtype"), EVERY if THOROUGH else SOME, ids=str)
def test_rule(name, dtype, device):
    """float32 and float16 keep the projections, bfloat16 forms them again."""
    assert_case_by_rule(BY_NAME[name], dtype, device, save="lean" if dtype == BFLOAT16 else "fast")


# Two tiles of queries and of keys, borders of sequences inside them; what no other test has at once.
TALL = {
    "x": Drawn((70, 24), role="x", layout="every other"),
    "w_qkv": Drawn((48, 24), kind="fan", layout="inside"),
    "b_qkv": Drawn((48,), layout="every other"),
    "w_out": Drawn((24, 24), kind="fan", layout="transposed"),
    "b_out": Drawn((24,)),
    "norm_weight": Drawn((24,), role="scale", shift=1.0),
    "attn_mask": Drawn((1, 2, 1, 70), role="x"),
    "key_padding_mask": Drawn((70,), kind="blocked", role="x"),
}
OPTIONS = {"num_heads": 2, "num_kv_heads": 1, "causal": True, "placement": "post", "norm": "rms", "residual_scale": 1.5}
OPTIONS |= {"dropout": 0.3, "seed": 11, "cu_seqlens": (0, 33, 34, 70)}


def test_many_tiles(device):
    call = Call("attend_step", TALL, OPTIONS, "autocast", "lean", "every other")
    check(call, "triton", device)
    found = values(call, 0)
    first, again = (run_call(call, found, "triton", device) for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first), "no sum depends on which program ends first"


def is_small(call):
    """Few programs: the interpreter takes tens of milliseconds for each tile of scores."""
    tokens, keys = (call.tensors[name].shape[-2] for name in ("x", "context" if "context" in call.tensors else "x"))
    tiles = (1 + tokens // 64) * (1 + keys // 64)
    return math.prod(call.tensors["x"].shape[:-2]) * call.options["num_heads"] * tiles <= (100 if THOROUGH else 6)


@few
@given(call=attend_calls().filter(is_small))
def test_any_attend_step(device, call):
    check(call, "triton", device)


def call_of(tokens, keys=None, **options):
    """``(args, kwargs)`` of two sequences and two heads of 8."""
    draw = torch.randn
    args = draw(2, tokens, 16), draw(48, 16) / 4, draw(48), draw(16, 16) / 4, draw(16), 2
    return args, options if keys is None else {**options, "context": draw(2, keys, 16)}


def both(args, kwargs, device):
    """Output and gradients of the kernels and of the definition."""
    found = []
    for backend in ("triton", "reference"):
        leaves = [t.detach().to(device).requires_grad_() for t in args[:5]]
        placed = {name: t.to(device) if isinstance(t, torch.Tensor) else t for name, t in kwargs.items()}
        with macaron_ops.use_backend(backend):
            y = macaron_ops.attend_step(*leaves, args[5], **placed)
        found.append([y, *torch.autograd.grad(y, leaves, torch.ones_like(y))])
    return found


@pytest.mark.parametrize(("kind", "tokens"), [("bool", 70), ("added", 7)])
def test_a_row_that_sees_nothing_gives_the_bias_alone(kind, tokens, device):
    args, kwargs = call_of(tokens)
    blocked = torch.zeros(tokens, tokens, dtype=torch.bool)
    blocked[3] = blocked[64:] = True
    kwargs["attn_mask"] = blocked if kind == "bool" else torch.zeros(tokens, tokens).masked_fill(blocked, -torch.inf)
    ours, theirs = both(args, kwargs, device)
    torch.testing.assert_close(ours[0][:, 3].cpu(), args[0][:, 3] + args[4])
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("where", "value"), [("x", torch.nan), ("x", torch.inf), ("attn_mask", torch.inf)])
def test_nan_and_inf_go_where_they_would(where, value, device):
    args, kwargs = call_of(7, norm="rms")
    if where == "attn_mask":
        kwargs[where] = torch.zeros(4, 7, 7)
        kwargs[where][1, 2, 3] = value
    else:
        args[0][0, 2, 5] = value
    for a, b in zip(*both(args, kwargs, device), strict=True):
        assert torch.equal(a.isnan(), b.isnan())


@pytest.mark.parametrize("seed", [-1, 2**62 + 12345678901])
def test_dropout_masks(seed, device):
    """The weights are 1 / 128 and the values 128 times a unit vector, so that a result says which weights were kept."""
    tokens = width = 128
    x, eye = torch.zeros(tokens, width, device=device), torch.eye(width, device=device)
    zero = torch.zeros(2 * width, width, device=device)
    w_v = torch.full((width, width), 128.0, device=device)
    found = []
    for backend in ("triton", "reference"):
        with macaron_ops.use_backend(backend):
            y = macaron_ops.attend_step(
                x, (zero[:width], zero[width:], eye), None, eye, None, 2, norm=None, residual_scale=0.0,
                context=w_v.triu(), attention_dropout=0.5, seed=seed,
            )  # fmt: skip
        found.append(y)
    assert torch.equal(*found) and len(found[0].unique()) > 20


# -- work ------------------------------------------------------------------------------------------------------------

NORM, PRODUCT, WEIGHT, D_NORM = "norm_forward", "linear_residual_kernel", "product_parts_kernel", "norm_backward"
ATTEND, QUERIES, KEYS = "attention_forward_kernel", "attention_queries_kernel", "attention_keys_kernel"
DELTA, MASK, TURN, TURN_BACK = (
    "delta_kernel",
    "mask_gradient_kernel",
    "position_forward_kernel",
    "position_backward_kernel",
)


def kernels(*needed, save="fast", **options):
    """The names of the forward's and the backward's kernels, without those that add partial sums."""
    x, tensors, given = attend_arguments(512, 512, 8, **options)
    needs = [name in needed for name in ("x", *tensors._fields)]
    forward, backward = launches_of_attend(x, tensors, given, save=save, needs=needs)
    names = [[launch.kernel.__name__ for launch in launches] for launches in (forward, backward)]
    return [[name for name in each if name != "sums_kernel"] for each in names]


def test_forward_launches():
    assert kernels()[0] == [NORM, PRODUCT, ATTEND, PRODUCT]
    assert kernels(packed=False)[0] == [NORM, *[PRODUCT] * 3, ATTEND, PRODUCT]
    assert kernels(rotary=True)[0] == [NORM, PRODUCT, TURN, ATTEND, PRODUCT]
    assert kernels(norm=None)[0] == [PRODUCT, ATTEND, PRODUCT]


def test_frozen_subsets():
    x = [PRODUCT, DELTA, QUERIES, KEYS, PRODUCT, D_NORM]
    assert kernels("x")[1] == x
    lay = "side_by_side_kernel"  # dq where q was, which is read until dk and dv are there
    assert kernels("x", save="lean")[1] == [PRODUCT, NORM, PRODUCT, DELTA, QUERIES, KEYS, lay, PRODUCT, D_NORM]
    assert kernels("x", rotary=True)[1] == [PRODUCT, TURN, DELTA, QUERIES, KEYS, TURN_BACK, PRODUCT, D_NORM]
    assert kernels("w_q")[1] == [PRODUCT, NORM, DELTA, QUERIES, KEYS, WEIGHT]
    assert kernels("w_q", packed=False)[1] == [PRODUCT, NORM, DELTA, QUERIES, WEIGHT]
    assert kernels("w_v", packed=False)[1] == [PRODUCT, NORM, DELTA, KEYS, WEIGHT]
    assert kernels("attn_mask")[1] == [PRODUCT, DELTA, MASK]
    assert kernels("w_out")[1] == [WEIGHT]
    assert kernels("b_out")[1] == [D_NORM]
    assert kernels("x", "w_q", "w_out")[1] == [WEIGHT, PRODUCT, DELTA, QUERIES, KEYS, PRODUCT, D_NORM, WEIGHT]


def test_nothing_is_transposed():
    """The attention kernels read q, k and v, and write their gradients, side by side as the products have them."""
    forward, backward = launches_of_attend(*attend_arguments(512, 512, 8))
    q, k, v = forward[2].arguments[:3]
    dq = next(launch for launch in backward if launch.kernel.__name__ == QUERIES).arguments[6]
    assert [t.stride(0) for t in (q, k, v, dq)] == [3 * 512] * 4 and k.storage_offset() == 512


def test_refusals(device):
    x, w = torch.zeros(2, 4, dtype=torch.float64, device=device), torch.zeros(12, 4, dtype=torch.float64, device=device)
    with macaron_ops.use_backend("triton"):
        with pytest.raises(macaron_ops.BackendError, match="not x in torch.float64 with weights in torch.float64"):
            macaron_ops.attend_step(x, w, None, w[:4], None, 1)
        x, w = torch.zeros(2, 4, device=device), torch.zeros(3 * 257, 4, device=device)
        with pytest.raises(macaron_ops.BackendError, match="at most 256 channels, not 257"):
            macaron_ops.attend_step(x, w, None, w[:257].T, None, 1)
