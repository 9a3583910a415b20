"""Claim: Strang layers of the Triton kernels take no more memory than was asked for, 0.7 of what the eager Lie-Trotter
layer takes, ``save="lean"`` 0.4; and all layers keep what the formula says."""

import pytest
import torch

import macaron_ops
from macaron_ops.bench import activations, layer_memory
from macaron_ops.bench.eager import SCHEMES
from macaron_ops.bench.presets import GPU_PRESETS
from macaron_ops.ops import run

TRITON = macaron_ops.backends()["triton"]
pytestmark = pytest.mark.skipif(
    not TRITON.usable or torch.cuda.is_available(), reason=f"triton: {TRITON.reason}"
)  # the tensors are the CPU's
EAGER = {"long-512": 368.8, "long-1024": 737.3}  # MiB, bench/results/2026-11-26-nvidia-h200-layers.json
SHARE = {"fast": 0.7, "lean": 0.4}


@pytest.mark.parametrize("save", SHARE)
@pytest.mark.parametrize("name", EAGER)
def test_peak(name, save):
    found = layer_memory.layer_memory(GPU_PRESETS[name], "Strang", save)
    assert found.peak < SHARE[save] * EAGER[name] * 2**20


@pytest.mark.parametrize("warm", [0, 1])
def test_first_calls(warm, monkeypatch):
    """The second call of a kind plans its launches one after the other, the third takes note of them."""
    run.forget()
    monkeypatch.setattr(layer_memory, "WARM", warm)  # beside the one before the one that is weighed
    found = layer_memory.layer_memory(GPU_PRESETS["long-512"], "Strang", "fast")
    assert found.peak < SHARE["fast"] * EAGER["long-512"] * 2**20


@pytest.mark.parametrize("save", SHARE)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_is_kept(scheme, save):
    preset = GPU_PRESETS["long-512"]
    found = layer_memory.layer_memory(preset, scheme, save)
    shape = (16 * 1024, preset.width, preset.hidden, preset.heads)
    expected = activations.kept_bytes(*shape, scheme, save, 2, "triton")
    assert abs(found.kept - expected) < 0.001 * expected
