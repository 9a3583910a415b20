"""Claim: a call costs the host a bounded number of function calls beside the kernels: the third of a kind is not
checked, dispatched and planned again."""

import pytest
import torch

import macaron_ops
from macaron_ops.bench.host import Cost, calls

# Calls by Python, with Python 3.11 to 3.14 and torch 2.11 and later; planning a call anew takes 140 to 530.
LIMITS = {
    "triton": {
        "ffn_step, D=16, no gradient": 85,
        "ffn_step, D=16, a gradient to come": 115,
        "ffn_step, D=96, no gradient": 95,
        "ffn_step, D=96, a gradient to come": 125,
        "ffn_step, D=1024, no gradient": 97,
        "ffn_step, D=1024, a gradient to come": 127,
        "normalize_step, no gradient": 60,
        "normalize_step, a gradient to come": 75,
    },
    "native": {
        "ffn_step, D=16, no gradient": 62,
        "ffn_step, D=16, a gradient to come": 92,
        "normalize_step, no gradient": 42,
        "normalize_step, a gradient to come": 57,
        "attend_step, no gradient": 54,
        "attend_step, a gradient to come": 80,
    },
}


@pytest.mark.parametrize("backend", LIMITS)
def test_calls(backend):
    status = macaron_ops.backends()[backend]
    if not status.usable or torch.cuda.is_available():  # the cases are the CPU's
        pytest.skip(status.reason)
    with calls(backend) as those:
        found = {name: Cost.of(those[name]).calls for name in LIMITS[backend]}
    assert {name: count for name, count in found.items() if count > LIMITS[backend][name]} == {}


def test_what_is_counted():
    def call():
        len(str(abs(-1)))  # len and abs: a class is no function

    assert Cost.of(call) == Cost.of(call)
    assert Cost.of(call).calls == 2
    assert Cost.of(lambda: None).bytecodes < Cost.of(call).bytecodes < 40
