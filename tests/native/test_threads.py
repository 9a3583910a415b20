"""Claim: torch's number of threads decides who computes, never what; calls from several Python threads do not meet."""

import threading

import pytest
import torch

import macaron_ops
from macaron_ops import native
from tests.ops.cases import CASES, build
from tests.ops.test_numbers import leaves_of

pytestmark = pytest.mark.skipif(native.library() is None, reason=f"the native backend: {native.why_not_loaded()}")


@pytest.fixture
def threads():
    """Sets torch's threads, and sets them back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def ffn(tokens, dtype=torch.float32):
    x = torch.randn(tokens, 48)
    w = torch.randn(520, 48) / 7, torch.randn(520), torch.randn(48, 520) / 23, torch.randn(48)
    return macaron_ops.ffn_step, [t.to(dtype) for t in (x, *w)], {"activation": "gelu"}


def attend(tokens, dtype=torch.float32):
    x = torch.randn(3, tokens, 48)
    w = torch.randn(144, 48) / 7, torch.randn(144), torch.randn(48, 48) / 7, torch.randn(48)
    return macaron_ops.attend_step, [*(t.to(dtype) for t in (x, *w)), 4], {"causal": tokens % 2 == 0}


def sphere(n, d):
    x = torch.nn.functional.normalize(torch.randn(2, n, d), dim=-1)
    return macaron_ops.sphere_attend_step, [x, 0.3, 2.0], {}


CALLS = {
    **{f"ffn-{n}": lambda n=n: ffn(n) for n in (1, 33, 64, 300)},
    **{f"ffn-bfloat16-{n}": lambda n=n: ffn(n, torch.bfloat16) for n in (33, 300)},
    **{f"attend-{n}": lambda n=n: attend(n) for n in (1, 33, 150)},
    "attend-bfloat16": lambda: attend(70, torch.bfloat16),
    "sphere-small": lambda: sphere(301, 3),
    "sphere-large": lambda: sphere(133, 40),
    "normalize": lambda: (macaron_ops.normalize_step, [torch.randn(99, 24), torch.randn(99, 24), 0.3], {}),
}


@pytest.mark.parametrize("make", CALLS.values(), ids=CALLS)
def test_the_output_is_the_same_to_the_last_bit(make, threads):
    operator, args, kwargs = make()
    outputs = []
    for count in (1, 2, 3, 5):
        threads(count)
        with macaron_ops.use_backend("native"):
            outputs.append(operator(*args, **kwargs))
    assert all(torch.equal(outputs[0], other) for other in outputs[1:])


def test_python_threads_get_what_they_get_alone():
    calls = [(case, build(case, torch.float32, seed=i)) for i, case in enumerate(CASES) if case.name != "empty-batch"]
    expected, found, errors = {}, {}, []

    def work(results, order):
        try:
            for i in order:
                case, (args, kwargs) = calls[i]
                args = tuple(a.detach().clone() if isinstance(a, torch.Tensor) else a for a in args)
                x = args[0].requires_grad_()
                y = case.operator(x, *args[1:], **kwargs)
                results[threading.get_ident(), i] = y.detach(), *torch.autograd.grad(y.sum(), x)
        except Exception as error:  # shown by the assertion below; a thread's own traceback would be lost
            errors.append(error)

    work(expected, range(len(calls)))
    alone = {i: result for (_, i), result in expected.items()}
    orders = [range(len(calls)), reversed(range(len(calls))), range(len(calls))]
    workers = [threading.Thread(target=work, args=(found, order)) for order in orders]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not errors and len(found) == 3 * len(calls)
    for (_, i), results in found.items():
        for ours, theirs in zip(results, alone[i], strict=True):
            assert torch.equal(ours, theirs), calls[i][0]


def test_other_python_threads_run_meanwhile():
    """While one call computes, another thread counts: under a held lock it could not count at all."""
    operator, args, kwargs = sphere(20000, 3)
    inside, counted, done = threading.Event(), 0, threading.Event()

    def compute():
        inside.set()
        operator(*args, **kwargs)
        done.set()

    worker = threading.Thread(target=compute)
    worker.start()
    inside.wait()
    while not done.is_set():
        counted += 1
    worker.join()
    assert counted > 1000  # the interpreter's own switches, every 5 ms, would allow a handful


def test_memory_stays_where_it_is():
    """Scratch is given back: what is in use after a call is what was before."""
    operator, args, kwargs = ffn(300)
    leaves = [t.requires_grad_() for t in leaves_of(tuple(args), kwargs)]
    for _ in range(3):
        torch.autograd.grad(operator(*args, **kwargs).sum(), leaves)
    torch.ops.macaron_ops_cpu.scratch_peak()
    assert torch.ops.macaron_ops_cpu.scratch_peak() == 0
