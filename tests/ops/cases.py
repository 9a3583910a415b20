"""The calls that the operators' tests share: each builds fresh arguments of a dtype on a device."""

import math

import torch
import torch.nn.functional as F

import macaron_ops

__all__ = ["CASES", "Case", "build"]


class Case:
    """An operator's call: ``make(randn)`` draws ``(args, kwargs)``, which suit the operator and its twin."""

    def __init__(self, operator, name, make):
        self.operator, self.name, self.make = operator, name, make

    def __repr__(self):
        return f"{self.operator.__name__}-{self.name}"


def _ffn(d, hidden, shape, **options):
    def make(randn):
        gated = options.get("activation") in ("swiglu", "geglu")
        rows = hidden * (2 if gated else 1)
        args = (randn(*shape, d), randn(rows, d) / d**0.5, randn(rows), randn(d, hidden) / hidden**0.5, randn(d))
        affine = {} if options.get("norm", "layer") is None else {"norm_weight": randn(d), "norm_bias": randn(d)}
        return args, {**options, **affine}

    return make


def _attend(d, heads, shape, *, kv_heads=None, packed=True, keys=None, source=None, extras=None, **options):
    """``extras(randn, head_dim)``: further keyword arguments that are tensors."""

    def make(randn):
        kv = heads if kv_heads is None else kv_heads
        head_dim = -(-d // heads)
        width, kv_width = heads * head_dim, kv * head_dim
        c = d if source is None else source
        w = [randn(width, d) / d**0.5, randn(kv_width, c) / c**0.5, randn(kv_width, c) / c**0.5]
        b = [randn(width), randn(kv_width), randn(kv_width)]
        projection = (torch.cat(w), torch.cat(b)) if packed else (tuple(w), tuple(b))
        args = (randn(*shape, d), *projection, randn(d, width) / width**0.5, randn(d), heads)
        given = {"norm_weight": randn(d), "norm_bias": randn(d), "num_kv_heads": kv}
        if keys is not None:
            given["context"] = randn(*shape[:-1], keys, c)
        if extras is not None:
            given |= extras(randn, head_dim)
        return args, {**options, **given}

    return make


def _blocked(*shape):
    """A boolean mask that leaves the first key of every row."""
    return (torch.arange(math.prod(shape)).view(shape) % 3 == 1) & (torch.arange(shape[-1]) > 0)


def _everything(randn, head_dim):
    return {
        "rotary": (randn(7, head_dim // 4), randn(7, head_dim // 4)),
        "qk_scale": randn(head_dim),
        "attn_mask": randn(1, 4, 7, 7),
        "key_padding_mask": _blocked(2, 7),
    }


def _sphere(n, d, *, learned=False, **options):
    def make(randn):
        args = (
            F.normalize(randn(2, n, d), dim=-1),
            randn(d).abs() if learned else 0.3,
            randn().abs() if learned else 2.0,
        )
        given = {"query": randn(2, n, 5), "key": randn(2, n, 5), "value": randn(2, n, d)} if learned else {}
        return args, {**options, **given}

    return make


def _normalize(shape, d, *, learned=False, **options):
    def make(randn):
        x = F.normalize(randn(*shape, d), dim=-1)
        return (x, randn(*shape, d), randn(d) if learned else 0.3), options

    return make


f, a, s, z = (
    macaron_ops.ffn_step,
    macaron_ops.attend_step,
    macaron_ops.sphere_attend_step,
    macaron_ops.normalize_step,
)
BORDERS = torch.tensor([0, 3, 3, 9], dtype=torch.int32)
DROPOUT = {"dropout": 0.3, "attention_dropout": 0.2, "seed": 11}
PADDED = torch.arange(257)[None] > 140  # the last tile is blocked, the one before it in part
CASES = [
    *(Case(f, act, _ffn(24, 40, (2, 7), activation=act)) for act in ("relu", "gelu", "gelu_tanh", "silu")),
    *(Case(f, act, _ffn(24, 20, (2, 7), activation=act, norm="rms")) for act in ("swiglu", "geglu")),
    Case(f, "post", _ffn(33, 65, (3, 5), placement="post", residual_scale=1.5)),
    Case(f, "sphere", _ffn(24, 40, (9,), norm="sphere")),
    Case(f, "no-norm", _ffn(24, 40, (2, 2, 3), norm=None, step=1.0)),
    Case(f, "one-channel", _ffn(1, 3, (4,), norm="rms")),
    Case(f, "one-token", _ffn(24, 40, (1, 1))),
    Case(f, "empty-batch", _ffn(24, 40, (0, 7))),
    Case(a, "self", _attend(24, 3, (2, 7))),
    Case(a, "post", _attend(24, 3, (2, 7), placement="post", step=0.5)),
    Case(a, "separate", _attend(24, 3, (2, 7), packed=False, norm="rms")),
    Case(a, "grouped", _attend(24, 4, (2, 7), kv_heads=2)),
    Case(a, "cross", _attend(24, 3, (2, 7), keys=5, source=10, packed=False)),
    Case(a, "cross-packed", _attend(24, 3, (2, 7), keys=5)),
    Case(a, "odd-heads", _attend(25, 3, (2, 3))),
    Case(a, "causal", _attend(24, 3, (2, 7), causal=True, scale=0.3)),
    Case(a, "mask", _attend(24, 3, (2, 7), extras=lambda randn, _: {"attn_mask": _blocked(7, 7)})),
    Case(a, "mask-per-head", _attend(24, 3, (2, 7), extras=lambda randn, _: {"attn_mask": _blocked(6, 7, 7)})),
    Case(a, "learned-mask", _attend(24, 3, (2, 7), extras=lambda randn, _: {"attn_mask": randn(7, 7)})),
    Case(a, "learned-mask-per-head", _attend(24, 3, (2, 7), extras=lambda randn, _: {"attn_mask": randn(6, 7, 7)})),
    Case(a, "padding", _attend(24, 3, (2, 7), extras=lambda randn, _: {"key_padding_mask": _blocked(2, 7)})),
    Case(a, "learned-padding", _attend(24, 3, (2, 7), extras=lambda randn, _: {"key_padding_mask": randn(2, 7)})),
    Case(a, "sequences", _attend(24, 3, (9,), causal=True, extras=lambda randn, _: {"cu_seqlens": BORDERS})),
    Case(a, "rotary", _attend(24, 3, (2, 7), extras=lambda randn, h: {"rotary": (randn(7, h // 2), randn(7, h // 2))})),
    Case(a, "unit-qk", _attend(24, 3, (2, 7), extras=lambda randn, h: {"qk_scale": randn(3, h)})),
    Case(a, "everything", _attend(24, 4, (2, 7), kv_heads=2, causal=True, extras=_everything, **DROPOUT)),
    Case(a, "dropout", _attend(24, 3, (2, 7), placement="post", **DROPOUT)),
    Case(f, "dropout", _ffn(24, 40, (2, 7), dropout=0.3, activation_dropout=0.2, seed=11)),
    Case(f, "past-a-tile", _ffn(136, 272, (130,), activation="gelu")),
    Case(a, "past-a-tile", _attend(80, 2, (1, 70), keys=257, extras=lambda randn, _: {"key_padding_mask": PADDED})),
    Case(s, "past-a-tile", _sphere(133, 40)),
    Case(a, "one-token", _attend(24, 3, (1,))),
    Case(a, "empty-batch", _attend(24, 3, (0, 7))),
    *(Case(z, d, _normalize((2, 5), 3, direction=d)) for d in ("tangent", "difference", "ambient")),
    Case(z, "per-channel", _normalize((2, 5), 24, learned=True, direction="difference")),
    Case(s, "softmax", _sphere(17, 3)),
    Case(s, "unnormalized", _sphere(17, 3, weighting="unnormalized", causal=True)),
    Case(s, "given", _sphere(9, 6, learned=True)),
    Case(s, "one", _sphere(1, 2)),
    Case(s, "none", _sphere(0, 2)),
]


def build(case, dtype, device="cpu", seed=0):
    """``(args, kwargs)`` drawn in float64 and rounded to ``dtype``, so that every dtype sees the same numbers."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    def place(value):
        if isinstance(value, tuple):
            return tuple(place(v) for v in value)
        if not isinstance(value, torch.Tensor):
            return value
        return (value.to(dtype) if value.is_floating_point() else value).to(device)

    args, kwargs = case.make(randn)
    return place(args), {name: place(value) for name, value in kwargs.items()}
