"""Claim: checkpoints of NVIDIA's and of lucidrains' nGPT become models that compute what that code computes, written
out here from its source; what is no such checkpoint is refused."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from macaron_ops.nn import NGPT, keep_normalized

D, HEADS, LAYERS, VOCAB, T = 24, 3, 3, 17, 9


def unit(x: Tensor, dim: int = -1) -> Tensor:
    return x / x.square().sum(dim, keepdim=True).sqrt()


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    weights = (q @ k.transpose(-1, -2) * scale).masked_fill(future, -math.inf).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(-2)


def split(x: Tensor) -> Tensor:
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def nvidia_state(base_scale: float) -> dict[str, Tensor]:
    state = {"transformer.wte.weight": unit(torch.randn(VOCAB, D)), "lm_head.weight": unit(torch.randn(VOCAB, D))}
    state["sz"] = base_scale * (1 + 0.3 * torch.randn(VOCAB))
    for i in range(LAYERS):
        layer = {f"{name}.weight": unit(torch.randn(D, D)) for name in ("key", "query", "value", "att_c_proj")}
        layer |= {"c_fc.weight": unit(torch.randn(8 * D, D)), "mlp_c_proj.weight": unit(torch.randn(D, 4 * D), 0)}
        layer = {name: weight.bfloat16() for name, weight in layer.items()}
        for name in ("attn_alpha", "mlp_alpha", "sqk"):
            layer[name] = base_scale * (1 + 0.3 * torch.randn(D)) * torch.randn(D).sign()
        layer["suv"] = 1 + 0.3 * torch.randn(8 * D)
        state |= {f"transformer.h.{i}.{name}": tensor for name, tensor in layer.items()}
    return state


def nvidia(state: dict[str, Tensor], base_scale: float, tokens: Tensor) -> Tensor:
    """``GPT.forward`` of NVIDIA/ngpt's model.py, use_nGPT = 1."""
    h = state["transformer.wte.weight"][tokens]
    width = D // HEADS
    frequency = torch.exp(torch.arange(0, width, 2).float() * (-math.log(10000.0) / width))
    angles = torch.arange(T).float()[:, None] * frequency
    table = torch.empty(T, width)
    table[:, 0::2], table[:, 1::2] = angles.sin(), angles.cos()
    sin, cos = table.to(h.dtype).chunk(2, dim=-1)  # the halves of a table in which sines and cosines alternate

    def positioned(x):
        return torch.stack([-x[..., 1::2] * cos, x[..., 0::2] * sin], dim=-1).flatten(-2)

    for i in range(LAYERS):
        p = {n.removeprefix(f"transformer.h.{i}."): t for n, t in state.items() if n.startswith(f"transformer.h.{i}.")}
        q, k, v = (split(h @ p[f"{name}.weight"].T) for name in ("query", "key", "value"))
        sqk = (p["sqk"] / base_scale).view(HEADS, 1, width)
        y = attend(sqk * unit(positioned(q)), sqk * unit(positioned(k)), v, math.sqrt(width))
        step = (0.05 / base_scale * p["attn_alpha"]).abs()
        h = unit(h)
        h = unit(h + step * (unit(y @ p["att_c_proj.weight"].T) - h))
        u, v = (p["suv"] * math.sqrt(D) * (h @ p["c_fc.weight"].T)).chunk(2, dim=-1)
        step = (0.05 / base_scale * p["mlp_alpha"]).abs()
        h = unit(h + step * (unit((u * F.silu(v)) @ p["mlp_c_proj.weight"].T) - h))
    return state["sz"] / base_scale * (h @ state["lm_head.weight"].T)


def lucidrains_state(head_dim: int, parametrised: bool = True, tied: bool = False) -> dict[str, Tensor]:
    state, inner, hidden = {}, HEADS * head_dim, int(D * 8 / 3)

    def linear(name, rows, columns, dim=-1):
        weight = torch.randn(rows, columns)
        key = "parametrizations.weight.original" if parametrised else "weight"
        state[f"{name}.linear.{key}"] = weight if parametrised else 1.1 * unit(weight, dim)

    linear("token_embed", VOCAB, D)
    state["rotary_embed.freqs"] = 1 / 10000 ** (torch.arange(0, head_dim, 2).float() / head_dim)
    for i in range(LAYERS):
        attention, ffn = f"layers.{i}.0.", f"layers.{i}.1."
        for name in ("to_q", "to_k", "to_v"):
            linear(f"{attention}fn.{name}", inner, D)
        linear(f"{attention}fn.to_out", D, inner, 0)
        state[f"{attention}fn.qk_scale.scale"] = torch.rand(inner) / D
        for name in ("to_hidden", "to_gate"):
            linear(f"{ffn}fn.{name}", hidden, D)
        linear(f"{ffn}fn.to_out", D, hidden, 0)
        for name in ("hidden_scale", "gate_scale"):
            state[f"{ffn}fn.{name}.scale"] = 1 + 0.3 * torch.randn(hidden)
        for name in (attention, ffn):
            state[f"{name}branch_scale.scale"] = torch.rand(D) / math.sqrt(D)
    if not tied:
        linear("to_logits", VOCAB, D)
    state["logit_scale.scale"] = (1 + 0.3 * torch.randn(VOCAB)) / math.sqrt(D)
    return state


def lucidrains(
    state: dict[str, Tensor], tokens: Tensor, value_residual: bool = True, alpha_init: float = 1 / LAYERS
) -> Tensor:
    """``nGPT.forward`` of nGPT-pytorch 0.2.16, with the options of ``from_lucidrains``."""

    def weight(name, dim=-1):
        original = state.get(f"{name}.linear.parametrizations.weight.original")
        return state[f"{name}.linear.weight"] if original is None else unit(original, dim)

    h = weight("token_embed")[tokens]
    freqs = state["rotary_embed.freqs"]
    angles = torch.arange(T).to(h.dtype)[:, None] * freqs
    width, first = 2 * freqs.numel(), None

    def rotate(x):
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.stack([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], -1).flatten(-2)

    for i in range(LAYERS):
        attention, ffn = f"layers.{i}.0.", f"layers.{i}.1."
        q, k, v = (split(h @ weight(f"{attention}fn.to_{name}").T) for name in "qkv")
        v = v if first is None or not value_residual else (v + first) / 2
        first = v if first is None else first
        scale = (state[f"{attention}fn.qk_scale.scale"] * D).view(HEADS, 1, width)
        y = attend(unit(rotate(q)) * scale, unit(rotate(k)), v, math.sqrt(width))
        target = unit(y @ weight(f"{attention}fn.to_out", 0).T)
        h = unit(h + state[f"{attention}branch_scale.scale"] * alpha_init * math.sqrt(D) * (target - h))
        hidden = (h @ weight(f"{ffn}fn.to_hidden").T) * state[f"{ffn}fn.hidden_scale.scale"]
        gate = (h @ weight(f"{ffn}fn.to_gate").T) * state[f"{ffn}fn.gate_scale.scale"] * math.sqrt(D)
        target = unit((F.silu(gate) * hidden) @ weight(f"{ffn}fn.to_out", 0).T)
        h = unit(h + state[f"{ffn}branch_scale.scale"] * alpha_init * math.sqrt(D) * (target - h))
    tied = not any(name.startswith("to_logits") for name in state)
    head = weight("token_embed" if tied else "to_logits")
    return (h @ head.T) * state["logit_scale.scale"] * math.sqrt(D)


def doubled(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.double() for name, tensor in state.items()}


@pytest.mark.parametrize("save", ["fast", "lean"])
@pytest.mark.parametrize("base_scale", [1 / 32, D**-0.5])
def test_nvidia(base_scale, save):
    state, tokens = nvidia_state(base_scale), torch.randint(VOCAB, (2, T))
    model = NGPT.from_nvidia(state, n_head=HEADS, base_scale=base_scale, save=save)
    assert all(p.dtype == torch.float32 and p.requires_grad for p in model.parameters())
    expected = nvidia(doubled(state), base_scale, tokens)
    torch.testing.assert_close(model.double()(tokens), expected, rtol=1e-5, atol=1e-5)  # parameters in float32
    compiled = {f"_orig_mod.{name}": tensor for name, tensor in state.items()}
    again = NGPT.from_nvidia(compiled, n_head=HEADS, base_scale=base_scale).double()
    assert torch.equal(again(tokens), model(tokens))


@pytest.mark.parametrize("head_dim", [8, 6])
@pytest.mark.parametrize("parametrised", [True, False])
def test_lucidrains(head_dim, parametrised):
    tokens = torch.randint(VOCAB, (2, T))
    for value_residual, alpha_init, tied in ((True, None, False), (False, 0.2, True)):
        state = lucidrains_state(head_dim, parametrised, tied)
        model = NGPT.from_lucidrains(state, heads=HEADS, add_value_residual=value_residual, alpha_init=alpha_init)
        expected = lucidrains(doubled(state), tokens, value_residual, alpha_init or 1 / LAYERS)
        torch.testing.assert_close(model.double()(tokens), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(model.head.weight, model.tokens.weight)  # tied


@pytest.mark.parametrize("variant", [{"positions": "nvidia"}, {"value_residual": True}, {"head_dim": 6}])
def test_the_variants_are_differentiable_and_train(variant):
    """Their gradients are those of finite differences, and their matrices stay on the sphere."""
    model = NGPT(VOCAB, D, HEADS, 2, 40, **variant).double()
    tokens = torch.randint(VOCAB, (2, 7))
    model(tokens, tokens)[1].backward()
    for name, parameter in model.named_parameters():
        direction = torch.randn_like(parameter)
        losses = []
        for sign in (1, -1):
            moved = copy.deepcopy(model)
            moved.get_parameter(name).data.add_(direction, alpha=sign * 1e-5)
            losses.append(moved(tokens, tokens)[1])
        torch.testing.assert_close(
            (losses[0] - losses[1]) / 2e-5, (parameter.grad * direction).sum(), rtol=1e-5, atol=1e-9
        )
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    keep_normalized(model, optimizer)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = model(tokens, tokens)[1]
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5
    for layer in model.layers:
        rows = [layer.in_proj.weight, layer.linear1.weight, layer.out_proj.weight.T, layer.linear2.weight.T]
        assert all((row.norm(dim=1) - 1).abs().max() < 1e-6 for row in rows)


def test_lucidrains_own_model():
    """Against the package itself, where it is installed."""
    package = pytest.importorskip("nGPT_pytorch")
    for options in ({}, {"add_value_residual": False, "alpha_init": 0.2}, {"tied_embedding": True}):
        theirs = package.nGPT(num_tokens=VOCAB, dim=D, depth=LAYERS, dim_head=8, heads=HEADS, **options)
        state = theirs.state_dict()
        for name, tensor in state.items():
            if name.endswith(".scale"):
                tensor.mul_(0.5 + torch.rand_like(tensor))
        model = NGPT.from_lucidrains(state, heads=HEADS, **{k: v for k, v in options.items() if k != "tied_embedding"})
        tokens = torch.randint(VOCAB, (2, T))
        torch.testing.assert_close(model(tokens), theirs(tokens), rtol=1e-4, atol=1e-5)


def test_what_is_no_such_checkpoint_is_refused():
    state = nvidia_state(0.1)

    def read(changes, **options):
        changed = {n: t for n, t in {**state, **changes}.items() if t is not None}
        return NGPT.from_nvidia(changed, **{"n_head": HEADS, "base_scale": 0.1, **options})

    for changes, message in (
        ({"sz": None}, "state: expected a tensor sz; there is none"),
        ({"rmsnorm_f.weight": torch.ones(D)}, "expected the tensors of an nGPT; got also rmsnorm_f.weight"),
        ({"transformer.h.1.query.bias": torch.ones(D)}, "got also transformer.h.1.query.bias"),
        ({"transformer.h.0.sqk": torch.ones(8)}, r"sqk: expected shape \(24,\); got \(8,\)"),
        ({"transformer.wte.weight": torch.ones(VOCAB, D)}, "expected rows of length 1, .* got lengths from 4.9 to 4.9"),
        ({"transformer.h.4.sqk": torch.ones(D)}, r"expected layers transformer.h.0 and so on; got \[0, 1, 2, 4\]"),
    ):
        with pytest.raises(ValueError, match=message):
            read(changes)
    with pytest.raises(ValueError, match="n_head: expected a divisor of n_embd = 24 that leaves an even width; got 8"):
        read({}, n_head=8)

    state = lucidrains_state(8)
    for name, message in (
        ("layers.1.0.branch_scale.scale", "branch_scale.scale: expected no negative number"),
        ("layers.0.0.fn.qk_scale.scale", "qk_scale.scale: expected no negative number"),
        ("rotary_embed.freqs", "rotary_embed.freqs: expected the frequencies"),
    ):
        with pytest.raises(ValueError, match=message):
            NGPT.from_lucidrains({**state, name: -state[name]}, heads=HEADS)
    with pytest.raises(ValueError, match="heads: expected a divisor of 24 that leaves an even width; got 5"):
        NGPT.from_lucidrains(state, heads=5)
    with pytest.raises(ValueError, match="positions: expected one of 'rotary', 'nvidia'; got 'sinusoidal'"):
        NGPT(VOCAB, D, HEADS, 1, positions="sinusoidal")
