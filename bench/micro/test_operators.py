"""Each operator at each quick shape: eager form and every usable backend, forward and forward+backward.

    pytest bench/micro                                        everything
    pytest bench/micro -k "ffn_step and native"               one operator, one backend
    pytest bench/micro --benchmark-save=before                then, after a change,
    pytest bench/micro --benchmark-compare --benchmark-compare-fail=median:10%

On a CUDA device a call ends with a synchronisation, so what is timed is the call as a program waits for it.
"""

import pytest
import torch

from macaron_ops.bench.group import PRODUCTS
from macaron_ops.bench.options import Options
from macaron_ops.bench.suites import ops

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GROUPS = ops.groups(Options(device=DEVICE, effort="quick", compile=False))
CALLS = [(group, name) for group in GROUPS for name in group.names if name != PRODUCTS]


@pytest.mark.parametrize(
    ("group", "name"),
    [pytest.param(*call, id=f"{call[0].subject} {call[0].dtype} {call[0].direction} {call[1]}") for call in CALLS],
)
def test_operator(benchmark, group, name):
    (variant,) = group.build([name])
    ready = variant.prepare()
    variant.check(ready.call())

    def call():
        result = ready.call()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize(DEVICE)
        return result

    benchmark.group = f"{group.subject} {group.dtype} {group.direction}"
    benchmark(call)
