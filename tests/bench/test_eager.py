"""The denominators are what they claim: PyTorch's layer, macaron-net's equations, equal parameters, counted FLOPs."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from macaron_ops.bench import flops, presets
from macaron_ops.bench.eager import (
    EagerLieTrotterLayer,
    EagerStrangLayer,
    avoid_kinks_,
    randomize_,
    sphere_attend_step,
    sphere_attend_step_keops,
    sphere_attend_step_sdpa,
)
from macaron_ops.bench.eager_decoders import EAGER_DECODERS
from macaron_ops.nn.positions import rotary_angles

B, T, D, HEADS, HIDDEN = 2, 5, 12, 3, 16


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
def test_lie_trotter_is_the_function_of_torchs_layer(activation):
    eager = randomize_(EagerLieTrotterLayer(D, HEADS, HIDDEN, activation), 0).double()
    theirs = nn.TransformerEncoderLayer(
        D, HEADS, HIDDEN, dropout=0.0, activation=getattr(F, activation), batch_first=True, norm_first=True
    ).double()
    theirs.load_state_dict(eager.state_dict())
    x = torch.randn(B, T, D, dtype=torch.float64)
    torch.testing.assert_close(eager(x), theirs(x))


def test_strang_is_macaron_nets_equations():
    eager = randomize_(EagerStrangLayer(D, HEADS, HIDDEN, "relu"), 0).double()
    x = torch.randn(B, T, D, dtype=torch.float64)

    def ffn(w_in, w_out, norm, x):
        return w_out(torch.relu(w_in(norm(x))))

    y = x + 0.5 * ffn(eager.macaron_linear1, eager.macaron_linear2, eager.macaron_norm, x)
    normed = eager.norm1(y)
    y = y + eager.self_attn(normed, normed, normed, need_weights=False)[0]
    y = y + 0.5 * ffn(eager.linear1, eager.linear2, eager.norm2, y)
    torch.testing.assert_close(eager(x), y)


@pytest.mark.parametrize("preset", presets.PRESETS.values(), ids=lambda preset: preset.name)
def test_both_schemes_have_equal_parameters_up_to_one_norm(preset):
    with torch.device("meta"):
        layers = [
            layer(preset.width, preset.heads, preset.hidden, preset.activation)
            for layer in (EagerLieTrotterLayer, EagerStrangLayer)
        ]
    standard, strang = (sum(parameter.numel() for parameter in layer.parameters()) for layer in layers)
    # One more norm, and one more output bias: the inner biases add up to the same width.
    assert strang - standard == 3 * preset.width


@pytest.mark.parametrize("layer", [EagerLieTrotterLayer, EagerStrangLayer])
@pytest.mark.parametrize("direction", flops.PASSES)
def test_flops_are_those_that_torch_counts(layer, direction):
    module = layer(D, HEADS, HIDDEN, "relu")
    x = torch.randn(B, T, D, requires_grad=True)
    # torch's formula for a fused attention's backward counts its recomputation; the decomposed one recomputes nothing.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        y = module(x)
        if direction == "forward+backward":
            y.sum().backward()
    assert flops.of_pass(flops.layer_flops(B, T, D, HIDDEN), direction) == counter.get_total_flops()


@pytest.mark.parametrize("layer", EAGER_DECODERS.values(), ids=EAGER_DECODERS)
@pytest.mark.parametrize("direction", flops.PASSES)
def test_flops_of_a_causal_layer_are_those_that_torch_counts_but_for_half_the_square(layer, direction):
    module, rotary = layer(D, HEADS, HIDDEN), rotary_angles(T, D // HEADS)
    x = torch.randn(B, T, D, requires_grad=True)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        y = module(x, rotary)
        if direction == "forward+backward":
            y.sum().backward()
    forward = flops.attention_flops(B, T, D, causal=True) + flops.ffn_flops(B * T, D, HIDDEN, gated=True)
    assert flops.of_pass(forward + 2 * B * T * T * D, direction) == counter.get_total_flops()


def test_both_decoders_have_equal_matrices():
    matrices = [
        {
            name: parameter.shape
            for name, parameter in layer(D, HEADS, HIDDEN).named_parameters()
            if "proj" in name or "linear" in name
        }
        for layer in EAGER_DECODERS.values()
    ]
    assert matrices[0] == matrices[1] and len(matrices[0]) == 4


def test_no_hidden_unit_is_within_rounding_of_the_kink_of_relu():
    layer = randomize_(EagerStrangLayer(D, HEADS, HIDDEN, "relu"), 0)
    x = torch.randn(B, T, D)

    def pre_activations():
        found, feed = [], EagerStrangLayer.feed

        def watched(x, w_in, w_out, norm, step):
            found.append(w_in(norm(x)))
            return feed(layer, x, w_in, w_out, norm, step)

        layer.feed = watched
        layer(x)
        del layer.feed
        return found

    for kink, bias in zip(pre_activations(), (layer.macaron_linear1.bias, layer.linear1.bias), strict=True):
        with torch.no_grad():
            bias[0] -= kink[0, 0, 0]  # now a unit is at the kink
    before = [bias.clone() for bias in (layer.macaron_linear1.bias, layer.linear1.bias)]
    avoid_kinks_(layer, x)
    assert all(hidden.abs().min() > 1e-4 for hidden in pre_activations())
    for old, new in zip(before, (layer.macaron_linear1.bias, layer.linear1.bias), strict=True):
        assert (old - new).abs().max() <= 1.001e-3


def test_the_forms_of_sphere_attend_step_are_one_function():
    x = F.normalize(torch.randn(2, 7, 3, dtype=torch.float64), dim=-1)
    by_matrix = sphere_attend_step(x, step=0.3, beta=2.0)
    torch.testing.assert_close(by_matrix, sphere_attend_step_sdpa(x, step=0.3, beta=2.0))
    torch.testing.assert_close(by_matrix[:, :2], sphere_attend_step_sdpa(x[:, :2], step=0.3, beta=2.0, others=x))


@pytest.mark.inductor  # it compiles
def test_pykeops_computes_it_too():
    pytest.importorskip("pykeops")
    x = F.normalize(torch.randn(2, 7, 3), dim=-1)
    torch.testing.assert_close(
        sphere_attend_step_keops(x, step=0.3, beta=2.0), sphere_attend_step(x, step=0.3, beta=2.0)
    )


def test_a_gated_ffn_has_a_third_product():
    x, w_in, w_out = torch.randn(6, D), torch.randn(2 * HIDDEN, D), torch.randn(D, HIDDEN)
    with FlopCounterMode(display=False) as counter:
        gate, up = F.linear(x, w_in).chunk(2, -1)
        F.linear(F.silu(gate) * up, w_out)
    assert flops.ffn_flops(6, D, HIDDEN, gated=True) == counter.get_total_flops()
