"""Claim: PyTorch's attention inside ``attend_step`` keeps the tolerance rule with its gradients packed in one pass; the
table takes it where it was measured faster and has the options, ``explain`` says so, and a core asked for by name runs
or is an error. In float32 our own scores' gradients sum to zero as exactly as eager's."""

import pytest
import torch
from torch.library import opcheck

import macaron_ops
from macaron_ops import BackendError

core = pytest.importorskip("macaron_ops.kernels.attention_core")

from macaron_ops.kernels import attend_step as kernels  # noqa: E402
from macaron_ops.kernels.device import recording  # noqa: E402
from macaron_ops.kernels.replay import Recorded  # noqa: E402
from macaron_ops.kernels.side_by_side import side_by_side  # noqa: E402
from macaron_ops.kernels.sums import Sum  # noqa: E402
from macaron_ops.ops import run  # noqa: E402
from macaron_ops.ops.registry import _PYTHON, FORWARD  # noqa: E402
from tests.kernels.test_numbers import assert_case_by_rule  # noqa: E402
from tests.kernels.tools import attend_arguments, launches_of_attend  # noqa: E402
from tests.ops.cases import Case, _attend, build  # noqa: E402

TRITON = macaron_ops.backends()["triton"]
pytestmark = pytest.mark.skipif(not TRITON.usable, reason=f"triton: {TRITON.reason}")
CORES = ("cudnn", "flash")


def _turned(randn, head_dim):
    return {"rotary": (randn(70, head_dim // 4), randn(70, head_dim // 4)), "qk_scale": randn(2, head_dim)}


def case(name, **options):
    return Case(macaron_ops.attend_step, name, _attend(32, 2, (2, 70), **options))


PACKED, APART = case("packed", causal=True), case("apart", packed=False, placement="post")
CROSS, TURNED = case("cross", keys=33), case("turned", extras=_turned)


@pytest.fixture(params=CORES)
def a_core(request, device):
    if request.param == "cudnn" and device.type == "cpu":
        pytest.skip("cuDNN has no attention for the CPU")
    with core.use_core(request.param):
        yield request.param


@pytest.mark.parametrize(
    ("case", "dtype", "save"),
    [
        (PACKED, torch.bfloat16, "fast"),
        (APART, torch.float16, "lean"),
        (CROSS, torch.bfloat16, "lean"),
        (TURNED, torch.float16, "fast"),
    ],
    ids=str,
)
def test_rule(case, dtype, save, a_core, device):
    assert_case_by_rule(case, dtype, device, save=save)


def test_opcheck(a_core, device):
    """What is kept has the shape that the table says."""
    args, kwargs = build(PACKED, torch.bfloat16, device)
    bound = macaron_ops.attend_step.bind(*args, **kwargs)
    inputs = (bound.x, *bound.tensors, *bound.options, "lean")
    opcheck(FORWARD["triton", "attend_step"], inputs, test_utils=("test_schema", "test_faketensor"))


def test_compiles_without_a_graph_break(a_core, device):
    torch.compiler.reset()
    args, kwargs = build(PACKED, torch.bfloat16, device)
    args[0].requires_grad_()
    with macaron_ops.use_backend("triton"):
        expected = macaron_ops.attend_step(*args, **kwargs)
        compiled = torch.compile(macaron_ops.attend_step, fullgraph=True, backend="aot_eager")(*args, **kwargs)
    gradients = [torch.autograd.grad(y.float().sum(), args[0])[0] for y in (compiled, expected)]
    assert torch.equal(compiled, expected)
    torch.testing.assert_close(*gradients)


@pytest.mark.gpu
def test_in_a_graph(a_core, device):
    """Captured, forward and backward, after a warm-up on a stream of its own."""
    args, kwargs = build(PACKED, torch.bfloat16, device)
    args[0].requires_grad_()

    def call():
        y = macaron_ops.attend_step(*args, **kwargs)
        return y.detach(), torch.autograd.grad(y.float().sum(), args[0])[0]

    with macaron_ops.use_backend("triton"):
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = call()
        with torch.no_grad():
            args[0].mul_(2.0)
        graph.replay()
        expected = call()
    for actual, wanted in zip(captured, expected, strict=True):
        torch.testing.assert_close(actual, wanted)


# -- the choice ------------------------------------------------------------------------------------------------------


def chosen(architecture="sm90", **options):
    """The table's core and reason for heads of 64."""
    with recording(architecture, 132):
        return core.choose(*attend_arguments(1024, 512, 8, **{"mask": None, **options}))


def test_table():
    assert chosen().name == "cudnn" and "measured" not in chosen().why and "H200" in chosen().why
    assert chosen("sm80") == ("triton", "none was measured to be faster on sm80 in heads of 64")
    assert chosen(mask=(1, 1)) == ("triton", "cudnn: masks and packed sequences are ours alone")
    assert chosen(dropout=0.1) == ("triton", "cudnn: the masks of attention_dropout are ours alone")
    assert chosen(dtype=torch.float32) == ("triton", "cudnn: it runs bfloat16 and float16, not torch.float32")
    with core.use_core("flash"):
        assert chosen() == ("flash", "asked for")
        with pytest.raises(RuntimeError, match="'flash' was asked for, but masks and packed sequences are ours alone"):
            chosen(mask=(1, 1))


def test_deterministic_algorithms_keep_ours():
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        assert chosen() == ("triton", "torch.use_deterministic_algorithms asks for the same bits every time")
    finally:
        torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize("name", core.CORES)
@pytest.mark.parametrize("tokens", [2, 70])
def test_what_is_kept_tells_the_core(name, tokens):
    x, tensors, options = attend_arguments(tokens, 512, 8, mask=None)
    with recording("sm90", 132), core.use_core(name):
        _, saved, _ = kernels.forward(x, tensors, options, "lean")
        assert saved.statistics.shape == kernels.saved_shapes(x, tensors, options, "lean").statistics[0]
    assert core.core_of(saved.statistics, tokens) == name


def test_explain_and_refusals():
    args, kwargs = build(case("grouped", kv_heads=1), torch.bfloat16)
    with macaron_ops.use_backend("triton"):
        assert "attention core 'triton': none was measured" in str(
            macaron_ops.explain(PACKED.operator, *args, **kwargs)
        )
        with core.use_core("flash"), pytest.raises(BackendError, match="'flash' was asked for, but heads that share"):
            macaron_ops.attend_step(*args, **kwargs)
    with pytest.raises(ValueError, match="expected one of 'triton', 'cudnn', 'flash'; got 'xformers'"):
        core.use_core("xformers").__enter__()


def test_the_environment_is_checked(monkeypatch):
    monkeypatch.setattr(core, "_asked_for", "xformers")
    with pytest.raises(ValueError, match="MACARON_OPS_ATTENTION: expected one of triton, cudnn, flash; got 'xformers'"):
        chosen()


def test_a_plan_follows_the_choice():
    run.forget()
    args, kwargs = build(PACKED, torch.bfloat16)
    bound = macaron_ops.attend_step.bind(*args, **kwargs)
    again, call = Recorded(_PYTHON["triton", "attend_step"]), (bound.x, *bound.tensors, *bound.options, "lean")
    kept = []
    for name in ("triton", "flash", "triton"):
        with torch.no_grad(), core.use_core(name):
            kept.append(core.core_of(again(*call)[5], 70))
    assert kept == ["triton", "flash", "triton"]


# -- packing ---------------------------------------------------------------------------------------------------------


def backward_of(*needed, **options):
    """The names of the backward's kernels around cuDNN's."""
    x, tensors, given = attend_arguments(1024, 512, 8, mask=None, **options)
    needs = [name in needed for name in ("x", *tensors._fields)]
    with core.use_core("cudnn"):
        return [launch.kernel.__name__ for launch in launches_of_attend(x, tensors, given, needs=needs)[1]]


def test_one_pass_packs_and_sums():
    product, pack, norm = "linear_residual_kernel", "side_by_side_kernel", "norm_backward"
    weight = ["product_parts_kernel", "sums_kernel"]
    assert backward_of("x", "w_q", "b_q") == [product, pack, product, norm, *weight]
    assert backward_of("w_k", packed=False) == [product, "norm_forward", *weight]
    turned = ["position_backward_kernel"] * 2
    assert backward_of("x", rotary=True) == [product, "position_forward_kernel", pack, *turned, product, norm]


@pytest.mark.parametrize("widths", [(320, 320, 320), (24, 8), (5,)])
def test_side_by_side(widths, device):
    """Bit for bit a concatenation, in columns of a wider matrix, and its sums."""
    parts = [torch.randn(75, width, device=device).to(torch.bfloat16) for width in widths]
    wide = torch.full((75, sum(widths) + 3), 7.0, dtype=torch.bfloat16, device=device)
    sums = side_by_side([parts], wide[:, 3:], Sum(torch.float32))
    assert torch.equal(wide[:, 3:], torch.cat(parts, 1)) and (wide[:, :3] == 7.0).all()
    torch.testing.assert_close(sums, torch.cat(parts, 1).float().sum(0))
