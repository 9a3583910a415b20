"""The per-kernel table adds up: FLOPs to the layer's, bytes to the shapes', times to the trace's."""

import json

import pytest
import torch

from macaron_ops import native
from macaron_ops.bench import flops, presets, profile
from macaron_ops.bench.options import Options


@pytest.mark.parametrize("scheme", ["Lie-Trotter", "Strang"])
@pytest.mark.parametrize("direction", flops.PASSES)
def test_kernels_flops_are_the_layers(scheme, direction, tiny, tmp_path):
    options = Options(effort="quick", dtype_names=("float32",))
    text = profile.run(presets.TINY, f"eager {scheme}", direction, options, tmp_path)
    kernels = profile.read(tmp_path / "trace.json", torch.float32, options.device)
    batch, length = presets.TINY.size("cpu", "quick")
    layer = flops.layer_flops(batch, length, presets.TINY.width, presets.TINY.hidden)
    assert sum(kernel.flops for kernel in kernels) == pytest.approx(flops.of_pass(layer, direction))
    assert "addmm" in text and "whole layer" in text
    assert (tmp_path / "kernels.txt").exists() and (tmp_path / "kernels.json").exists()


@pytest.mark.parametrize("direction", flops.PASSES)
def test_native_kernels_run_whole_passes_and_have_the_layers_flops(direction, tiny, tmp_path):
    if not native.library():
        pytest.skip(native.why_not_loaded())
    options = Options(effort="quick", dtype_names=("float32",))
    text = profile.run(presets.TINY, "macaron_ops native Strang", direction, options, tmp_path)
    kernels = {kernel["name"]: kernel for kernel in json.loads((tmp_path / "kernels.json").read_text())}
    assert "macaron_ops_cpu::forward" in text
    batch, length = presets.TINY.size("cpu", "quick")
    layer = flops.layer_flops(batch, length, presets.TINY.width, presets.TINY.hidden)
    assert kernels["macaron_ops_cpu::forward"]["flops"] == pytest.approx(layer)
    assert ("macaron_ops_cpu::backward" in kernels) == (direction != "forward")
    assert sum(kernel["flops"] for kernel in kernels.values()) == pytest.approx(flops.of_pass(layer, direction))


@pytest.mark.parametrize(
    ("name", "shapes", "work", "moved"),
    [
        ("aten::mm", [[2, 3], [3, 5]], 60, 4 * (6 + 15 + 10)),
        ("aten::addmm", [[5], [2, 3], [3, 5]], 60, 4 * (5 + 6 + 15 + 10)),
        ("aten::bmm", [[7, 2, 3], [7, 3, 5]], 420, 4 * 7 * (6 + 15 + 10)),
        ("aten::add", [[2, 3], [3]], 0, 4 * (6 + 3 + 6)),
        ("aten::copy_", [[2, 3], [2, 3]], 0, 4 * 12),
        ("aten::relu", [[2, 3]], 0, 4 * 12),
    ],
)
def test_cost_from_recorded_shapes(name, shapes, work, moved):
    arguments = {"Input Dims": shapes, "Input type": ["float"] * len(shapes)}
    assert profile.cost(name, arguments, torch.float32) == (work, moved)


def test_a_list_of_tensors_and_an_operator_without_tensors():
    arguments = {"Input Dims": [[[2, 3], [2, 3]], []], "Input type": ["TensorList", "Scalar"]}
    assert profile.cost("aten::cat", arguments, torch.float32) == (0, 4 * 24)
    assert profile.cost("aten::empty", {"Input Dims": [[]], "Input type": ["Scalar"]}, torch.float32) == (0, 0)


def test_self_time_leaves_the_callees_out():
    def event(name, start, duration):
        return {"name": name, "ts": start, "dur": duration, "tid": 1}

    operators = [event("outer", 0, 10), event("inner", 2, 3), event("innermost", 3, 1), event("next", 10, 4)]
    times = {operators[index]["name"]: spent for index, (spent, _) in profile._self_times(operators).items()}
    assert times == {"outer": 7, "inner": 2, "innermost": 1, "next": 4}
