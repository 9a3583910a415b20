"""Claim: the Macaron layers compute macaron-net's equations, written out here in plain torch: half FFN, attention, half
FFN, each with its norm, dropout where macaron-net has it; with the parameters of the standard layer."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from macaron_ops.nn import MacaronDecoderLayer, MacaronEncoderLayer
from macaron_ops.ops.run import STREAMS
from macaron_ops.reference.dropout import HIDDEN_STREAM, OUTPUT_STREAM, dropout
from tests.nn.tools import cotangent, output_and_grads, randomize
from tests.rule import assert_by_rule

D, H, TOTAL = 8, 2, 24


def build(kind, dropout=0.0, dtype=torch.float64, **options):
    return randomize(kind(D, H, TOTAL, dropout, dtype=dtype, **options))


def attention(module, x, source, mask=None):
    """As fairseq calls it: ``(T, B, D)``, packed projections."""
    return F.multi_head_attention_forward(
        x,
        source,
        source,
        D,
        H,
        module.in_proj_weight,
        module.in_proj_bias,
        None,
        None,
        False,
        0.0,
        module.out_proj.weight,
        module.out_proj.bias,
        attn_mask=mask,
        need_weights=False,
    )[0]


def macaron_net(layer, x, memory=None, mask=None, act=F.relu):
    """zhuohan123/macaron-net, ``TransformerEncoderLayer.forward`` and ``TransformerDecoderLayer.forward``:
    ``maybe_layer_norm(before)`` is the norm of pre-norm layers, ``maybe_layer_norm(after)`` of post-norm ones."""
    before = (lambda norm, t: norm(t)) if layer.norm_first else (lambda norm, t: t)
    after = (lambda norm, t: t) if layer.norm_first else (lambda norm, t: norm(t))
    fc1, fc2, macaron_fc1, macaron_fc2 = layer.linear1, layer.linear2, layer.macaron_linear1, layer.macaron_linear2

    residual = x
    x = before(layer.macaron_norm, x)
    x = residual + 0.5 * macaron_fc2(act(macaron_fc1(x)))
    x = after(layer.macaron_norm, x)

    residual = x
    x = before(layer.norm1, x)
    x = residual + attention(layer.self_attn, x, x, mask)
    x = after(layer.norm1, x)

    last = layer.norm2
    if memory is not None:
        residual = x
        x = before(layer.norm2, x)
        x = residual + attention(layer.multihead_attn, x, memory)
        x = after(layer.norm2, x)
        last = layer.norm3

    residual = x
    x = before(last, x)
    x = residual + 0.5 * fc2(act(fc1(x)))
    return after(last, x)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
def test_encoder_order(norm_first, bias, device):
    layer = build(MacaronEncoderLayer, norm_first=norm_first, bias=bias, device=device)
    x = torch.randn(5, 3, D, dtype=torch.float64, device=device, requires_grad=True)
    mask = torch.ones(5, 5, dtype=torch.bool, device=device).triu(1)
    actual = output_and_grads(layer, x, mask)
    y = macaron_net(layer, x, mask=mask)
    torch.testing.assert_close(actual[0], y)
    torch.testing.assert_close(actual[1:], list(torch.autograd.grad(y, [x, *layer.parameters()], cotangent(y))))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
def test_decoder_order(norm_first, bias, device):
    layer = build(MacaronDecoderLayer, norm_first=norm_first, bias=bias, activation="gelu", device=device)
    x, memory = (torch.randn(t, 3, D, dtype=torch.float64, device=device, requires_grad=True) for t in (5, 4))
    mask = torch.ones(5, 5, dtype=torch.bool, device=device).triu(1)
    actual = output_and_grads(layer, x, memory, mask)
    y = macaron_net(layer, x, memory, mask, F.gelu)
    torch.testing.assert_close(actual[0], y)
    expected = torch.autograd.grad(y, [x, memory, *layer.parameters()], cotangent(y))
    torch.testing.assert_close(actual[1:], list(expected))


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("kind", [MacaronEncoderLayer, MacaronDecoderLayer])
def test_every_dropout_is_where_macaron_net_has_it(kind, norm_first):
    """relu_dropout after the activation, dropout after fc2 and before the 0.5, attention_dropout on the weights."""
    layer = build(kind, 0.3, norm_first=norm_first, batch_first=True, attention_dropout=0.2, activation_dropout=0.4)
    outputs = [
        getattr(layer, name) for name in ("macaron_dropout", "dropout1", "dropout2", "dropout3")[: kind.has_context + 3]
    ]
    assert all(module.p == 0.3 for module in outputs)
    for i, module in enumerate(outputs):
        module.p = 0.1 + 0.1 * i
    x, memory = (torch.randn(2, 5, D, dtype=torch.float64) for _ in range(2))
    arguments = (x,) if kind is MacaronEncoderLayer else (x, memory)
    torch.manual_seed(11)
    actual = layer(*arguments)
    torch.manual_seed(11)
    seed = torch.randint(2**63 - 1, ())  # one for the layer; substep i has the streams 2 i and 2 i + 1

    def drop(t, p, i, stream):
        return t * dropout(torch.ones_like(t), p, seed, STREAMS * i + stream)

    def step(t, norm, branch):
        return t + branch(norm(t)) if norm_first else norm(t + branch(t))

    def half(fc1, fc2, i):
        def branch(t):
            hidden = drop(F.relu(fc1(t)), 0.4, i, HIDDEN_STREAM)
            return 0.5 * drop(fc2(hidden), outputs[i].p, i, OUTPUT_STREAM)

        return branch

    def attend(module, source, i):
        def branch(t):
            w, b = module.in_proj_weight.chunk(3), module.in_proj_bias.chunk(3)
            keys = t if source is None else source
            q, k, v = (
                F.linear(s, w_s, b_s).unflatten(-1, (H, -1)).transpose(1, 2)
                for s, w_s, b_s in zip((t, keys, keys), w, b, strict=True)
            )
            p = drop(torch.softmax(q @ k.mT / (D // H) ** 0.5, -1), 0.2, i, HIDDEN_STREAM)
            return drop(module.out_proj((p @ v).transpose(1, 2).flatten(-2)), outputs[i].p, i, OUTPUT_STREAM)

        return branch

    y = step(x, layer.macaron_norm, half(layer.macaron_linear1, layer.macaron_linear2, 0))
    y = step(y, layer.norm1, attend(layer.self_attn, None, 1))
    if kind is MacaronDecoderLayer:
        y = step(y, layer.norm2, attend(layer.multihead_attn, memory, 2))
    last = layer.norm3 if kind is MacaronDecoderLayer else layer.norm2
    y = step(y, last, half(layer.linear1, layer.linear2, len(outputs) - 1))
    torch.testing.assert_close(actual, y)
    layer.eval()
    assert torch.equal(layer(*arguments), layer(*arguments))


@pytest.mark.parametrize(
    ("kind", "standard"),
    [(MacaronEncoderLayer, nn.TransformerEncoderLayer), (MacaronDecoderLayer, nn.TransformerDecoderLayer)],
)
def test_parameter_parity_and_keys(kind, standard):
    """One norm and one output bias more than the standard layer, and torch's names for the rest."""
    layer, other = kind(D, H, TOTAL), standard(D, H, TOTAL)

    def count(module):
        return sum(p.numel() for p in module.parameters())

    assert count(layer) == count(other) + 2 * D + D
    assert sum(p.numel() for p in layer.parameters() if p.dim() > 1) == sum(
        p.numel() for p in other.parameters() if p.dim() > 1
    )
    extra = {f"macaron_{name}.{p}" for name in ("linear1", "linear2", "norm") for p in ("weight", "bias")}
    assert set(layer.state_dict()) == set(other.state_dict()) | extra
    assert layer.linear1.weight.shape == layer.macaron_linear1.weight.shape == (TOTAL // 2, D)
    assert layer.linear1.weight is not layer.macaron_linear1.weight


def test_initialisation_is_that_of_torch_layers():
    layer = MacaronEncoderLayer(64, 4, 128)
    bound = (6 / (64 + 192)) ** 0.5  # Xavier of the packed (3 D, D) matrix
    assert 0.9 * bound < layer.self_attn.in_proj_weight.abs().max() <= bound
    assert not layer.self_attn.in_proj_bias.any() and not layer.self_attn.out_proj.bias.any()
    for linear in (layer.linear1, layer.macaron_linear1, layer.linear2, layer.macaron_linear2):
        bound = linear.in_features**-0.5
        assert 0.9 * bound < linear.weight.abs().max() <= bound


@pytest.mark.parametrize("activation", ["gelu_tanh", "silu", "swiglu", "geglu", F.mish])
def test_activations(activation):
    layer = build(MacaronEncoderLayer, activation=activation)
    gates = {"swiglu": F.silu, "geglu": F.gelu}
    plain = {"gelu_tanh": lambda z: F.gelu(z, approximate="tanh"), "silu": F.silu, F.mish: F.mish}

    def act(z):
        if activation in gates:
            gate, up = z.chunk(2, -1)
            return gates[activation](gate) * up
        return plain[activation](z)

    x = torch.randn(5, 3, D, dtype=torch.float64)
    torch.testing.assert_close(layer(x), macaron_net(layer, x, act=act))


@pytest.mark.parametrize("kind", [MacaronEncoderLayer, MacaronDecoderLayer])
def test_copies_and_state(kind):
    layer = build(kind, save="lean", norm_first=True)
    x = [torch.randn(5, 3, D, dtype=torch.float64, requires_grad=True) for _ in range(1 + layer.has_context)]
    expected = output_and_grads(layer, *x)
    loaded = build(kind, norm_first=True)
    loaded.load_state_dict(layer.state_dict())
    for again in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), loaded):
        torch.testing.assert_close(output_and_grads(again, *x), expected)
    assert "FFN/2, attention" in repr(layer) and "save='lean'" in repr(layer)


@pytest.mark.parametrize("norm_first", [True, False])
def test_autocast(norm_first, device):
    layer = build(MacaronEncoderLayer, dtype=torch.float32, norm_first=norm_first, device=device)
    x = torch.randn(5, 3, D, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        y, eager = layer(x), macaron_net(layer, x)
    assert y.dtype == eager.dtype == torch.float32
    exact = copy.deepcopy(layer).double()
    assert_by_rule("y", y.bfloat16(), eager, exact(x.double()))


@pytest.mark.parametrize("kind", [MacaronEncoderLayer, MacaronDecoderLayer])
def test_compiles_as_one_graph(kind):
    layer = build(kind, batch_first=True)
    x = [torch.randn(2, 5, D, dtype=torch.float64, requires_grad=True) for _ in range(1 + layer.has_context)]
    expected = output_and_grads(layer, *x)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(output_and_grads(compiled, *x), expected)


@pytest.mark.inductor
def test_compiles_with_inductor():
    layer = build(MacaronEncoderLayer, batch_first=True, norm_first=True)
    x = torch.randn(2, 5, D, dtype=torch.float64, requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True)
    torch.testing.assert_close(output_and_grads(compiled, x), output_and_grads(layer, x))


@pytest.mark.parametrize("kind", [MacaronEncoderLayer, MacaronDecoderLayer])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"nhead": 3}, "nhead: expected a divisor of d_model = 8; got 3"),
        ({"dim_feedforward": 25}, "dim_feedforward: expected an even width, for two halves; got 25"),
        ({"dropout": -0.1}, "dropout: expected a probability"),
        ({"attention_dropout": 2.0}, "attention_dropout: expected a probability"),
        ({"activation_dropout": float("nan")}, "activation_dropout: expected a finite number"),
        ({"layer_norm_eps": -1.0}, "layer_norm_eps: expected a finite number of at least 0"),
        ({"activation": "tanh"}, "activation: expected one of 'relu', .*; got 'tanh'"),
        ({"save": "none"}, "save: expected one of 'fast', 'lean'"),
    ],
)
def test_constructor_refusals(kind, arguments, message):
    with pytest.raises(ValueError, match=message):
        kind(**{"d_model": D, "nhead": H, **arguments})
