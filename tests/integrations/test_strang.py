"""Claim: ``to_strang`` makes of a standard model a Macaron model of its own numbers, whose distance from it is of
second order in the sublayers' updates."""

import copy

import pytest
import torch
from torch import nn

import macaron_ops
from macaron_ops.nn import LieTrotterEncoderLayer, MacaronDecoderLayer, MacaronEncoderLayer


def encoder(size: float = 1.0, layers: int = 1, **options) -> nn.TransformerEncoder:
    """The updates of all sublayers are multiplied by ``size``."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True, norm_first=True, dropout=0.0, **options)
    model = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for layer in model.layers:
            for linear in (layer.self_attn.out_proj, layer.linear2):
                linear.weight.mul_(size), linear.bias.mul_(size) if linear.bias is not None else None
    return model


def distance(model: nn.Module, x: torch.Tensor) -> float:
    twin = copy.deepcopy(model)
    macaron_ops.to_strang(twin)
    return ((twin(x) - model(x)).norm() / model(x).norm()).item()


def test_the_distance_is_of_second_order():
    x = torch.randn(2, 5, 16).double()
    distances = [distance(encoder(size), x) for size in (0.04, 0.02, 0.01)]
    assert distances[0] > 1e-6
    for wide, narrow in zip(distances, distances[1:], strict=False):
        assert 3.7 < wide / narrow < 4.3


def test_without_attention_the_two_halves_are_the_ffn_up_to_its_own_second_order():
    model, x = encoder(1e-4), torch.randn(2, 5, 16).double()
    with torch.no_grad():
        model.layers[0].self_attn.out_proj.weight.zero_(), model.layers[0].self_attn.out_proj.bias.zero_()
    twin = copy.deepcopy(model)
    macaron_ops.to_strang(twin)
    update = (model(x) - x).norm()
    assert (twin(x) - model(x)).norm() < 1e-3 * update


@pytest.mark.parametrize("bias", [True, False])
def test_the_layers_and_their_numbers(bias):
    model = nn.Transformer(
        16, 4, 2, 1, 24, dropout=0.1, activation="gelu", batch_first=True, norm_first=True, bias=bias
    )
    model.encoder.layers[0].dropout.p, model.encoder.layers[0].self_attn.dropout = 0.2, 0.3
    before = copy.deepcopy(model.encoder.layers[0])
    report = macaron_ops.to_strang(model.eval(), save="lean")
    assert [r.after for r in report.replaced] == ["MacaronEncoderLayer"] * 2 + ["MacaronDecoderLayer"]
    assert report.left == [] and "split 3 layers" in str(report)
    layer = model.encoder.layers[0]
    assert type(layer) is MacaronEncoderLayer and type(model.decoder.layers[0]) is MacaronDecoderLayer
    assert (layer.dropout.p, layer.self_attn.dropout, layer.dropout1.p, layer.save) == (0.2, 0.3, 0.1, "lean")
    assert not layer.training and layer.activation == "gelu"
    assert torch.equal(torch.cat([layer.macaron_linear1.weight, layer.linear1.weight]), before.linear1.weight)
    joined = torch.cat([layer.macaron_linear2.weight, layer.linear2.weight], dim=1)
    assert torch.equal(joined, 2 * before.linear2.weight)
    assert torch.equal(layer.macaron_norm.weight, layer.norm2.weight)
    source, target = torch.randn(2, 5, 16), torch.randn(2, 3, 16)
    model(source, target).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_replaced_layers_and_what_is_left():
    model = encoder(layers=2)
    macaron_ops.replace_layers(model)
    model.layers[1].linear1 = nn.Linear(16, 23).double()
    report = macaron_ops.to_strang(model)
    assert [r.before for r in report.replaced] == ["LieTrotterEncoderLayer"]
    assert [left.reason for left in report.left] == ["23 hidden units cannot be halved"]
    assert type(model.layers[1]) is LieTrotterEncoderLayer
    assert not macaron_ops.to_strang(nn.Linear(2, 2)).replaced


def test_wrong_arguments_are_refused():
    with pytest.raises(TypeError, match="model: expected a torch.nn.Module; got int"):
        macaron_ops.to_strang(3)
    with pytest.raises(ValueError, match="split: expected one of 'half'; got 'third'"):
        macaron_ops.to_strang(encoder(), "third")
    with pytest.raises(ValueError, match="model: expected one that holds layers; got a layer"):
        macaron_ops.to_strang(encoder().layers[0])
