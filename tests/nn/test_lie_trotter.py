"""Claim: the fused Lie-Trotter layers are torch's layers: same constructor, attributes and keys, exchangeable by class,
equal on whatever has happened to the parameters, in training and eval, alone and inside torch's stacks."""

import copy
import functools
import inspect
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from macaron_ops.nn import LieTrotterDecoderLayer, LieTrotterEncoderLayer
from macaron_ops.nn.activation import fused_activation
from tests.nn.tools import cotangent, output_and_grads, randomize, twin
from tests.rule import assert_by_rule

D, H, F_ = 8, 2, 12
ROOMY = (32, 4, 64)  # where the largest error of many elements is compared, not the luck of a few
PAIRS = [
    pytest.param(nn.TransformerEncoderLayer, LieTrotterEncoderLayer, 1, id="encoder"),
    pytest.param(nn.TransformerDecoderLayer, LieTrotterDecoderLayer, 2, id="decoder"),
]


def pair(theirs, ours, dropout=0.0, dtype=torch.float64, size=(D, H, F_), **build):
    expected = randomize(theirs(*size, dropout, batch_first=True, dtype=dtype, **build))
    return expected, twin(ours(*size, dropout, batch_first=True, dtype=dtype, **build), expected)


def inputs(count, dtype=torch.float64, shape=(2, 5, D), device=None):
    return [torch.randn(shape, dtype=dtype, device=device, requires_grad=True) for _ in range(count)]


def in_float64(module, x):
    """``output_and_grads`` of a copy in float64."""
    return output_and_grads(copy.deepcopy(module).double(), *(t.detach().double().requires_grad_() for t in x))


@pytest.mark.parametrize(("theirs", "ours", "count"), PAIRS)
def test_same_constructor_attributes_and_keys(theirs, ours, count):
    mine = list(inspect.signature(ours).parameters.values())
    assert [(p.name, p.default) for p in mine[:-1]] == [
        (p.name, p.default) for p in inspect.signature(theirs).parameters.values()
    ]
    assert mine[-1].name == "save"
    torch.manual_seed(3)
    a = theirs(D, H, F_)
    torch.manual_seed(3)
    b = ours(D, H, F_)
    assert set(vars(b)) - set(vars(a)) == {"save"}
    assert list(a.state_dict()) == list(b.state_dict())
    for x, y in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(x, y)  # the initialisation, from the same seed
    assert list(inspect.signature(theirs.forward).parameters) == list(inspect.signature(ours.forward).parameters)


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize(("theirs", "ours", "count"), PAIRS)
def test_exchange_of_the_class(theirs, ours, count, norm_first):
    layer = randomize(theirs(D, H, F_, 0.0, batch_first=True, norm_first=norm_first, dtype=torch.float64))
    x = inputs(count)
    expected, parameters = output_and_grads(layer, *x), list(layer.parameters())
    layer.__class__ = ours
    torch.testing.assert_close(output_and_grads(layer, *x), expected)
    layer.save = "lean"
    torch.testing.assert_close(output_and_grads(layer, *x), expected)
    assert all(p is q for p, q in zip(parameters, layer.parameters(), strict=True))
    for again in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(again) is ours and again.save == "lean"
        torch.testing.assert_close(output_and_grads(again, *x), expected)
    layer.__class__ = theirs
    torch.testing.assert_close(output_and_grads(layer, *x), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("theirs", "ours", "count"), PAIRS)
def test_narrow_dtypes_keep_the_rule(theirs, ours, count, dtype, device):
    # gelu: a relu's gradient jumps where a rounding changes the sign
    eager, layer = pair(theirs, ours, dtype=dtype, size=ROOMY, activation="gelu", device=device)
    x = inputs(count, dtype, (4, 16, ROOMY[0]), device)
    results = output_and_grads(layer, *x), output_and_grads(eager, *x), in_float64(eager, x)
    for i, (a, b, c) in enumerate(zip(*results, strict=True)):
        assert_by_rule(f"output {i}", a, b, c)


@pytest.mark.parametrize(("theirs", "ours", "count"), PAIRS)
def test_autocast(theirs, ours, count, device):
    smooth = {"activation": "gelu", "norm_first": True}
    eager, layer = pair(theirs, ours, dtype=torch.float32, size=ROOMY, device=device, **smooth)
    x = inputs(count, torch.float32, (4, 16, ROOMY[0]), device)
    with torch.autocast(device.type, torch.bfloat16):
        y, *grads = output_and_grads(layer, *x)
        reference, *reference_grads = output_and_grads(eager, *x)
    assert y.dtype == reference.dtype == torch.float32
    assert all(g.dtype == torch.float32 for g in grads)
    exact, *exact_grads = in_float64(eager, x)
    assert_by_rule("y", y.bfloat16(), reference, exact)
    for i, (a, b, c) in enumerate(zip(grads, reference_grads, exact_grads, strict=True)):
        assert_by_rule(f"gradient {i}", a.bfloat16(), b, c)  # one ulp of the dtype that it was computed in


@pytest.mark.parametrize(("theirs", "ours", "count"), PAIRS)
def test_frozen_parameters(theirs, ours, count):
    expected, layer = pair(theirs, ours)
    for module in (expected, layer):
        module.self_attn.requires_grad_(False)
        module.linear2.weight.requires_grad_(False)
        module.norm1.bias.requires_grad_(False)
    x = inputs(count)
    for module in (expected, layer):
        module(*x).sum().backward()
    for (name, a), b in zip(expected.named_parameters(), layer.parameters(), strict=True):
        assert (b.grad is None) == (not b.requires_grad), name
        torch.testing.assert_close(b.grad, a.grad)


@pytest.mark.parametrize(("theirs", "ours", "count"), PAIRS)
def test_shared_and_parametrized_parameters(theirs, ours, count):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))

        def forward(self, weight):
            return self.scale * weight

    expected, layer = pair(theirs, ours)
    for module in (expected, layer):
        module.norm2 = module.norm1
        module.self_attn.out_proj.bias = module.linear2.bias
        parametrize.register_parametrization(module.linear1, "weight", Scaled())
        parametrize.register_parametrization(module.self_attn, "in_proj_weight", Scaled())
        parametrize.register_parametrization(module.norm1, "weight", Scaled())
    x = inputs(count)
    torch.testing.assert_close(output_and_grads(layer, *x), output_and_grads(expected, *x))


@pytest.mark.parametrize(("theirs", "ours", "count"), PAIRS)
def test_a_parametrization_that_counts_its_reads(theirs, ours, count):
    """A training step of spectral_norm moves its singular vectors once each time that the weight is read."""
    expected, layer = pair(theirs, ours)
    for module in (expected, layer):
        for linear in (module.linear1, module.self_attn.out_proj):
            torch.manual_seed(2)
            parametrizations.spectral_norm(linear)
    x = inputs(count)
    for _ in range(2):
        torch.testing.assert_close(output_and_grads(layer, *x), output_and_grads(expected, *x))


@pytest.mark.parametrize("bias", [True, False])
def test_separate_projections_and_a_memory_of_another_width(bias):
    expected, layer = pair(nn.TransformerDecoderLayer, LieTrotterDecoderLayer, bias=bias)
    for module in (expected, layer):
        module.multihead_attn = nn.MultiheadAttention(
            D, H, bias=bias, kdim=5, vdim=5, batch_first=True, dtype=torch.float64
        )
    randomize(expected)
    twin(layer, expected)
    tgt, memory = inputs(1)[0], torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(output_and_grads(layer, tgt, memory), output_and_grads(expected, tgt, memory))


def test_other_norms_and_no_dropout_modules():
    expected, layer = pair(nn.TransformerEncoderLayer, LieTrotterEncoderLayer, dropout=0.5)
    for module in (expected, layer):
        module.norm1 = nn.RMSNorm(D, eps=1e-3, dtype=torch.float64)
        module.norm2 = nn.Identity()
        module.dropout = module.dropout1 = module.dropout2 = nn.Identity()
        module.self_attn.dropout = 0.0
    x = inputs(1)
    torch.testing.assert_close(output_and_grads(layer, *x), output_and_grads(expected, *x))


@pytest.mark.parametrize(
    ("activation", "name"),
    [
        (F.relu, "relu"),
        (torch.relu, "relu"),
        ("relu", "relu"),
        (nn.ReLU(), "relu"),
        (F.gelu, "gelu"),
        ("gelu", "gelu"),
        (nn.GELU(), "gelu"),
        (nn.GELU("tanh"), "gelu_tanh"),
        (functools.partial(F.gelu, approximate="tanh"), "gelu_tanh"),
        (F.silu, "silu"),
        (nn.SiLU(), "silu"),
        (F.mish, F.mish),
    ],
)
def test_activations(activation, name):
    assert fused_activation(activation) == name
    expected, layer = pair(nn.TransformerEncoderLayer, LieTrotterEncoderLayer, activation=activation)
    x = inputs(1)
    torch.testing.assert_close(output_and_grads(layer, *x), output_and_grads(expected, *x))


@pytest.mark.parametrize("kind", [LieTrotterEncoderLayer, LieTrotterDecoderLayer])
@pytest.mark.parametrize(("name", "function"), [("silu", F.silu), ("gelu_tanh", nn.GELU("tanh"))])
def test_names_that_torch_does_not_know(kind, name, function):
    layer = randomize(kind(D, H, F_, 0.0, name, batch_first=True, dtype=torch.float64))
    other = twin(kind(D, H, F_, 0.0, function, batch_first=True, dtype=torch.float64), layer)
    assert callable(layer.activation) and fused_activation(layer.activation) == name
    x = inputs(1 if kind is LieTrotterEncoderLayer else 2)
    assert torch.equal(layer(*x), other(*x))


def test_hooks_of_an_activation_run():
    expected, layer = pair(nn.TransformerEncoderLayer, LieTrotterEncoderLayer)
    for module in (expected, layer):
        module.activation = nn.ReLU()
        module.activation.register_forward_hook(lambda module, args, y: 2 * y)
    x = inputs(1)
    torch.testing.assert_close(output_and_grads(layer, *x), output_and_grads(expected, *x))


def test_activation_with_parameters():
    expected, layer = pair(nn.TransformerEncoderLayer, LieTrotterEncoderLayer, activation=nn.PReLU(dtype=torch.float64))
    layer.activation = copy.deepcopy(expected.activation)
    x = inputs(1)
    results = [output_and_grads(m, *x) for m in (layer, expected)]
    assert results[0][-1].abs().sum() > 0
    torch.testing.assert_close(*results)


@pytest.mark.parametrize(("theirs", "ours", "count"), PAIRS)
def test_dropout_obeys_the_mode_of_each_module(theirs, ours, count):
    expected, layer = pair(theirs, ours, dropout=0.5)
    x = inputs(count)
    assert not torch.allclose(layer(*x), layer(*x))
    torch.testing.assert_close(layer.eval()(*x), expected.eval()(*x))
    layer.self_attn.train()
    assert not torch.allclose(layer(*x), layer(*x))
    layer.train()
    torch.manual_seed(5)
    y = layer(*x)
    torch.manual_seed(5)
    assert torch.equal(layer(*x), y)


@pytest.mark.parametrize(("theirs", "ours", "count"), PAIRS)
def test_each_dropout_is_at_its_place(theirs, ours, count):
    """A probability of 1 leaves nothing to chance: torch's layer gives the expected output."""
    names = [name for name, m in ours(D, H).named_modules() if isinstance(m, (nn.Dropout, nn.MultiheadAttention))]
    assert len(names) == (4 if count == 1 else 6)
    x = inputs(count)
    seen = []
    for name in names:
        expected, layer = pair(theirs, ours)
        for module in (expected, layer):
            place = module.get_submodule(name)
            setattr(place, "p" if isinstance(place, nn.Dropout) else "dropout", 1.0)
        results = [output_and_grads(m, *x) for m in (layer, expected)]
        torch.testing.assert_close(*results, msg=lambda text, name=name: f"{name}: {text}")
        seen.append(results[0][0])
    assert not any(torch.allclose(a, b) for i, a in enumerate(seen) for b in seen[:i])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_conversion_of_torch_encoder():
    """In eval ``nn.TransformerEncoder`` hands nested tensors to its layers where a padding mask is given."""
    layer = nn.TransformerEncoderLayer(D, H, F_, 0.0, batch_first=True, dtype=torch.float64)
    stack = randomize(nn.TransformerEncoder(layer, 2, enable_nested_tensor=True)).eval()
    x = torch.randn(3, 5, D, dtype=torch.float64)
    padding = torch.arange(5) >= torch.tensor([[3], [5], [1]])
    seen = []
    with torch.no_grad():
        expected = stack(x, src_key_padding_mask=padding)
        for layer in stack.layers:
            layer.__class__ = LieTrotterEncoderLayer
            layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].is_nested))
        torch.testing.assert_close(stack(x, src_key_padding_mask=padding), expected)
    assert seen == [True, True]


@pytest.mark.parametrize(("theirs", "ours", "count"), PAIRS)
def test_replicas_of_data_parallel(theirs, ours, count):
    """``nn.DataParallel`` runs copies whose parameters are plain attributes: ``parameters()`` is empty there."""
    _, layer = pair(theirs, ours)
    replicas = {name: module._replicate_for_data_parallel() for name, module in layer.named_modules()}
    for name, module in layer.named_modules():
        for key, parameter in module._parameters.items():
            setattr(replicas[name], key, None if parameter is None else parameter.view_as(parameter))
        for key in module._modules:
            replicas[name]._modules[key] = replicas[f"{name}.{key}".removeprefix(".")]
    x = inputs(count)
    assert list(replicas[""].parameters()) == []
    assert torch.equal(replicas[""](*x), layer(*x))


@pytest.mark.parametrize("norm_first", [True, False])
def test_inside_torch_transformer(norm_first):
    build = {"dropout": 0.0, "norm_first": norm_first, "batch_first": True, "dtype": torch.float64}
    with pytest.warns() if norm_first else torch.no_grad():  # torch's remark that it will not nest
        model = randomize(nn.Transformer(D, H, 2, 2, F_, **build))
    src, tgt = torch.randn(2, 6, D, dtype=torch.float64), torch.randn(2, 5, D, dtype=torch.float64)
    causal = nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64)
    padding = torch.zeros(2, 6, dtype=torch.bool)
    padding[0, 4:] = True
    masks = {"tgt_mask": causal, "src_key_padding_mask": padding, "memory_key_padding_mask": padding}
    expected = output_and_grads(model, src, tgt, **masks)
    for module in model.modules():
        if type(module) is nn.TransformerEncoderLayer:
            module.__class__ = LieTrotterEncoderLayer
        elif type(module) is nn.TransformerDecoderLayer:
            module.__class__ = LieTrotterDecoderLayer
    torch.testing.assert_close(output_and_grads(model, src, tgt, **masks), expected)


@pytest.mark.parametrize(("theirs", "ours", "count"), PAIRS)
def test_compiles_as_one_graph(theirs, ours, count):
    expected, layer = pair(theirs, ours)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = inputs(count)
    mask = torch.ones(5, 5, dtype=torch.bool).triu(1)
    for training in (True, False):
        layer.train(training)
        y, *grads = (
            output_and_grads(expected, *x, mask) if count == 1 else output_and_grads(expected, *x, tgt_mask=mask)
        )
        z = compiled(*x, mask) if count == 1 else compiled(*x, tgt_mask=mask)
        torch.testing.assert_close(z, y)
        torch.testing.assert_close(list(torch.autograd.grad(z, [*x, *layer.parameters()], cotangent(z))), grads)


@pytest.mark.parametrize("kind", [LieTrotterEncoderLayer, LieTrotterDecoderLayer])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"d_model": 6, "nhead": 4}, "nhead: expected a divisor of d_model = 6; got 4"),
        ({"d_model": 0}, "d_model: expected an integer of at least 1"),
        ({"dim_feedforward": -1}, "dim_feedforward: expected an integer of at least 1"),
        ({"dropout": 1.5}, "dropout: expected a probability between 0 and 1; got 1.5"),
        ({"dropout": float("nan")}, "dropout: expected a finite number"),
        ({"layer_norm_eps": float("nan")}, "layer_norm_eps: expected a finite number"),
        ({"save": "all"}, "save: expected one of 'fast', 'lean'; got 'all'"),
        ({"activation": "foo"}, "activation: expected one of 'relu', .*; got 'foo'"),
        ({"activation": "swiglu"}, "activation: expected one of 'relu', .*; got 'swiglu', which has a gate"),
    ],
)
def test_constructor_refusals(kind, arguments, message):
    with pytest.raises(ValueError, match=message):
        kind(**{"d_model": D, "nhead": H, **arguments})


@pytest.mark.parametrize("kind", [LieTrotterEncoderLayer, LieTrotterDecoderLayer])
@pytest.mark.parametrize(
    ("activation", "message"),
    [
        (3, "activation: expected a name or a callable; got 3"),
        (None, "activation: expected a name or a callable; got None"),
        (nn.ReLU, "activation: expected a function or an instance; got the class ReLU itself"),
    ],
)
def test_activations_that_are_none(kind, activation, message):
    with pytest.raises(TypeError, match=message):
        kind(D, H, activation=activation)


def test_submodules_that_are_not_understood_are_refused():
    x = torch.randn(2, 5, D)
    layer = LieTrotterEncoderLayer(D, H, F_, batch_first=True)
    layer.linear1 = nn.Sequential(layer.linear1)
    with pytest.raises(TypeError, match="linear1: expected torch.nn.Linear; got torch.nn.Sequential"):
        layer(x)
    layer = LieTrotterEncoderLayer(D, H, F_, batch_first=True)
    layer.norm1 = nn.BatchNorm1d(D)
    with pytest.raises(TypeError, match="norm: expected torch.nn.LayerNorm or .*; got torch.nn.BatchNorm1d"):
        layer(x)
    layer = LieTrotterEncoderLayer(D, H, F_, batch_first=True)
    layer.self_attn = nn.MultiheadAttention(D, H, add_zero_attn=True, batch_first=True)
    with pytest.raises(ValueError, match="attention: expected .* without add_bias_kv and add_zero_attn"):
        layer(x)
    layer = LieTrotterEncoderLayer(D, H, F_, batch_first=True)
    layer.self_attn = nn.Identity()
    with pytest.raises(TypeError, match="self_attn: expected torch.nn.MultiheadAttention; got torch.nn.Identity"):
        layer(x)
