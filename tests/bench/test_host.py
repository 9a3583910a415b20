"""Claim: a call costs the host a bounded number of function calls beside the kernels: the third of a kind is not
checked, dispatched and planned again."""

import pytest
import torch

import macaron_ops
from macaron_ops.bench.host import WARM, Cost, bare, calls

# Calls by Python, with Python 3.11 to 3.14 and torch 2.11 and later; planning a call anew takes 140 to 530.
LIMITS = {
    "triton": {
        "ffn_step, D=16, no gradient": 81,
        "ffn_step, D=16, a gradient to come": 84,
        "ffn_step, D=96, no gradient": 93,
        "ffn_step, D=96, a gradient to come": 96,
        "ffn_step, D=1024, no gradient": 103,
        "ffn_step, D=1024, a gradient to come": 108,
        "ffn_step, D=1024, forward and backward": 370,
        "normalize_step, no gradient": 57,
        "normalize_step, a gradient to come": 61,
        "normalize_step, forward and backward": 205,
        "attend_step, no gradient": 101,
        "attend_step, a gradient to come": 102,
        "attend_step, forward and backward": 415,
    },
    "native": {
        "ffn_step, D=16, no gradient": 58,
        "ffn_step, D=16, a gradient to come": 62,
        "ffn_step, D=16, forward and backward": 150,
        "normalize_step, no gradient": 38,
        "normalize_step, a gradient to come": 42,
        "attend_step, no gradient": 50,
        "attend_step, a gradient to come": 54,
        "attend_step, forward and backward": 140,
    },
}


@pytest.mark.parametrize("backend", LIMITS)
def test_calls(backend):
    status = macaron_ops.backends()[backend]
    if not status.usable or torch.cuda.is_available():  # the cases are the CPU's
        pytest.skip(status.reason)
    with calls(backend) as (those, _):
        found = {name: Cost.of(those[name]).calls for name in LIMITS[backend]}
    assert {name: count for name, count in found.items() if count > LIMITS[backend][name]} == {}


def test_bare(monkeypatch):
    """The buffers and launches of a call, which are as many each time, and no argument."""
    if not macaron_ops.backends()["triton"].usable or torch.cuda.is_available():
        pytest.skip("the cases are the CPU's")
    with calls("triton") as (those, launches):
        call = those["ffn_step, D=1024, no gradient"]
        for _ in range(WARM):
            call()
        alone = bare(call, launches)
        launches.clear()
        sizes = []
        monkeypatch.setattr(torch, "empty", lambda size, **_: sizes.append(size))
        alone()
    kernels = [launch.kernel.__name__ for launch in launches]
    assert kernels == ["norm_forward", "hidden_forward_kernel", "linear_residual_kernel"]
    assert sorted(sizes) == [3840 * 1024, 3840 * 1024, 3840 * 4096]  # N(x) and y, h


def test_what_is_counted():
    def call():
        len(str(abs(-1)))  # len and abs: a class is no function

    assert Cost.of(call) == Cost.of(call)
    assert Cost.of(call).calls == 2
    assert Cost.of(lambda: None).bytecodes < Cost.of(call).bytecodes < 40
