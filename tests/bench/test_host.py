"""Claim: a call costs the host a bounded number of function calls beside the kernels: the third of a kind is not
checked, dispatched and planned again."""

import functools

import pytest
import torch

import macaron_ops
from macaron_ops.bench.host import WARM, Cost, bare, calls, over_bare

# Calls by Python, with Python 3.11 to 3.14 and torch 2.11 and later, Triton's over the bare launches; planning a call
# anew takes 140 to 530.
LIMITS = {
    "triton": {
        "ffn_step, D=16, no gradient": 74,
        "ffn_step, D=16, a gradient to come": 76,
        "ffn_step, D=96, no gradient": 72,
        "ffn_step, D=96, a gradient to come": 74,
        "ffn_step, D=1024, no gradient": 70,
        "ffn_step, D=1024, a gradient to come": 72,
        "ffn_step, D=1024, forward and backward": 255,
        "normalize_step, no gradient": 50,
        "normalize_step, a gradient to come": 54,
        "normalize_step, forward and backward": 190,
        "attend_step, no gradient": 73,
        "attend_step, a gradient to come": 73,
        "attend_step, forward and backward": 315,
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
    with calls(backend) as (those, launches):
        cost = functools.partial(over_bare, launches=launches) if backend == "triton" else Cost.of
        found = {name: cost(those[name]).calls for name in LIMITS[backend]}
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
