"""What is not as right as eager is not timed; memory and products are what they say."""

import pytest
import torch

import macaron_ops
from macaron_ops import native
from macaron_ops.bench import memory, products
from macaron_ops.bench.correctness import WrongResult, Yardstick, ulp
from macaron_ops.bench.flops import PASSES, layer_flops, of_pass
from macaron_ops.bench.presets import TINY

CPU = torch.device("cpu")


@pytest.fixture
def yardstick():
    truth = torch.tensor([1.0, 2.0], dtype=torch.float64)
    return Yardstick.of(["output"], [truth], [torch.tensor([1.0, 2.0 + 2**-20])])


def test_twice_the_eager_error_and_one_ulp_are_allowed(yardstick):
    allowed = 2 * 2**-20 + 2**-22
    assert yardstick.allowed == (allowed,)
    found = yardstick.check([torch.tensor([1.0, 2 + 2**-19])])
    assert found["tensor"] == "output"
    assert found["error"] == 2**-19


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ([1.0, 2.001], "output is off by 1.00e-03"),
        ([1.0, float("nan")], "output is off by nan"),
        ([[1.0, 2.0]], r"output has shape \(1, 2\), expected \(2,\)"),
    ],
)
def test_a_wrong_result_is_named(yardstick, wrong, message):
    with pytest.raises(WrongResult, match=message):
        yardstick.check([torch.tensor(wrong)])


def test_a_foreign_variant_needs_half_the_digits(yardstick):
    found = [torch.tensor([1.0, 2.0003])]
    assert yardstick.check(found, foreign=True)["allowed"] == 2 * torch.finfo(torch.float32).eps ** 0.5
    with pytest.raises(WrongResult):
        yardstick.check(found)
    with pytest.raises(WrongResult, match="sqrt"):
        yardstick.check([torch.tensor([1.0, 2.001])], foreign=True)


def test_a_missing_gradient_is_wrong(yardstick):
    with pytest.raises(WrongResult, match="returned 0 tensors, expected 1: output"):
        yardstick.check([])


def test_ulp_is_that_of_the_largest_value():
    assert ulp(torch.tensor([0.1, -5.0]), torch.float32) == 2**-21
    assert ulp(torch.tensor([1.0]), torch.bfloat16) == 2**-7
    assert ulp(torch.zeros(3), torch.float32) > 0


def test_peak_memory_counts_temporaries_and_kept_memory_does_not():
    def call():
        temporary = torch.ones(1000)
        return temporary + 1

    weighed = memory.weigh(call, call, CPU)
    assert weighed["peak_bytes"] == pytest.approx(8000, abs=64)
    assert weighed["kept_bytes"] == pytest.approx(4000, abs=64)


def test_activation_memory_leaves_out_what_is_returned_whenever_it_was_made():
    def call():
        early = torch.ones(1000)
        temporary = torch.ones(500) + 1  # two at a time
        late = temporary.sum() + torch.ones(2000)
        return early, late

    weighed = memory.weigh(call, None, CPU)
    assert weighed["peak_bytes"] == pytest.approx(4000 + 2000 + 2 * 8000, abs=64)
    assert weighed["activation_bytes"] == pytest.approx(2000 + 8000, abs=64)
    assert weighed["kept_bytes"] is None


def test_scratch_memory_of_native_kernels_is_added_to_the_peaks_alone(monkeypatch):
    monkeypatch.setattr(memory, "_scratch_peak", lambda: 10**6)
    weighed = memory.weigh(lambda: torch.ones(1000), lambda: torch.ones(1000), CPU)
    assert weighed["peak_bytes"] == pytest.approx(10**6 + 4000, abs=64)
    assert weighed["activation_bytes"] == pytest.approx(10**6, abs=64)
    assert weighed["kept_bytes"] == pytest.approx(4000, abs=64)


def test_native_kernels_tell_their_scratch_memory():
    if not native.library():
        pytest.skip(native.why_not_loaded())
    x, w = torch.randn(64, 32), torch.randn(32, 32)
    with macaron_ops.use_backend("native"):
        weighed = memory.weigh(lambda: macaron_ops.ffn_step(x, w, None, w, None), None, CPU)
    assert weighed["peak_bytes"] > x.nbytes
    assert torch.ops.macaron_ops_cpu.scratch_peak() == 0  # read and begun anew


def test_kept_memory_is_what_the_backward_needs():
    x = torch.randn(100, requires_grad=True)
    assert memory.kept_bytes(lambda: x.exp(), CPU) == pytest.approx(400, abs=64)  # exp saves its output
    assert memory.kept_bytes(lambda: (x * 2).exp(), CPU) == pytest.approx(400, abs=64)
    assert memory.kept_bytes(lambda: x.exp().exp(), CPU) == pytest.approx(800, abs=64)


@pytest.mark.parametrize("direction", PASSES)
def test_the_bare_products_do_the_layers_flops(direction):
    batch, length = 2, 5
    shapes = products.layer_shapes(batch, length, TINY.width, TINY.hidden, TINY.heads)
    forward = sum(2 * count * m * k * n for count, m, k, n in shapes)
    assert of_pass(forward, direction) == of_pass(layer_flops(batch, length, TINY.width, TINY.hidden), direction)
    outputs = products.variant(shapes, direction, torch.float32, CPU).prepare().call()
    assert len(outputs) == len(shapes) * (1 if direction == "forward" else 3)
    assert all(output.isfinite().all() for output in outputs)
