"""Claim: every operator of the CUDA library can be captured in a CUDA graph, forward and backward, and its replay
computes anew, with the same bits, from what its tensors hold then. Without a GPU a stand-in replays the operators that
were called, with the same arguments, and refuses those that hand a number to Python: the code around the kernels is
proved there."""

import pytest
import torch
from torch._C import DispatchKey, DispatchKeySet
from torch.utils._python_dispatch import TorchDispatchMode

import macaron_ops
from macaron_ops.native.cuda import library
from macaron_ops.native.cuda.norm_rows import norm_rows, norm_rows_backward

F32, BF16 = torch.float32, torch.bfloat16


class Replay(TorchDispatchMode):
    """What a graph does, on the CPU: the calls of a block of code, done again on the same tensors."""

    WAITS = ("item", "is_nonzero", "_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2")

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, op, types, arguments=(), options=None):
        if op.namespace == "macaron_ops":  # an operator of the package is several calls: looks into it
            with self:
                return op.redispatch(DispatchKeySet(DispatchKey.CPU), *arguments, **options or {})
        if op.overloadpacket.__name__ in self.WAITS:
            raise RuntimeError(f"{op} waits for the GPU, which a capture does not allow")
        found = op(*arguments, **options or {})
        self.calls.append((op, arguments, options or {}, found))
        return found

    def replay(self):
        for op, arguments, options, found in self.calls:
            again = op(*arguments, **options)
            pairs = zip(found, again, strict=True) if isinstance(found, (tuple, list)) else [(found, again)]
            for old, new in pairs:
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.detach().copy_(new.detach())


def captured(step, device):
    """What replays ``step``, and its results, whose memory a replay writes."""
    if device.type == "cpu":
        graph = Replay()
        with graph:
            return graph, step()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    return graph, found


def of_operator(operator, **options):
    """y and every gradient, from the tensors of a call, the last of which is the gradient of y."""

    def step(*tensors):
        *leaves, grad = (t.detach().requires_grad_() for t in tensors)
        y = operator(*leaves, **options)
        return [y.detach(), *torch.autograd.grad(y, leaves, grad.detach())]

    return step


def of_rows(norm):
    """The norm of a sum, with the gradient that joins it behind."""

    def step(x, z, weight, bias, grad, residual):
        n, s = norm_rows(x, z, norm, weight, bias, 1e-5, residual_scale=0.5, step=1.5, keep_sum=True)
        needs = (True, True, True)
        return [n, s, *norm_rows_backward(grad, s, norm, weight, 1e-5, needs, residual=residual, residual_scale=0.5)]

    return step


def rows(count, width):
    return [(count, width), (count, width), (width,), (width,), (count, width), (count, width)]


def ffn(count, width, hidden):
    return [(count, width), (hidden, width), (hidden,), (width, hidden), (width,), (count, width)]


def moves(x, u, step, **options):
    return macaron_ops.normalize_step(x, u, step, **options)


def attends(x, step, beta, query, key, value, **options):
    return macaron_ops.sphere_attend_step(x, step, beta, query=query, key=key, value=value, **options)


POINTS = (2, 150, 3)
# name -> its step, the shapes of its tensors, their dtype.
STEPS = {
    **{f"norm_rows {norm}": (of_rows(norm), rows(70, 40), BF16) for norm in ("layer", "rms", "sphere")},
    "norm_rows, a block a row": (of_rows("layer"), rows(9, 1032), F32),
    "normalize_step": (of_operator(moves), [(70, 12), (70, 12), (12,), (70, 12)], F32),
    "normalize_step, a block a row": (of_operator(moves), [(5, 1100), (5, 1100), (), (5, 1100)], F32),
    "sphere_attend_step": (of_operator(attends), [POINTS, (3,), (), POINTS, POINTS, POINTS, POINTS], F32),
    "sphere_attend_step unnormalized": (
        of_operator(attends, weighting="unnormalized", causal=True),
        [POINTS, (), (), POINTS, POINTS, POINTS, POINTS],
        F32,
    ),
    "ffn_step, one kernel": (of_operator(macaron_ops.ffn_step, norm="layer"), ffn(70, 64, 72), BF16),
    **{
        f"ffn_step, by CUTLASS, {activation}": (
            of_operator(macaron_ops.ffn_step, norm="rms", activation=activation),
            ffn(70, 264, 136),
            BF16,
        )
        for activation in ("relu", "gelu")
    },
}


def drawn(name, device, seed):
    generator = torch.Generator().manual_seed(seed)
    _, shapes, dtype = STEPS[name]
    return [(0.5 * torch.randn(shape, generator=generator)).to(device, dtype) for shape in shapes]


@pytest.mark.parametrize("name", STEPS)
def test_cuda_graph(name, device):
    if "CUTLASS" in name and (why := library.why_not_wgmma(device)):
        pytest.skip(why)
    tensors, others = (drawn(name, device, seed) for seed in (0, 1))

    def step():
        with macaron_ops.use_backend("cuda"):
            return STEPS[name][0](*tensors)

    graph, found = captured(step, device)
    if device.type == "cpu":
        assert any(op.namespace == "macaron_ops_cuda" for op, *_ in graph.calls)
    for tensor, other in zip(tensors, others, strict=True):
        tensor.copy_(other)
    expected = step()
    assert not any(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    graph.replay()
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_what_hands_a_number_to_python_is_not_replayed():
    with pytest.raises(RuntimeError, match="waits for the GPU"):
        captured(lambda: torch.zeros(3).sum().item(), torch.device("cpu"))
