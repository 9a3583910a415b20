"""Claim: ``record_trajectories`` measures the tokens that a model's own layers take and return, in every form of layer,
leaves the model as it was, and its Jacobian's singular values are those of the whole matrix."""

import importlib.util
import math

import pytest
import torch
from torch import nn

import macaron_ops
from macaron_ops.integrations import FAMILIES, jacobian_spectrum
from macaron_ops.integrations.replace import known_layers
from tests.integrations.tiny_models import MODELS, tiny
from tests.nn.tools import randomize

D, H, F = 8, 2, 12
TRANSFORMERS = importlib.util.find_spec("transformers") is not None


def encoder(batch_first=True, dtype=torch.float64, layers=2, norm_first=False):
    layer = nn.TransformerEncoderLayer(D, H, F, 0.1, batch_first=batch_first, norm_first=norm_first, dtype=dtype)
    return randomize(nn.TransformerEncoder(layer, layers, enable_nested_tensor=False))


def padding():
    keep = torch.ones(2, 6, dtype=torch.bool)
    keep[1, 4:] = False
    return keep


def states(model, x, **kwargs):
    """The tokens by torch's modules alone, one layer after another."""
    model.eval()
    found = [x]
    for layer in model.layers:
        found.append(layer(found[-1], **kwargs))
    return found


@torch.no_grad()
def test_every_number_is_that_of_its_definition():
    model, x, keep = encoder(), torch.randn(2, 6, D, dtype=torch.float64), padding()
    model.train()
    inputs = {"src": x, "src_key_padding_mask": ~keep}
    found = macaron_ops.record_trajectories(model, inputs, tokens=keep, betas=(0.5, 6.0), bins=10, close=0.3)
    assert model.training and all(module.training for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())
    assert [(r.name, r.cls) for r in found] == [
        ("input", "TransformerEncoder"),
        ("layers.0", "TransformerEncoderLayer"),
        ("layers.1", "TransformerEncoderLayer"),
    ]
    for record, state in zip(found, states(model, x, src_key_padding_mask=~keep), strict=True):
        histogram = torch.zeros(10)
        for b in range(2):
            rows = state[b][keep[b]]
            n = len(rows)
            cloud = rows / rows.norm(dim=-1, keepdim=True)
            products = cloud @ cloud.T
            pairs = products[~torch.eye(n, dtype=torch.bool)]
            histogram += torch.histc(pairs.float(), 10, -1, 1)
            assert record.lengths[b].item() == pytest.approx(rows.norm(dim=-1).mean().item())
            assert record.mean_product[b].item() == pytest.approx(pairs.mean().item())
            share = torch.linalg.svdvals(cloud)
            share = share / share.sum()
            assert record.effective_rank[b].item() == pytest.approx(math.exp(-(share * share.log()).sum()))
            for beta in (0.5, 6.0):
                expected = torch.exp(beta * (products - 1)).mean().item()
                assert record.energies[beta][b].item() == pytest.approx(expected)
            groups = leaders(products, 0.3)
            assert record.clusters[b] == len(groups)
            assert record.largest_cluster[b].item() == pytest.approx(max(groups) / n)
        torch.testing.assert_close(record.histogram, (histogram / histogram.sum()).double(), rtol=1e-6, atol=1e-9)


def leaders(products, close):
    free, sizes = list(range(len(products))), []
    while free:
        group = [i for i in free if i == free[0] or products[free[0], i] > close]
        sizes.append(len(group))
        free = [i for i in free if i not in group]
    return sizes


@pytest.mark.parametrize("norm_first", [True, False])
def test_the_spectrum_is_that_of_the_whole_jacobian(norm_first):
    """With padding: rows and columns of real tokens alone."""
    model, x, keep = encoder(norm_first=norm_first), torch.randn(2, 6, D, dtype=torch.float64), padding()
    inputs = {"src": x, "src_key_padding_mask": ~keep}
    found = macaron_ops.record_trajectories(model, inputs, tokens=keep, singular_values=3)
    assert found[0].spectrum is None and not found[1].spectrum.values.requires_grad  # nothing is kept for a backward
    model.eval()
    for layer, record in zip(model.layers, found[1:], strict=True):
        for b in range(2):
            n = int(keep[b].sum())

            def one(rows, b=b, n=n, x=x, layer=layer):
                whole = torch.cat([rows, x[b, n:]])[None]
                return layer(whole, src_key_padding_mask=~keep[b : b + 1])[0, :n]

            matrix = torch.autograd.functional.jacobian(one, x[b, :n]).reshape(n * D, n * D)
            exact = torch.linalg.svdvals(matrix)
            off = (record.spectrum.values[b][:, None] - exact).abs().min(-1).values
            assert (off <= record.spectrum.residuals[b] + 1e-12).all()
            torch.testing.assert_close(record.spectrum.values[b], exact[:3], rtol=1e-3, atol=0)
        x = layer(x, src_key_padding_mask=~keep).detach()


def test_all_the_steps_give_all_the_spectrum():
    """A linear map, known singular values, one of them twice; then a space that is exhausted early."""
    left, right = (torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64)).Q for _ in "ab")
    values = torch.tensor([3.0, 2.0, 1.0, 0.5, 0.0], dtype=torch.float64)
    matrix = left @ values.diag() @ right
    found = jacobian_spectrum(lambda x: x @ matrix.T, torch.randn(2, 5, dtype=torch.float64), 5)
    torch.testing.assert_close(found.values, values.expand(2, 5), rtol=1e-12, atol=1e-12)
    found = jacobian_spectrum(lambda x: 2 * x, torch.randn(2, 5, dtype=torch.float64), 1, steps=3)
    torch.testing.assert_close(found.values, torch.full((2, 1), 2.0, dtype=torch.float64))


@pytest.mark.parametrize("kind", ["replaced", "layers", "names", "time first", "unbatched", "alone"])
def test_every_form_of_a_layer(kind):
    x, model = torch.randn(2, 5, D, dtype=torch.float64), encoder()
    expected = macaron_ops.record_trajectories(model, x, singular_values=2, generator=torch.Generator())
    inputs, options = x, {}
    if kind == "replaced":
        macaron_ops.replace_layers(model)
    elif kind == "layers":
        options = {"layers": list(model.layers)}
    elif kind == "names":
        options = {"layers": ["layers.0", "layers.1"]}
    elif kind == "time first":
        other = encoder(batch_first=False)
        other.load_state_dict(model.state_dict())
        model, inputs = other, x.transpose(0, 1)
    elif kind == "unbatched":
        inputs = (x[0],)
        expected = macaron_ops.record_trajectories(model, x[:1], singular_values=2, generator=torch.Generator())
    elif kind == "alone":
        model, expected = model.layers[0], expected[:2]
    found = macaron_ops.record_trajectories(model, inputs, singular_values=2, generator=torch.Generator(), **options)
    for record, other in zip(found, expected, strict=True):
        torch.testing.assert_close(record.mean_product, other.mean_product)
        torch.testing.assert_close(record.histogram, other.histogram)
        if other.spectrum:
            torch.testing.assert_close(record.spectrum.values, other.spectrum.values, rtol=1e-4, atol=0)


class Block(nn.Module):
    """No layer of a known family: mixes the tokens of a sequence and returns a tuple."""

    def __init__(self):
        super().__init__()
        self.mix, self.ffn = nn.Linear(5, 5, dtype=torch.float64), nn.Linear(D, D, dtype=torch.float64)

    def forward(self, x, scale=1.0):
        x = x + scale * self.mix(x.mT).mT
        return x + torch.tanh(self.ffn(x)), None


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x):
        for _ in range(2):  # each block is called twice
            for block in self.blocks:
                x, _ = block(x=x, scale=0.5)
        return x


def test_any_list_of_modules():
    """Layers that the package has never seen, called by keyword, several times, with other arguments: a record for each
    call, and the Jacobian of that call."""
    model, x = Stack(), torch.randn(2, 5, D, dtype=torch.float64)
    with pytest.raises(ValueError, match="none is known"):
        macaron_ops.record_trajectories(model, x)
    found = macaron_ops.record_trajectories(model, x, layers=model.blocks, singular_values=40)
    assert [record.name for record in found] == ["input", *["blocks.0", "blocks.1"] * 2]
    for record, block in zip(found[1:], [*model.blocks] * 2, strict=True):
        matrix = torch.func.vmap(torch.func.jacrev(lambda one, block=block: block(one, 0.5)[0]))(x)
        exact = torch.linalg.svdvals(matrix.reshape(2, 5 * D, 5 * D)).detach()
        torch.testing.assert_close(record.spectrum.values, exact, rtol=1e-9, atol=1e-12)
        x = block(x, 0.5)[0].detach()
        cloud = x / x.norm(dim=-1, keepdim=True)
        products = cloud @ cloud.mT - torch.eye(5, dtype=torch.float64)
        torch.testing.assert_close(record.mean_product, products.sum((-1, -2)) / 20)


FRAMES = {"wav2vec2_conformer": (2, 8), "parakeet": (2, 9)}  # what the layers see of the inputs
NAMES = ("roberta", "distilbert", "vit", "gpt2", "llama", "whisper", "wav2vec2_bert", "granite_speech", "gemma3n_audio")


@pytest.mark.skipif(not TRANSFORMERS, reason="needs transformers")
@pytest.mark.parametrize("name", [*NAMES, *FRAMES])
def test_families(name):
    """Their layers are found, run once more for the Jacobian, caches and all, and leave the outputs as they were; the
    same numbers come from the fused layers."""
    model, inputs = tiny(name).eval(), MODELS[name].inputs()
    options = {"singular_values": 2, "tokens": torch.ones(FRAMES[name]) if name in FRAMES else None}
    with torch.no_grad():
        before = model(**inputs)[0]
        found = macaron_ops.record_trajectories(model, inputs, generator=torch.Generator(), **options)
        assert torch.equal(model(**inputs)[0], before)
    assert [record.name for record in found[1:]] == [layer for layer, _ in known_layers(model)]
    macaron_ops.replace_layers(model, strict=True)
    fused = macaron_ops.record_trajectories(model, inputs, generator=torch.Generator(), **options)
    for record, other in zip(found[1:], fused[1:], strict=True):
        assert record.histogram.sum().item() == pytest.approx(1.0)
        assert record.cls == other.cls == MODELS[name].layer
        torch.testing.assert_close(other.mean_product, record.mean_product, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(other.spectrum.values, record.spectrum.values, rtol=1e-3, atol=0)


def test_known_layers_are_the_outermost():
    model = nn.Sequential(encoder(layers=1), nn.Linear(D, D), encoder(layers=2))
    assert [name for name, _ in known_layers(model)] == ["0.layers.0", "2.layers.0", "2.layers.1"]
    assert known_layers(model[0].layers[0]) == [("", model[0].layers[0])]
    assert FAMILIES and known_layers(nn.Linear(2, 2)) == []


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model": 3}, TypeError, "model: expected a torch.nn.Module; got int"),
        ({"model": nn.Linear(D, D)}, ValueError, "model: expected one with layers of a known family"),
        ({"inputs": 3}, TypeError, "inputs: expected a tensor, a sequence or a mapping; got int"),
        ({"betas": (0.0,)}, ValueError, "betas: expected numbers above 0"),
        ({"betas": (math.nan,)}, ValueError, "betas: expected a finite number"),
        ({"bins": 0}, ValueError, "bins: expected an integer of at least 1"),
        ({"layers": ["nowhere"]}, ValueError, "layers: expected names of modules of the model; it has no 'nowhere'"),
        (
            {"layers": [nn.Linear(2, 2)]},
            ValueError,
            "layers: expected modules of the model, or their names; got Linear",
        ),
        ({"layers": []}, ValueError, "layers: expected at least one"),
        ({"tokens": torch.ones(2, 5)}, ValueError, r"tokens: expected shape \(2, 6\), as the tokens of layers.0"),
        ({"tokens": torch.zeros(2, 6)}, ValueError, "tokens: expected at least one that counts in each sequence"),
        ({"betas": (800.0,)}, ValueError, "betas: expected numbers above 0 and at most 700; got"),
        ({"layers": "layers.0"}, TypeError, "layers: expected a list of modules or names; got str"),
        ({"layers": nn.Linear(2, 2)}, TypeError, "layers: expected a list of modules or names; got Linear"),
        ({"tokens": [[1] * 6] * 2}, TypeError, r"tokens: expected a tensor \(B, T\); got list"),
        ({"inputs": torch.full((2, 6, D), math.nan).double()}, ValueError, "inputs: expected ones that keep .* finite"),
        ({"singular_values": -1}, ValueError, "singular_values: expected an integer of at least 1; got -1"),
        ({"singular_values": 1000}, ValueError, "count: expected at most the 48 elements"),
    ],
)
def test_refusals(change, error, message):
    given = {"model": encoder(), "inputs": torch.randn(2, 6, D, dtype=torch.float64)} | change
    with pytest.raises(error, match=message):
        macaron_ops.record_trajectories(given.pop("model"), given.pop("inputs"), **given)
