"""Claim: whatever shapes, strides, options, dtypes and frozen subsets a call has, the native backend keeps the
tolerance rule in its output and in every gradient."""

import pytest
from hypothesis import HealthCheck, example, given, settings

import macaron_ops
from tests.native.calls import Call, Drawn, check
from tests.native.strategies import attend_calls, ffn_calls, normalize_calls, sphere_calls

NATIVE = macaron_ops.backends()["native"]


def needs(operator):
    return pytest.mark.skipif(not NATIVE.usable or operator not in NATIVE.operators, reason=f"native: {NATIVE.reason}")


anything = settings(
    suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow, HealthCheck.data_too_large]
)


@needs("ffn_step")
@anything
@given(ffn_calls())
def test_ffn_step(call):
    check(call)


# Weights, and values, that are all one number.
EQUAL_TOKENS = Call(
    "attend_step",
    {
        "x": Drawn((47, 6), "normal", "x", layout="expanded"),
        "w_q": Drawn((16, 6), "fan", trained=False),
        "w_k": Drawn((16, 6), "fan", trained=False),
        "w_v": Drawn((16, 6), "fan"),
        "w_out": Drawn((6, 16), "fan"),
    },
    {"norm": "rms", "num_heads": 1, "residual_scale": 0.0},
)

# One query, whose score is a sum of 64 terms.
ONE_QUERY = Call(
    "attend_step",
    {
        "x": Drawn((1, 5), "normal", "x", trained=False),
        "w_q": Drawn((64, 5), "fan", trained=False),
        "w_k": Drawn((64, 33), "fan", trained=False),
        "w_v": Drawn((64, 33), "fan", trained=False),
        "w_out": Drawn((5, 64), "fan"),
        "context": Drawn((13, 33)),
    },
    {"norm": "layer", "num_heads": 1, "scale": 0.3},
)


@needs("attend_step")
@anything
@example(EQUAL_TOKENS)
@example(ONE_QUERY)
@given(attend_calls())
def test_attend_step(call):
    check(call)


@needs("normalize_step")
@anything
@given(normalize_calls())
def test_normalize_step(call):
    check(call)


# Sums of 64 terms whose error a beta of 60 makes the output's largest.
CONCENTRATED = Call(
    "sphere_attend_step",
    {
        "x": Drawn((17, 4), "unit", "x", trained=False),
        "query": Drawn((17, 64), "unit", "x"),
        "key": Drawn((7, 64), "unit", "x", trained=False),
        "value": Drawn((7, 4), "unit", "x", trained=False),
        "step": Drawn((4,), "positive", "x", trained=False, scale=0.5),
    },
    {"beta": 60.0},
)

# A gradient of beta that is one sum of 127 terms, which cancel.
MANY_KEYS = Call(
    "sphere_attend_step",
    {
        "x": Drawn((1, 2), "cap", "x", trained=False),
        "key": Drawn((127, 2), "unit", "x", trained=False),
        "value": Drawn((127, 2), "cap", "x", trained=False),
        "step": Drawn((), "positive", "x", trained=False, scale=0.5),
        "beta": Drawn((), "positive", "x", scale=0.5),
    },
    {"direction": "difference"},
)

# Weights that are all one number, whose sum divides every gradient of a value: in either regime.
EQUAL_KEYS = [
    Call(
        "sphere_attend_step",
        {
            "x": Drawn((1, width), "unit", "x", trained=False),
            "key": Drawn((keys, width), "unit", "x", layout="expanded", trained=False),
            "value": Drawn((keys, width), "unit", "x"),
        },
        {"step": 0.3, "beta": 0.3},
    )
    for keys, width in ((47, 8), (95, 9))
]


@needs("sphere_attend_step")
@anything
@example(CONCENTRATED)
@example(MANY_KEYS)
@example(EQUAL_KEYS[0])
@example(EQUAL_KEYS[1])
@given(sphere_calls())
def test_sphere_attend_step(call):
    check(call)
