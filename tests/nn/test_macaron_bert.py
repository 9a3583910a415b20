"""Claim: ``MacaronBert.from_fairseq`` computes what the Macaron paper's own code computes of a BERT checkpoint, its
oddities included, and ``to_fairseq`` gives the checkpoint back."""

import math

import pytest
import torch
from torch import Tensor

from macaron_ops.nn import MacaronBert
from macaron_ops.nn.macaron_bert import ARCHITECTURES

D, HEADS, HIDDEN, VOCAB, PAD = 24, 12, 20, 11, 1


def checkpoint(arch: str) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}

    def linear(name, rows, columns):
        state[f"{name}.weight"] = torch.randn(rows, columns) / math.sqrt(columns)
        state[f"{name}.bias"] = torch.randn(rows) / 5

    for i in range(2):
        layer = f"encoder.layers.{i}"
        state[f"{layer}.self_attn.in_proj_weight"] = torch.randn(3 * D, D) / 5
        state[f"{layer}.self_attn.in_proj_bias"] = torch.randn(3 * D) / 5
        linear(f"{layer}.self_attn.out_proj", D, D)
        for prefix in ("macaron_", ""):
            linear(f"{layer}.{prefix}fc1", HIDDEN, D), linear(f"{layer}.{prefix}fc2", D, HIDDEN)
    state["encoder.embed_tokens.weight"] = torch.randn(VOCAB, D) / math.sqrt(D)
    state["encoder.embed_segment.weight"] = torch.randn(2, D) / math.sqrt(D)
    if "classifier" in arch:
        linear("classifier", 3, D)
    else:
        linear("classifier", 1, D), linear("mid_layer.0", D, D)
        state["mid_layer.2.weight"], state["mid_layer.2.bias"] = 1 + torch.randn(D) / 5, torch.randn(D) / 5
        state["embed_out"] = state["encoder.embed_tokens.weight"]
    state = {name: t.double() for name, t in state.items()}
    return state | {"encoder.version": torch.tensor([2.0]), "encoder.embed_positions._float_tensor": torch.zeros(1)}


def published(state: dict[str, Tensor], tokens: Tensor, segments: Tensor, masked: Tensor | None):
    """The model by its equations, without a line of this package."""

    def linear(name, x):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(x):
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()

    def gelu(x):
        return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))

    real = tokens != PAD
    t = torch.where(real, PAD + real.cumsum(-1), 0).double()
    w = torch.exp(-math.log(10000) / (D // 2 - 1) * torch.arange(D // 2).double())
    angles = t[..., None] * w
    x = math.sqrt(D) * state["encoder.embed_tokens.weight"][tokens]
    x = x + torch.cat([angles.sin(), angles.cos()], -1) * real[..., None]
    x = x + state["encoder.embed_segment.weight"][segments]
    for i in range(2):
        layer = f"encoder.layers.{i}"
        x = x + 0.5 * linear(f"{layer}.macaron_fc2", torch.relu(linear(f"{layer}.macaron_fc1", norm(x))))
        ws, bs = state[f"{layer}.self_attn.in_proj_weight"].chunk(3), state[f"{layer}.self_attn.in_proj_bias"].chunk(3)
        q, k, v = ((norm(x) @ w.T + b).unflatten(-1, (HEADS, -1)).transpose(1, 2) for w, b in zip(ws, bs, strict=True))
        scores = (q @ k.transpose(-1, -2) / math.sqrt(D // HEADS)).masked_fill(~real[:, None, None], -math.inf)
        x = x + linear(f"{layer}.self_attn.out_proj", (scores.softmax(-1) @ v).transpose(1, 2).flatten(-2))
        x = x + 0.5 * linear(f"{layer}.fc2", gelu(linear(f"{layer}.fc1", norm(x))))
    x = norm(x)
    scores = linear("classifier", x[:, 0])
    if masked is None:
        return scores
    hidden = norm(gelu(linear("mid_layer.0", x[masked]))) * state["mid_layer.2.weight"] + state["mid_layer.2.bias"]
    return hidden @ state["embed_out"].T, scores[:, 0]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_published_equations(arch):
    state = checkpoint(arch)
    tokens, segments = torch.randint(2, VOCAB, (3, 6)), torch.randint(0, 2, (3, 6))
    tokens[1, 4:] = PAD
    masked = None if "classifier" in arch else (torch.rand(3, 6) < 0.4) & (tokens != PAD)
    model = MacaronBert.from_fairseq(state, arch).eval()
    tensors = {name: t.clone().requires_grad_(t.dtype == torch.float64) for name, t in state.items()}
    if masked is not None:
        tensors["embed_out"] = tensors["encoder.embed_tokens.weight"]
    expected = published(tensors, tokens, segments, masked)
    actual = model(tokens, segments, masked)
    outputs = (expected, actual) if masked is not None else ((expected,), (actual,))
    for e, a in zip(*outputs, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-6, atol=1e-6)  # positions are float32's
    for output in outputs:
        sum((y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum() for y in output).backward()
    parameters, names = dict(model.named_parameters()), model._names()
    for ours, parameter in parameters.items():
        grad = tensors[names[ours]].grad
        if names[ours] in ("encoder.embed_tokens.weight", "encoder.embed_segment.weight"):
            grad[PAD] = parameter.grad[PAD]  # which nn.Embedding does not train
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-5, atol=1e-5, msg=lambda m, n=ours: f"{n}: {m}")
    again = model.to_fairseq()
    assert again.keys() == state.keys() and all(torch.equal(again[name], state[name]) for name in state)


def test_the_first_ffn_has_relu_and_the_second_gelu():
    arch = "transformer_bert_base_macaron"
    model = MacaronBert.from_fairseq(checkpoint(arch), arch, save="lean")
    first, _, second = model.layers[0].substeps()
    assert (first.kwargs["activation"], second.kwargs["activation"]) == ("relu", "gelu")
    assert first.kwargs["norm_weight"] is None and model.layers[0].save == "lean"
    assert model.head.weight is model.embedding.tokens.weight


def test_an_output_matrix_of_its_own():
    arch = "transformer_bert_L6_A12_macaron"
    state = checkpoint(arch)
    state["embed_out"] = torch.randn(VOCAB, D).double()
    model = MacaronBert.from_fairseq(state, arch)
    assert model.head.weight is not model.embedding.tokens.weight
    assert torch.equal(model.to_fairseq()["embed_out"], state["embed_out"])


def test_what_does_not_fit_is_refused():
    arch = "transformer_classifier_base_macaron"
    state = checkpoint(arch)
    with pytest.raises(ValueError, match="arch: expected one of 'transformer_bert_base_macaron'"):
        MacaronBert.from_fairseq(state, "transformer_bert_base")
    with pytest.raises(ValueError, match="got also encoder.layers.0.layer_norms.0.weight"):
        MacaronBert.from_fairseq({**state, "encoder.layers.0.layer_norms.0.weight": torch.ones(D)}, arch)
    with pytest.raises(ValueError, match="expected a tensor classifier.bias; there is none"):
        MacaronBert.from_fairseq({name: t for name, t in state.items() if name != "classifier.bias"}, arch)
    model, tokens = MacaronBert.from_fairseq(state, arch), torch.randint(2, VOCAB, (2, 4))
    with pytest.raises(ValueError, match="masked: expected a mask for the pretraining model alone; got Tensor"):
        model(tokens, masked=tokens > 3)
