"""Claim: a call launches the kernels that it needs and no others, seen without running one."""

import pytest
import torch

import macaron_ops
from tests.kernels.tools import NEEDS, ffn_arguments, launches_of_ffn

TRITON = macaron_ops.backends()["triton"]
pytestmark = pytest.mark.skipif(not TRITON.usable, reason=f"triton: {TRITON.reason}")
NAMES = ("x", "w_in", "b_in", "w_out", "b_out", "norm_weight", "norm_bias", "seed")
NORM, HIDDEN, OUT, PARTS = "norm_forward", "hidden_forward_kernel", "linear_residual_kernel", "product_parts_kernel"
D_HIDDEN, D_NORM, AGAIN, SUMS = "hidden_backward_kernel", "norm_backward", "hidden_again_kernel", "sums_kernel"


def kernels(launches):
    return [launch.kernel.__name__ for launch in launches]


def backward_of(*needed, save="fast", **options):
    call = ffn_arguments(512, 256, 1024, torch.bfloat16, **options)
    return kernels(launches_of_ffn(*call, save=save, needs=[name in needed for name in NAMES])[1])


def test_forward():
    wide = launches_of_ffn(*ffn_arguments(512, 256, 1024, torch.bfloat16))[0]
    assert kernels(wide) == [NORM, HIDDEN, OUT]
    post = launches_of_ffn(*ffn_arguments(512, 256, 1024, torch.bfloat16, placement="post"))[0]
    assert kernels(post) == [HIDDEN, OUT]
    wider = launches_of_ffn(*ffn_arguments(512, 512, 1024, torch.bfloat16, placement="post"))[0]
    assert kernels(wider) == [HIDDEN, OUT, NORM]
    for options in ({}, {"placement": "post", "dropout": 0.1}, {"activation": "swiglu"}):
        narrow = launches_of_ffn(*ffn_arguments(512, 128, 512, torch.bfloat16, **options))[0]
        assert kernels(narrow) == ["narrow_ffn_kernel"]


def test_backward():
    everything = backward_of(*NAMES[:-1])
    assert everything == [D_HIDDEN, PARTS, OUT, D_NORM, PARTS, SUMS]  # D_NORM sums db_out and writes n too
    assert backward_of(*NAMES[:-1], save="lean") == [NORM, HIDDEN, *everything]
    assert backward_of(*NAMES[:-1], dropout=0.1) == [D_NORM, *everything]
    assert backward_of(*NAMES[:-1], placement="post") == [D_NORM, D_HIDDEN, PARTS, OUT, PARTS, SUMS]


def test_the_parts_of_a_weights_gradient_do_not_wait():
    """They are as large as the activations; what waits goes with them."""
    call = ffn_arguments(16384, 512, 1024, torch.bfloat16)
    cut = [D_HIDDEN, PARTS, SUMS, OUT, D_NORM, PARTS, SUMS]
    assert kernels(launches_of_ffn(*call)[1]) == cut


def test_frozen_subsets():
    assert backward_of("x") == [D_HIDDEN, OUT, D_NORM]
    assert backward_of("x", norm=None) == [D_HIDDEN, OUT]
    assert backward_of("w_in") == [NORM, D_HIDDEN, PARTS]
    assert backward_of("b_in") == [D_HIDDEN, SUMS]
    assert backward_of("w_out") == [AGAIN, PARTS]
    assert backward_of("w_out", save="lean") == [NORM, HIDDEN, PARTS]
    assert backward_of("b_out") == [D_NORM, SUMS]
    assert backward_of("b_out", save="lean") == [D_NORM, SUMS]
    assert backward_of("norm_bias") == [D_HIDDEN, OUT, D_NORM, SUMS]
    assert backward_of("norm_bias", placement="post") == [D_NORM, SUMS]


def test_unneeded_outputs_are_not_written():
    (_, z_of_inference, *_), _ = _hidden(save="lean")
    assert z_of_inference is None
    _, by_launch = launches_of_ffn(
        *ffn_arguments(512, 256, 1024, torch.bfloat16), needs=[name == "x" for name in NAMES]
    )
    h, sums = by_launch[0].arguments[4:6]
    assert h is None and sums is None


def _hidden(save):
    forward, _ = launches_of_ffn(*ffn_arguments(512, 256, 1024, torch.bfloat16), save=save)
    _, _, b, z, h = forward[1].arguments[:5]
    return (b, z, h), forward


def test_many_tokens_give_nearly_every_processor_a_program():
    for launches in launches_of_ffn(*ffn_arguments(16384, 1024, 4096, torch.bfloat16), needs=NEEDS):
        assert all(launch.programs >= 128 for launch in launches if launch.kernel.__name__ != SUMS)


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_two_programs_of_the_first_product_share_a_processor(activation, dropout):
    """One multiplies while the other is in its epilogue, dropout's too; backward neither it nor a gate leaves room."""
    call = ffn_arguments(16384, 1024, 4096, torch.bfloat16, activation, dropout=dropout)
    forward, backward = launches_of_ffn(*call, needs=NEEDS)
    (hidden,) = (launch for launch in forward if launch.kernel.__name__ == HIDDEN)
    assert hidden.constants["maxnreg"] == 128 and hidden.programs == 2 * 132
    assert not dropout or hidden.constants["SLICES"] == (4 if activation == "swiglu" else 8)
    (d_hidden,) = (launch for launch in backward if launch.kernel.__name__ == D_HIDDEN)
    assert ("maxnreg" in d_hidden.constants) == (activation == "gelu" and not dropout)


@pytest.mark.parametrize("placement", ["pre", "post"])
@pytest.mark.parametrize("tokens", [1, 60])
def test_few_tokens(tokens, placement):
    """The long sums of a few tokens are cut in parts, and the pass that adds them is the epilogue, the norm too; the
    gradient of a weight is a short sum then, and is not cut."""
    call = ffn_arguments(tokens, 1024, 4096, torch.bfloat16, placement=placement)
    forward, backward = launches_of_ffn(*call, needs=NEEDS)
    end = [HIDDEN, PARTS, "residual_of_parts_kernel"]
    assert kernels(forward) == ([NORM, *end] if placement == "pre" else end)
    assert forward[-2].programs == 128 and not forward[-2].constants["PERSISTENT"]
    ends = {"pre": [*end[1:], D_NORM, PARTS, SUMS], "post": [*end[1:], PARTS, SUMS]}
    assert kernels(backward)[-len(ends[placement]) :] == ends[placement]
    gradients = [launch.arguments[2] for launch in backward if launch.kernel.__name__ == PARTS]
    assert [out.shape[0] for out in gradients] == [1, 8, 1]


def test_a_small_gradient_over_many_tokens_is_cut_in_parts():
    _, backward = launches_of_ffn(*ffn_arguments(16384, 128, 512, torch.bfloat16))
    out = next(launch for launch in backward if launch.kernel.__name__ == PARTS).arguments[2]
    assert out.shape[0] > 1 and out.dtype == torch.float32


def test_float32_products_are_left_to_cublas_unless_asked_for():
    from macaron_ops.kernels.ffn_step import slower
    from macaron_ops.ops.dispatch import Request

    for width, dtype, declined in ((256, torch.float32, True), (64, torch.float32, False), (256, torch.float16, False)):
        request = Request("ffn_step", *ffn_arguments(8, width, 32, dtype), "fast")
        assert (slower(request) is not None) == declined


def test_refusals(device):
    x, w = (torch.zeros(*shape, dtype=torch.float64, device=device) for shape in ((2, 4), (4, 4)))
    with macaron_ops.use_backend("triton"):
        with pytest.raises(macaron_ops.BackendError, match="not x in torch.float64 with weights in torch.float64"):
            macaron_ops.ffn_step(x, w, None, w, None)
        with pytest.raises(macaron_ops.BackendError, match="not torch.float64"):
            macaron_ops.normalize_step(x, x, 0.5)
        long = torch.zeros(1, 65537, device=device)
        with pytest.raises(macaron_ops.BackendError, match="at most 65536 channels, not 65537"):
            macaron_ops.normalize_step(long, long, 0.5)
