"""Claim: ``NGPT`` is the normalised Transformer of its paper: it agrees with the equations written out, and a training
on real text keeps every matrix normalised to 1e-6 after every step and learns."""

import copy
import math
from pydoc_data.topics import topics

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from macaron_ops.nn import NGPT, MacaronLM, NGPTLayer, keep_normalized
from tests.rule import assert_draws_by_rule

D, HEADS, VOCAB = 24, 3, 17


def small(dtype: torch.dtype = torch.float64, **options) -> NGPT:
    model = NGPT(VOCAB, D, HEADS, 2, **options).to(torch.float64)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 or name.endswith("qk_scale"):
                parameter.mul_(1 + 0.3 * torch.randn_like(parameter)).mul_(torch.sign(torch.randn_like(parameter)))
            parameter.copy_(parameter.bfloat16())
    return model.to(dtype)


def unit(x: Tensor) -> Tensor:
    return x / x.square().sum(-1, keepdim=True).sqrt()


def published(model: NGPT, tokens: Tensor, heads: int = HEADS) -> Tensor:
    """Sections 2.1 to 2.6 and algorithm 1 of the paper in plain PyTorch, with the model's parameters."""
    h = model.tokens.weight[tokens]
    length, width = h.shape[1:]
    head_dim, base = width // heads, 1 / math.sqrt(width)
    frequency = 10000.0 ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angles = torch.arange(length, dtype=torch.float32)[:, None] * frequency
    cos, sin = angles.cos().to(h.dtype), angles.sin().to(h.dtype)

    def rotate(x):
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)

    for layer in model.layers:
        projected = (h @ w.T for w in layer.in_proj.weight.chunk(3))
        q, k, v = (x.unflatten(-1, (heads, head_dim)).transpose(1, 2) for x in projected)
        s_qk = (layer.qk_scale / base)[:, None]
        q, k = (unit(rotate(x)) * s_qk for x in (q, k))
        scores = q @ k.transpose(-1, -2) * math.sqrt(head_dim)
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        attended = (scores.masked_fill(future, -math.inf).softmax(-1) @ v).transpose(1, 2).flatten(-2)
        target = unit(attended @ layer.out_proj.weight.T)
        h = unit(h + 0.05 / base * layer.attention_alpha.abs() * (target - h))
        v, u = (h @ layer.linear1.weight.T * layer.hidden_scale * math.sqrt(width)).chunk(2, -1)
        target = unit((v * torch.sigmoid(v) * u) @ layer.linear2.weight.T)
        h = unit(h + 0.05 / base * layer.ffn_alpha.abs() * (target - h))
    return model.logit_scale / base * (h @ model.head.weight.T)


@pytest.mark.parametrize("save", ["fast", "lean"])
def test_the_published_equations(save):
    model, tokens = small(save=save), torch.randint(VOCAB, (2, 9))
    twin = copy.deepcopy(model)
    y, expected = model(tokens), published(twin, tokens)
    torch.testing.assert_close(y, expected)
    grad = torch.randn_like(y)
    y.backward(grad), expected.backward(grad)
    for (name, parameter), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_narrow_dtypes_keep_the_rule(dtype):
    exact = small()
    model = copy.deepcopy(exact).to(dtype)

    def draw(seed):
        torch.manual_seed(seed)
        tokens = torch.randint(VOCAB, (2, 9))
        found = []
        for call, m in ((model, model), (lambda t: published(model, t), model), (lambda t: published(exact, t), exact)):
            m.zero_grad()
            y = call(tokens)
            (y * torch.linspace(-1, 1, y.numel()).view(y.shape).bfloat16().to(y.dtype)).sum().backward()
            found.append({"y": y.detach(), **{name: p.grad.clone() for name, p in m.named_parameters()}})
        return {name: tuple(f[name] for f in found) for name in found[0]}

    assert_draws_by_rule(draw)


def lengths(model: NGPT) -> list[Tensor]:
    """Of every row, or column, that the paper normalises."""
    rows = [model.tokens.weight, model.head.weight]
    for layer in model.layers:
        rows += [layer.in_proj.weight, layer.linear1.weight, layer.out_proj.weight.T, layer.linear2.weight.T]
    return [row.detach().double().norm(dim=1) for row in rows]


def test_training_on_real_text_keeps_the_weights_on_the_sphere():
    text = topics["assignment"] + topics["class"] + topics["function"]
    alphabet = sorted(set(text))
    ids = torch.tensor([alphabet.index(character) for character in text])
    model = NGPT(len(alphabet), 48, 4, 2, 96)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    keep_normalized(model, optimizer)
    assert all((length - 1).abs().max() < 1e-6 for length in lengths(model))
    losses = []
    for _ in range(60):
        at = torch.randint(len(ids) - 33, (8, 1)) + torch.arange(33)
        _, loss = model(ids[at][:, :-1], ids[at][:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        assert all((length - 1).abs().max() < 1e-6 for length in lengths(model))
    counts = torch.bincount(ids).double() / len(ids)
    entropy = -(counts[counts > 0] * counts[counts > 0].log()).sum().item()
    assert sum(losses[-5:]) / 5 < entropy - 0.3 < losses[0] - 0.3  # it knows more than how often a letter occurs
    tokens = ids[:33][None]
    torch.testing.assert_close(model.double()(tokens), published(model, tokens, 4))


def test_without_the_hook_the_weights_leave_the_sphere_and_one_call_brings_them_back():
    model, tokens = NGPT(VOCAB, D, HEADS, 2), torch.randint(VOCAB, (2, 9))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    handle = keep_normalized(model, optimizer)
    handle.remove()
    model(tokens, tokens)[1].backward()
    optimizer.step()
    assert all((length - 1).abs().max() > 1e-4 for length in lengths(model))
    before = model.layers[0].out_proj.weight.detach().clone()
    model.normalize_weights()
    assert all((length - 1).abs().max() < 1e-6 for length in lengths(model))
    torch.testing.assert_close(model.layers[0].out_proj.weight.detach(), F.normalize(before, dim=0))


def test_a_layer_keeps_points_on_the_sphere_and_sees_no_future():
    layer, h = NGPTLayer(D, HEADS, 40).double(), F.normalize(torch.randn(2, 7, D).double(), dim=-1)
    y = layer(h)
    torch.testing.assert_close(y.norm(dim=-1), torch.ones(2, 7).double())
    changed = h.clone()
    changed[:, 5:] = F.normalize(torch.randn(2, 2, D).double(), dim=-1)
    torch.testing.assert_close(layer(changed)[:, :5], y[:, :5])


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="nhead: expected a divisor of d_model = 24; got 5"):
        NGPTLayer(24, 5)
    with pytest.raises(ValueError, match="save: expected one of 'fast', 'lean'; got 'slow'"):
        NGPTLayer(24, 3, save="slow")
    lm = MacaronLM(9, 8, 2, 1)
    with pytest.raises(ValueError, match="model: expected one with an NGPTLayer; got MacaronLM"):
        keep_normalized(lm, torch.optim.SGD(lm.parameters(), 0.1))
