"""Claim: ``MacaronTransformer.from_fairseq`` computes what the published equations say of a checkpoint of the paper's
own code, in all five translation architectures, and ``to_fairseq`` gives the checkpoint back."""

import argparse
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from macaron_ops.nn import MacaronTransformer
from macaron_ops.nn.macaron_net import ARCHITECTURES
from tests.rule import assert_draws_by_rule

D, WIDE, NARROW, VOCAB, PAD = 32, 24, 20, 13, 1


def checkpoint(arch: str, sharing: str = "decoder", dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Random tensors with the names and shapes of their code: two layers, an encoder FFN wider than the decoder's."""
    norm_first = ARCHITECTURES[arch].norm_first
    state: dict[str, Tensor] = {}

    def linear(name, rows, columns):
        state[f"{name}.weight"], state[f"{name}.bias"] = (
            torch.randn(rows, columns) / math.sqrt(columns),
            torch.randn(rows) / 5,
        )

    def norm(name):
        state[f"{name}.weight"], state[f"{name}.bias"] = 1 + torch.randn(D) / 5, torch.randn(D) / 5

    def attention(name):
        state[f"{name}.in_proj_weight"], state[f"{name}.in_proj_bias"] = (
            torch.randn(3 * D, D) / 6,
            torch.randn(3 * D) / 5,
        )
        linear(f"{name}.out_proj", D, D)

    for stack in ("encoder", "decoder"):
        state[f"{stack}.version"] = torch.tensor([2.0])
        state[f"{stack}.embed_positions._float_tensor"] = torch.zeros(1)
        state[f"{stack}.embed_tokens.weight"] = torch.randn(VOCAB, D) / math.sqrt(D)
        state[f"{stack}.embed_tokens.weight"][PAD] = 0
        for i in range(2):
            layer = f"{stack}.layers.{i}"
            attention(f"{layer}.self_attn")
            linear(f"{layer}.macaron_fc1", WIDE, D), linear(f"{layer}.macaron_fc2", D, WIDE)  # the decoder's, too
            hidden = WIDE if stack == "encoder" else NARROW
            linear(f"{layer}.fc1", hidden, D), linear(f"{layer}.fc2", D, hidden)
            if stack == "encoder":
                [norm(f"{layer}.layer_norms.{k}") for k in range(3)]
            else:
                attention(f"{layer}.encoder_attn")
                names = ("self_attn_layer_norm", "encoder_attn_layer_norm", "macaron_layer_norm", "final_layer_norm")
                [norm(f"{layer}.{name}") for name in names]
        if norm_first:
            norm(f"{stack}.layer_norm")
    if sharing == "none":
        state["decoder.embed_out"] = torch.randn(VOCAB, D) / math.sqrt(D)
    if sharing == "all":
        state["decoder.embed_tokens.weight"] = state["encoder.embed_tokens.weight"].clone()
    parameters = {name: t.bfloat16().to(dtype) for name, t in state.items()}
    return parameters | {name: t for name, t in state.items() if name.endswith(("version", "_float_tensor"))}


def published(state: dict[str, Tensor], arch: str, source: Tensor, target: Tensor) -> Tensor:
    """The model as Lu et al. 2019, section 3, and its code define it, without a line of this package."""
    heads, norm_first = ARCHITECTURES[arch].heads, ARCHITECTURES[arch].norm_first

    def linear(name, x):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(name, x):
        mean, variance = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
        return (x - mean) / (variance + 1e-5).sqrt() * state[f"{name}.weight"] + state[f"{name}.bias"]

    def sublayer(x, name, factor, function):
        return x + factor * function(norm(name, x)) if norm_first else norm(name, x + factor * function(x))

    def ffn(first, second):
        return lambda x: linear(second, torch.relu(linear(first, x)))

    def attend(name, blocked, memory=None):
        def function(x):
            w, b = state[f"{name}.in_proj_weight"].chunk(3), state[f"{name}.in_proj_bias"].chunk(3)
            given = x if memory is None else memory
            q, k, v = (s @ w[i].T + b[i] for i, s in enumerate((x, given, given)))
            q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
            scores = (q @ k.transpose(-1, -2) / math.sqrt(D // heads)).masked_fill(blocked, -math.inf)
            return linear(f"{name}.out_proj", (scores.softmax(-1) @ v).transpose(1, 2).flatten(-2))

        return function

    def embed(stack, tokens):
        real = tokens != PAD
        t = torch.where(real, PAD + real.cumsum(-1), 0).double()
        w = torch.exp(-math.log(10000) / (D // 2 - 1) * torch.arange(D // 2, dtype=torch.float64))
        angles = (t[..., None] * w).to(x_dtype)
        positions = torch.cat([angles.sin(), angles.cos()], -1) * real[..., None]
        return math.sqrt(D) * state[f"{stack}.embed_tokens.weight"][tokens] + positions

    x_dtype = state["encoder.embed_tokens.weight"].dtype
    padding = (source == PAD)[:, None, None, :]
    future = torch.ones(target.shape[1], target.shape[1], dtype=torch.bool).triu(1)
    x = embed("encoder", source)
    for i in range(2):
        layer = f"encoder.layers.{i}"
        x = sublayer(x, f"{layer}.layer_norms.2", 0.5, ffn(f"{layer}.macaron_fc1", f"{layer}.macaron_fc2"))
        x = sublayer(x, f"{layer}.layer_norms.0", 1.0, attend(f"{layer}.self_attn", padding))
        x = sublayer(x, f"{layer}.layer_norms.1", 0.5, ffn(f"{layer}.fc1", f"{layer}.fc2"))
    memory = norm("encoder.layer_norm", x) if norm_first else x
    y = embed("decoder", target)
    for i in range(2):
        layer = f"decoder.layers.{i}"
        y = sublayer(y, f"{layer}.macaron_layer_norm", 0.5, ffn(f"{layer}.macaron_fc1", f"{layer}.macaron_fc2"))
        y = sublayer(y, f"{layer}.self_attn_layer_norm", 1.0, attend(f"{layer}.self_attn", future))
        y = sublayer(y, f"{layer}.encoder_attn_layer_norm", 1.0, attend(f"{layer}.encoder_attn", padding, memory))
        y = sublayer(y, f"{layer}.final_layer_norm", 0.5, ffn(f"{layer}.fc1", f"{layer}.fc2"))
    y = norm("decoder.layer_norm", y) if norm_first else y
    return y @ state.get("decoder.embed_out", state["decoder.embed_tokens.weight"]).T


def tokens() -> tuple[Tensor, Tensor]:
    """Padded as their batches are: sources on the left, targets on the right."""
    source, target = torch.randint(2, VOCAB, (2, 7)), torch.randint(2, VOCAB, (2, 5))
    source[1, :3], target[1, 3:] = PAD, PAD
    return source, target


@pytest.mark.parametrize("sharing", ["none", "decoder", "all"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_published_equations(arch, sharing):
    state, (source, target) = checkpoint(arch, sharing), tokens()
    model = MacaronTransformer.from_fairseq(state, arch).double().eval()
    tensors = {name: t.clone().requires_grad_(t.dim() > 0) for name, t in state.items()}
    if sharing == "all":
        tensors["decoder.embed_tokens.weight"] = tensors["encoder.embed_tokens.weight"]
    real = target != PAD
    expected, actual = published(tensors, arch, source, target)[real], model(source, target)[real]
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)  # positions are float32's
    grad = torch.randn_like(expected)
    expected.backward(grad), actual.backward(grad)
    ours = model.to_fairseq()
    from macaron_ops.nn.macaron_net import _names

    parameters = dict(model.named_parameters())
    for name, theirs in _names(model).items():
        if name in parameters:
            expected_grad = tensors[theirs].grad
            if "embed_tokens" in theirs:
                expected_grad[PAD] = parameters[name].grad[PAD]  # which nn.Embedding does not train
            torch.testing.assert_close(parameters[name].grad, expected_grad, rtol=1e-5, atol=1e-5)
    assert ours.keys() == state.keys()
    assert all(torch.equal(ours[name], state[name]) for name in state)


@pytest.mark.parametrize("arch", ["transformer_iwslt_de_en_macaron", "transformer_wmt_en_de_big_t2t_macaron"])
def test_float32_keeps_the_rule(arch):
    state = checkpoint(arch, dtype=torch.float32)
    model = MacaronTransformer.from_fairseq(state, arch).eval()
    wide = {name: t.double() for name, t in state.items()}

    def draw(seed):
        torch.manual_seed(seed)
        source, target = tokens()
        real = target != PAD
        eager, exact = (published(s, arch, source, target)[real] for s in (state, wide))
        return {"y": (model(source, target)[real].detach(), eager, exact)}

    assert_draws_by_rule(draw)


def test_what_the_architecture_says():
    arch = "transformer_wmt_en_de_big_t2t_macaron"
    model = MacaronTransformer.from_fairseq(checkpoint(arch), arch, save="lean")
    layer = model.decoder.layers[0]
    assert (layer.self_attn.num_heads, layer.self_attn.dropout, layer.dropout.p, layer.dropout1.p) == (
        16,
        0.1,
        0.1,
        0.3,
    )
    assert layer.macaron_linear1.out_features == WIDE and layer.linear1.out_features == NARROW
    assert layer.save == "lean" and layer.norm_first and model.src_embedding.dropout.p == 0.3
    assert model.head.weight is model.tgt_embedding.tokens.weight
    assert all(p.requires_grad and not p.is_meta for p in model.parameters())


def test_files(tmp_path):
    arch = "transformer_iwslt_de_en_macaron_v2"
    state, (source, target) = checkpoint(arch, dtype=torch.float32), tokens()
    expected = MacaronTransformer.from_fairseq(state, arch).eval()(source, target)
    torch.save({"args": argparse.Namespace(arch=arch), "model": state}, tmp_path / "checkpoint.pt")
    torch.save(state, tmp_path / "state.pt")
    paths = ["checkpoint.pt", "state.pt"]
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file(state, tmp_path / "model.safetensors")
    for path in (*paths, "model.safetensors"):
        model = MacaronTransformer.from_fairseq(tmp_path / path, arch).eval()
        assert torch.equal(model(source, target), expected)


class Evil:
    def __reduce__(self):
        return (print, ("run",))


def test_a_file_cannot_run_code(tmp_path, capsys):
    torch.save({"model": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(Exception, match="[Ww]eights"):
        MacaronTransformer.from_fairseq(tmp_path / "evil.pt", "transformer_iwslt_de_en_macaron_v2")
    assert capsys.readouterr().out == ""


def test_older_names_of_the_decoders_norms():
    arch = "transformer_wmt_en_de_macaron_v2"
    state = checkpoint(arch)
    old = {}
    names = {"self_attn_layer_norm": "layer_norms.0", "encoder_attn_layer_norm": "layer_norms.1"}
    names["final_layer_norm"] = "layer_norms.2"
    for name, tensor in state.items():
        for new, before in names.items():
            name = name.replace(new, before) if name.startswith("decoder.") else name
        old[name] = tensor
    assert old.keys() != state.keys()
    again = MacaronTransformer.from_fairseq(old, arch).to_fairseq()
    assert all(torch.equal(again[name], state[name]) for name in state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("decoder.layers.1.fc2.bias"), "expected a tensor decoder.layers.1.fc2.bias; there is none"),
        (lambda s: s.update({"decoder.layers.0.fc3.bias": torch.zeros(3)}), "got also decoder.layers.0.fc3.bias"),
        (lambda s: s.pop("encoder.layer_norm.weight"), "to end with a norm exactly if pre-norm; encoder has none"),
        (lambda s: s.update({"encoder.version": torch.tensor([1.0])}), "expected encoder.version 2 or later"),
        (lambda s: s.update({"encoder.layers.0.fc1.bias": torch.zeros(3)}), "fc1.bias: expected shape \\(24,\\)"),
        (lambda s: [s.pop(n) for n in list(s) if n.startswith("encoder.layers.0.")], "layers of the encoder from 0 on"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(change, message):
    arch = "transformer_wmt_en_de_macaron_v2"
    state = checkpoint(arch)
    change(state)
    with pytest.raises(ValueError, match=message):
        MacaronTransformer.from_fairseq(state, arch)


def test_other_models_are_refused():
    with pytest.raises(ValueError, match="arch: expected one of 'transformer_iwslt_de_en_macaron'"):
        MacaronTransformer.from_fairseq({}, "transformer_vaswani_wmt_en_de_big")
    with pytest.raises(ValueError, match="model: expected positions 'fairseq'; got 'sinusoidal'"):
        MacaronTransformer(5, d_model=8, nhead=2, dim_feedforward=8).to_fairseq()
    with pytest.raises(ValueError, match="padding_idx: expected a token where positions are 'fairseq'"):
        MacaronTransformer(5, d_model=8, nhead=2, dim_feedforward=8, positions="fairseq")


def test_gelu_is_not_among_them():
    """The published models have ReLU in both FFNs."""
    model = MacaronTransformer.from_fairseq(
        checkpoint("transformer_wmt_en_de_macaron"), "transformer_wmt_en_de_macaron"
    )
    assert {layer.activation for layer in model.encoder.layers} == {"relu"}
    assert F.relu(torch.tensor(-1.0)) == 0
