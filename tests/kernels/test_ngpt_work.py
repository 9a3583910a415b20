"""Claim: an nGPT layer launches as many row kernels as a plain pre-norm layer: a step on the sphere stands where a norm
did, and rotary, unit queries and keys and their scale are one kernel, as rotary alone is."""

import collections

import pytest
import torch

import macaron_ops
from macaron_ops import attend_step, ffn_step, split_layer, substep
from macaron_ops.nn import NGPTLayer

TRITON = macaron_ops.backends()["triton"]
pytestmark = pytest.mark.skipif(
    not TRITON.usable or torch.cuda.is_available(), reason=f"triton: {TRITON.reason}"
)  # the tensors are the CPU's, which recorded launches do not read
WIDTH, HIDDEN, HEADS, TOKENS = 512, 512, 8, 512  # wider than rows that an epilogue normalises
NO_ROWS = ("linear_", "hidden_", "product_", "attention_", "sums_")


def launches(layer, parameters):
    """Of ``(forward, backward)`` the row kernels by name, with how often each is launched."""
    from macaron_ops.kernels.device import recording

    x = torch.zeros(4, TOKENS, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    with macaron_ops.use_backend("triton"):
        with recording("sm90", 132) as forward:
            y = layer(x)
        with recording("sm90", 132) as backward:
            torch.autograd.grad(y, [x, *parameters], torch.zeros_like(y))
    names = ([launch.kernel.__name__ for launch in found] for found in (forward, backward))
    return [collections.Counter(n for n in found if not n.startswith(NO_ROWS)) for found in names]


@pytest.mark.parametrize("save", ["fast", "lean"])
def test_no_residual_is_read_where_its_scale_is_0(save):
    """Neither x nor, where it comes back to x, dy: an nGPT layer adds them in its steps on the sphere."""
    from macaron_ops.kernels.device import recording

    layer = NGPTLayer(WIDTH, HEADS, HIDDEN, save=save, dtype=torch.bfloat16)
    x = torch.zeros(4, TOKENS, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    with macaron_ops.use_backend("triton"), recording("sm90", 132) as found:
        torch.autograd.grad(layer(x, angles()), [x, *layer.parameters()], torch.zeros_like(x))
    sums = [launch for launch in found if launch.kernel.__name__ == "linear_residual_kernel"]
    residual = sums[0].kernel.arg_names.index("x")
    assert len(sums) >= 6 and all(launch.arguments[residual] is None for launch in sums)


def angles():
    return tuple(torch.zeros(TOKENS, WIDTH // HEADS // 2, dtype=torch.bfloat16) for _ in range(2))


def plain(save):
    shapes = (3 * WIDTH, WIDTH), (WIDTH, WIDTH), (2 * HIDDEN, WIDTH), (WIDTH, HIDDEN), (WIDTH,), (WIDTH,)
    parameters = [torch.zeros(shape, dtype=torch.bfloat16, requires_grad=True) for shape in shapes]
    w_qkv, w_out, w_in, w_down, before, between = parameters
    steps = [
        substep(attend_step, w_qkv, None, w_out, None, HEADS, norm_weight=before, rotary=angles(), causal=True),
        substep(ffn_step, w_in, None, w_down, None, norm_weight=between, activation="swiglu"),
    ]
    return launches(lambda x: split_layer(x, steps, save=save), parameters)


def ngpt(save):
    layer = NGPTLayer(WIDTH, HEADS, HIDDEN, save=save, dtype=torch.bfloat16)
    return launches(lambda x: layer(x, angles()), list(layer.parameters()))


@pytest.mark.parametrize("save", ["fast", "lean"])
def test_row_kernels(save):
    norms = {"fast": 0, "lean": 2}[save]  # N(x) again, which q, k and v, and z, are formed from
    turn, back = {"position_forward_kernel": 1}, {"delta_kernel": 1, "position_backward_kernel": 1}
    forward, backward = plain(save)
    assert forward == {"norm_forward": 2, **turn}
    assert backward == collections.Counter({"norm_forward": norms, "norm_backward": 2, **turn, **back})
    forward, backward = ngpt(save)
    assert forward == {"step_forward": 2, **turn}
    assert backward == {"step_backward": 2, **turn, **back}
