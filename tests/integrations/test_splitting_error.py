"""Claim: ``splitting_error`` measures a model's own layers against the flow of their own fields: its numbers are those
of the model's modules put together by hand, and follow the theory where the fields are small."""

import importlib.util

import pytest
import torch
from torch import nn

import macaron_ops
from macaron_ops.integrations.splitting_error import MEASURES
from macaron_ops.splitting import integrate
from tests.nn.tools import randomize

D, H, F = 8, 2, 12


def encoder(norm_first=True, layers=2, batch_first=True, scale=1.0):
    layer = nn.TransformerEncoderLayer(D, H, F, batch_first=batch_first, norm_first=norm_first, dtype=torch.float64)
    model = randomize(nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)).eval()
    with torch.no_grad():
        for layer in model.layers:
            for last in (layer.self_attn.out_proj, layer.linear2):
                last.weight.mul_(scale)
                last.bias.mul_(scale)
    return model


def sublayers(layer, padding=None):
    """The two sublayers by torch's own modules."""
    pre = layer.norm_first

    def attend(x):
        z = layer.norm1(x) if pre else x
        y = x + layer.self_attn(z, z, z, key_padding_mask=padding, need_weights=False)[0]
        return y if pre else layer.norm1(y)

    def ffn(x):
        y = x + layer.linear2(torch.relu(layer.linear1(layer.norm2(x) if pre else x)))
        return y if pre else layer.norm2(y)

    return attend, ffn


@pytest.mark.parametrize("norm_first", [True, False])
@torch.no_grad()
def test_against_the_modules(norm_first):
    model, x = encoder(norm_first, scale=0.3), torch.randn(2, 5, D, dtype=torch.float64)
    padding = torch.zeros(2, 5, dtype=torch.bool)
    padding[1, 3:] = True
    state = {name: value.clone() for name, value in model.state_dict().items()}
    run = {"src": x, "src_key_padding_mask": padding}
    found = macaron_ops.splitting_error(model, run, tokens=~padding, tolerance=1e-4)
    assert [(layer.name, layer.cls) for layer in found] == [(f"layers.{i}", "TransformerEncoderLayer") for i in (0, 1)]
    for layer, result in zip(model.layers, found, strict=True):
        attend, ffn = sublayers(layer, padding)
        fields = {"A": lambda x, s=attend: s(x) - x, "B": lambda x, s=ffn: s(x) - x}

        def by(scheme, substep, steps, fields=fields, x=x):
            return integrate(fields, x, 0.0, 1.0, steps, scheme, substep=substep)

        flow = by("unsplit", "rk4", 64)
        moved = (flow - x).norm(dim=-1)
        expected = {
            "lie_trotter": ffn(attend(x)) - flow,
            "strang": by("strang_BAB", "euler", 1) - flow,
            "unsplit": x + fields["A"](x) + fields["B"](x) - flow,
            "apart": ffn(attend(x)) - by("strang_BAB", "euler", 1),
        }
        torch.testing.assert_close(result.moved, moved[~padding], rtol=1e-3, atol=0)
        torch.testing.assert_close(result.size, x.norm(dim=-1)[~padding])
        for measure, difference in expected.items():
            ratio = (difference.norm(dim=-1) / moved)[~padding]
            torch.testing.assert_close(result.errors[measure], ratio, rtol=1e-2, atol=1e-3)
        assert set(result.errors) == set(MEASURES) and result.resolved <= 1e-4
        x = layer(x, src_key_padding_mask=padding)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in state.items())
    assert type(model.layers[0]) is nn.TransformerEncoderLayer


def test_small_fields_follow_the_theory():
    """With fields of size e, exact Lie-Trotter is off by the commutator, in e^2, exact Strang in e^3; Euler's substeps
    in e^2 whatever the splitting. (All divided by what the flow moves, of size e.)"""
    errors = []
    for scale in (0.02, 0.01):
        torch.manual_seed(0)
        x = torch.randn(1, 6, D, dtype=torch.float64)
        (found,) = macaron_ops.splitting_error(encoder(layers=1, scale=scale), x, tolerance=1e-9)
        torch.testing.assert_close(found.errors["lie_trotter_exact"], found.errors["commutator"], rtol=0.1, atol=0)
        errors.append({measure: found.median(measure) for measure in MEASURES})
    slopes = {measure: errors[0][measure] / errors[1][measure] for measure in MEASURES}
    assert slopes.pop("strang_exact") == pytest.approx(4, rel=0.1)
    assert all(slope == pytest.approx(2, rel=0.1) for slope in slopes.values())


@pytest.mark.parametrize("kind", ["alone", "replaced", "built fused", "unbatched", "time first"])
def test_every_form_of_a_layer(kind):
    x = torch.randn(2, 5, D, dtype=torch.float64)
    plain = encoder(layers=1)
    (expected,) = macaron_ops.splitting_error(plain, x)
    model, inputs = plain, (x,)
    if kind == "alone":
        model = plain.layers[0]
    elif kind == "replaced":
        macaron_ops.replace_layers(model)
    elif kind == "built fused":
        model = macaron_ops.nn.LieTrotterEncoderLayer(D, H, F, batch_first=True, norm_first=True, dtype=torch.float64)
        model.load_state_dict(plain.layers[0].state_dict())
    elif kind == "time first":
        model = encoder(layers=1, batch_first=False)
        model.load_state_dict(plain.state_dict())
        inputs = (x.transpose(0, 1),)
    elif kind == "unbatched":
        (expected,) = macaron_ops.splitting_error(plain, x[:1])
        inputs = (x[0],)
    (found,) = macaron_ops.splitting_error(model, inputs)
    for measure in MEASURES:
        torch.testing.assert_close(found.errors[measure], expected.errors[measure])


def test_a_decoder_layer_has_three_fields():
    layer = randomize(nn.TransformerDecoderLayer(D, H, F, batch_first=True, dtype=torch.float64)).eval()
    tgt, memory = torch.randn(2, 5, D, dtype=torch.float64), torch.randn(2, 4, D, dtype=torch.float64)
    (found,) = macaron_ops.splitting_error(layer, (tgt, memory))
    assert found.errors["lie_trotter"].shape == (10,)
    with torch.no_grad():
        lie_trotter = layer(tgt, memory)
        self_attention = layer.norm1(tgt + layer._sa_block(tgt, None, None))
        cross = layer.norm2(tgt + layer._mha_block(tgt, memory, None, None))
        ffn = layer.norm3(tgt + layer._ff_block(tgt))
        unsplit = self_attention + cross + ffn - 2 * tgt
        apart = (lie_trotter - unsplit).norm(dim=-1).flatten()
    bound = (found.errors["lie_trotter"] + found.errors["unsplit"]) * found.moved
    assert (apart <= bound + 1e-9).all()


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs transformers")
def test_bert_drops_padding():
    import transformers

    config = transformers.BertConfig(
        vocab_size=20, hidden_size=D, num_hidden_layers=2, num_attention_heads=H, intermediate_size=F
    )
    model = transformers.BertModel(config).eval()
    ids, mask = torch.randint(1, 20, (2, 6)), torch.ones(2, 6, dtype=torch.long)
    mask[1, 4:] = 0
    found = macaron_ops.splitting_error(model, {"input_ids": ids, "attention_mask": mask})
    assert [layer.name for layer in found] == ["encoder.layer.0", "encoder.layer.1"]
    assert {layer.cls for layer in found} == {"BertLayer"}
    assert all(layer.moved.shape == (10,) for layer in found)
    alone = macaron_ops.splitting_error(model, {"input_ids": ids[1:, :4]})
    for measure in MEASURES:
        torch.testing.assert_close(found[1].errors[measure][6:], alone[1].errors[measure], rtol=5e-3, atol=5e-3)


def test_refusals():
    x = torch.randn(1, 3, D)
    with pytest.raises(
        ValueError, match="model: expected one with layers of torch or of the BERT family; nothing replaced"
    ):
        macaron_ops.splitting_error(nn.Linear(D, D), x)
    with pytest.raises(TypeError, match="model: expected a torch.nn.Module; got int"):
        macaron_ops.splitting_error(3, x)
    with pytest.raises(TypeError, match="inputs: expected a tensor, a sequence or a mapping; got int"):
        macaron_ops.splitting_error(encoder(), 3)
