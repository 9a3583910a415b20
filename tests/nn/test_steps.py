"""Claim: FFNStep and AttendStep are their operators on parameters of their own: every option, the initialisation, the
mode's dropout, and a shape that does not fit refused by its name."""

import copy
import pickle

import pytest
import torch
from torch import nn

import macaron_ops
from macaron_ops.nn import AttendStep, FFNStep, SphereNorm
from tests import twins
from tests.nn.tools import output_and_grads, randomize

D, H, F = 8, 4, 12


def tokens(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def norm_of(module):
    kinds = {nn.LayerNorm: "layer", nn.RMSNorm: "rms", SphereNorm: "sphere", nn.Identity: None}
    norm = module.norm
    arguments = {"norm": kinds[type(norm)], "norm_weight": getattr(norm, "weight", None)}
    return {**arguments, "norm_bias": getattr(norm, "bias", None), "eps": getattr(norm, "eps", 1e-5)}


def check(module, expected, *inputs):
    actual = output_and_grads(module, *inputs)
    torch.testing.assert_close(actual[0], expected)
    torch.manual_seed(1)
    wanted = [*inputs, *module.parameters()]
    cotangents = torch.autograd.grad(module(*inputs).square().sum(), wanted)
    torch.testing.assert_close(cotangents, torch.autograd.grad(expected.square().sum(), wanted))


@pytest.mark.parametrize("placement", ["pre", "post"])
@pytest.mark.parametrize("norm", ["layer", "rms", "sphere", None])
@pytest.mark.parametrize("activation", ["relu", "swiglu"])
def test_ffn_step(activation, norm, placement):
    options = {"activation": activation, "placement": placement, "step": 0.3, "residual_scale": 1.5}
    module = randomize(FFNStep(D, F, norm=norm, eps=1e-3, dtype=torch.float64, **options))
    x = tokens(2, 5, D)
    y = twins.ffn_step(
        x,
        module.linear1.weight,
        module.linear1.bias,
        module.linear2.weight,
        module.linear2.bias,
        **norm_of(module),
        **options,
    )
    check(module, y, x)


@pytest.mark.parametrize("placement", ["pre", "post"])
@pytest.mark.parametrize("norm", ["layer", "rms", "sphere", None])
@pytest.mark.parametrize(("kv_heads", "head_dim"), [(4, 2), (2, 2), (1, 3)])
def test_attend_step(kv_heads, head_dim, norm, placement):
    options = {"placement": placement, "step": 0.3, "residual_scale": 1.5, "num_kv_heads": kv_heads}
    module = randomize(AttendStep(D, H, head_dim=head_dim, norm=norm, eps=1e-3, dtype=torch.float64, **options))
    x = tokens(2, 5, D)
    y = twins.attend_step(
        x,
        module.in_proj.weight,
        module.in_proj.bias,
        module.out_proj.weight,
        module.out_proj.bias,
        H,
        **norm_of(module),
        **options,
    )
    check(module, y, x)


@pytest.mark.parametrize("context_dim", [None, 5])
def test_cross_attention(context_dim):
    module = randomize(AttendStep(D, H, context_dim=context_dim, dtype=torch.float64))
    x, context = tokens(2, 5, D), tokens(2, 3, context_dim or D)
    if context_dim is None:
        weights, biases = module.in_proj.weight, module.in_proj.bias
    else:
        projections = (module.q_proj, module.k_proj, module.v_proj)
        weights, biases = tuple(p.weight for p in projections), tuple(p.bias for p in projections)
    y = twins.attend_step(
        x,
        weights,
        biases,
        module.out_proj.weight,
        module.out_proj.bias,
        H,
        context=context,
        **norm_of(module),
    )
    check(module, y, x, context)
    assert "context_dim" not in module.state_dict()


def test_packed_sequences_and_rotation_reach_the_operator():
    module = randomize(AttendStep(D, H, head_dim=4, dtype=torch.float64))
    parts = [tokens(3, D), tokens(2, D)]
    borders = torch.tensor([0, 3, 5], dtype=torch.int32)
    together = module(torch.cat(parts), cu_seqlens=borders, causal=True)
    torch.testing.assert_close(together, torch.cat([module(p, causal=True) for p in parts]))
    angles = torch.randn(3, 2, dtype=torch.float64)
    turned = module(parts[0], rotary=(angles.cos(), angles.sin()))
    assert not torch.allclose(turned, module(parts[0]))
    still = torch.ones(3, 2, dtype=torch.float64), torch.zeros(3, 2, dtype=torch.float64)
    torch.testing.assert_close(module(parts[0], rotary=still), module(parts[0]))


@pytest.mark.parametrize(
    "module",
    [FFNStep(D, F, dropout=0.3, activation_dropout=0.4), AttendStep(D, H, dropout=0.3, attention_dropout=0.4)],
    ids=["ffn", "attend"],
)
def test_dropout_mode_seed_and_copies(module):
    x = torch.randn(2, 5, D)
    assert torch.equal(module(x, seed=3), module(x, seed=3))
    assert not torch.equal(module(x, seed=3), module(x, seed=4))
    off = copy.deepcopy(module).eval()
    assert torch.equal(off(x, seed=3), off(x, seed=4))
    assert torch.equal(pickle.loads(pickle.dumps(module))(x, seed=3), module(x, seed=3))
    torch.testing.assert_close(macaron_ops.split_layer(x, [module.substep(seed=3)]), module(x, seed=3))


def test_compiles_again_for_other_numbers():
    """The second step size makes torch.compile treat the number as a variable."""
    x = torch.randn(2, 5, D, dtype=torch.float64, requires_grad=True)
    for step in (0.5, 1.0, 0.25):
        module = randomize(FFNStep(D, F, step=step, eps=step * 1e-3, dtype=torch.float64))
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(output_and_grads(compiled, x), output_and_grads(module, x))


def test_initialisation():
    ffn, attend = FFNStep(64, 128), AttendStep(64, 4, num_kv_heads=2)
    assert ffn.linear1.weight.abs().max() <= 64**-0.5 and ffn.linear2.weight.abs().max() <= 128**-0.5
    bound = (6 / (64 + 128)) ** 0.5
    assert 0.9 * bound < attend.in_proj.weight.abs().max() <= bound
    assert attend.out_proj.weight.abs().max() <= 64**-0.5
    assert not attend.in_proj.bias.any() and not attend.out_proj.bias.any()
    without = [*FFNStep(64, 128, bias=False).state_dict(), *AttendStep(64, 4, bias=False).state_dict()]
    assert not any(name.endswith("bias") for name in without)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: FFNStep(D, F, step=float("nan")), "step: expected a finite number"),
        (lambda: FFNStep(D, 0), "dim_feedforward: expected an integer of at least 1"),
        (lambda: FFNStep(D, F, norm="batch"), "norm: expected one of 'layer', 'rms', 'sphere', None"),
        (lambda: FFNStep(D, F, placement="middle"), "placement: expected one of 'pre', 'post'"),
        (lambda: FFNStep(D, F, activation="tanh"), "activation: expected one of"),
        (lambda: FFNStep(D, F, activation_dropout=2), "activation_dropout: expected a probability"),
        (lambda: FFNStep(D, F, save="none"), "save: expected one of"),
        (lambda: AttendStep(D, 3), "num_heads: expected a divisor of d_model = 8; got 3"),
        (lambda: AttendStep(D, H, num_kv_heads=3), "num_kv_heads: expected a divisor of num_heads = 4; got 3"),
        (lambda: AttendStep(D, H, head_dim=0), "head_dim: expected an integer of at least 1"),
        (lambda: AttendStep(D, H, attention_dropout=-1), "attention_dropout: expected a probability"),
        (lambda: AttendStep(D, H, residual_scale=float("inf")), "residual_scale: expected a finite number"),
        (lambda: AttendStep(D, H, context_dim=5)(torch.randn(2, D)), "context: expected a tensor of width"),
    ],
)
def test_refusals(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_refusals_of_types():
    with pytest.raises(TypeError, match="d_model: expected an integer; got 8.0"):
        FFNStep(8.0, F)
    with pytest.raises(TypeError, match="activation: expected a name or a callable; got 3"):
        FFNStep(D, F, activation=3)
    with pytest.raises(TypeError, match="activation: expected a function or an instance; got the class SiLU itself"):
        FFNStep(D, F, activation=torch.nn.SiLU)
