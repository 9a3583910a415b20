"""Claim: every form of mask means to the layers what it means to torch's, batched either way or not at all; a row that
is masked entirely gets zeros from the attention; a mask that does not fit is refused by its name."""

import itertools

import pytest
import torch
from torch import nn

from macaron_ops.nn import (
    LieTrotterDecoderLayer,
    LieTrotterEncoderLayer,
    MacaronDecoder,
    MacaronDecoderLayer,
    MacaronEncoder,
    MacaronEncoderLayer,
)
from tests.nn.tools import output_and_grads, randomize, twin

B, T, S, H, D = 2, 4, 5, 2, 6
FORMS = ("none", "bool", "float", "bool_3d", "float_3d", "causal")
pytestmark = pytest.mark.filterwarnings("ignore:Support for mismatched")  # torch's layers on mixed dtypes


def attention_mask(form, batch, t, s, device):
    """The mask, and the hint; the first key is seen by every token, so no row is masked entirely."""
    if form == "none":
        return None, False
    if form == "causal":
        return torch.ones(t, s, dtype=torch.bool, device=device).triu(1), True
    shape = (batch * H, t, s) if form.endswith("3d") else (t, s)
    if form.startswith("float"):
        return torch.randn(shape, dtype=torch.float64, device=device), False
    mask = torch.rand(shape, device=device) < 0.4
    mask[..., 0] = False
    return mask, False


def padding_mask(form, batch, s, device):
    if form == "none":
        return None
    shape = (s,) if batch is None else (batch, s)
    if form == "float":
        return torch.randn(shape, dtype=torch.float64, device=device)
    mask = torch.rand(shape, device=device) < 0.4
    mask[..., 0] = False
    return mask


def tokens(layout, length, device):
    shape = {"batch_first": (B, length, D), "time_first": (length, B, D), "unbatched": (length, D)}[layout]
    return torch.randn(shape, dtype=torch.float64, device=device, requires_grad=True)


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("layout", ["batch_first", "time_first", "unbatched"])
def test_encoder_masks(layout, norm_first, device):
    build = {"batch_first": layout == "batch_first", "norm_first": norm_first, "dtype": torch.float64}
    expected = randomize(nn.TransformerEncoderLayer(D, H, 8, 0.0, device=device, **build))
    layer = twin(LieTrotterEncoderLayer(D, H, 8, 0.0, device=device, **build), expected)
    batch = 1 if layout == "unbatched" else B
    for form, padding in itertools.product(FORMS, ("none", "bool", "float")):
        x = tokens(layout, T, device)
        mask, causal = attention_mask(form, batch, T, T, device)
        keys = padding_mask(padding, None if layout == "unbatched" else B, T, device)
        arguments = {"src_mask": mask, "src_key_padding_mask": keys, "is_causal": causal}
        torch.testing.assert_close(
            output_and_grads(layer, x, **arguments),
            output_and_grads(expected, x, **arguments),
            msg=lambda text, form=form, padding=padding: f"{form}, {padding}: {text}",
        )


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("layout", ["batch_first", "time_first", "unbatched"])
def test_decoder_masks(layout, norm_first, device):
    build = {"batch_first": layout == "batch_first", "norm_first": norm_first, "dtype": torch.float64}
    expected = randomize(nn.TransformerDecoderLayer(D, H, 8, 0.0, device=device, **build))
    layer = twin(LieTrotterDecoderLayer(D, H, 8, 0.0, device=device, **build), expected)
    batch = 1 if layout == "unbatched" else B
    for form, padding in itertools.product(FORMS, ("none", "bool", "float")):
        tgt, memory = tokens(layout, T, device), tokens(layout, S, device)
        tgt_mask, tgt_causal = attention_mask(form, batch, T, T, device)
        memory_mask, memory_causal = attention_mask(form, batch, T, S, device)
        count = None if layout == "unbatched" else B
        arguments = {
            "tgt_mask": tgt_mask,
            "memory_mask": memory_mask,
            "tgt_key_padding_mask": padding_mask(padding, count, T, device),
            "memory_key_padding_mask": padding_mask(padding, count, S, device),
            "tgt_is_causal": tgt_causal,
            "memory_is_causal": memory_causal,
        }
        torch.testing.assert_close(
            output_and_grads(layer, tgt, memory, **arguments),
            output_and_grads(expected, tgt, memory, **arguments),
            msg=lambda text, form=form, padding=padding: f"{form}, {padding}: {text}",
        )


def test_the_hint_replaces_the_mask_only_without_padding():
    """As torch's layers do with a hint that is wrong: nobody's result changes with the layer's class."""
    expected = randomize(nn.TransformerEncoderLayer(D, H, 8, 0.0, batch_first=True, dtype=torch.float64))
    layer = twin(LieTrotterEncoderLayer(D, H, 8, 0.0, batch_first=True, dtype=torch.float64), expected)
    x = tokens("batch_first", T, "cpu")
    nothing = torch.zeros(T, T, dtype=torch.bool)
    padding = torch.zeros(B, T, dtype=torch.bool)
    for keys in (None, padding):
        torch.testing.assert_close(layer(x, nothing, keys, True), expected(x, nothing, keys, True))
    assert not torch.allclose(layer(x, nothing, None, True), layer(x, nothing, padding, True))


@pytest.mark.parametrize("kind", [LieTrotterEncoderLayer, MacaronEncoderLayer])
def test_a_row_without_keys_gets_zeros_from_the_attention(kind):
    layer = randomize(kind(D, H, 8, 0.0, batch_first=True, norm_first=True, dtype=torch.float64))
    x = tokens("batch_first", T, "cpu")
    padding = torch.zeros(B, T, dtype=torch.bool)
    padding[1] = True
    y, *grads = output_and_grads(layer, x, src_key_padding_mask=padding)
    assert all(g.isfinite().all() for g in (y, *grads))
    with torch.no_grad():
        layer.self_attn.in_proj_weight.zero_()  # v = b_v everywhere: only the other sequence sees it
        layer.self_attn.in_proj_bias[-D:] += 1.0
        assert torch.equal(layer(x, src_key_padding_mask=padding)[1], y[1])
        assert not torch.allclose(layer(x, src_key_padding_mask=padding)[0], y[0])


@pytest.mark.parametrize("padding", [None, torch.tensor([[False] * T, [False] * 2 + [True] * 2])])
def test_macaron_layers_are_causal_without_a_mask(padding):
    x, memory = tokens("batch_first", T, "cpu"), tokens("batch_first", S, "cpu")
    mask = torch.ones(T, T, dtype=torch.bool).triu(1)
    layer = randomize(MacaronEncoderLayer(D, H, 8, 0.0, batch_first=True, dtype=torch.float64))
    torch.testing.assert_close(
        layer(x, src_key_padding_mask=padding, is_causal=True), layer(x, mask, src_key_padding_mask=padding)
    )
    layer = randomize(MacaronDecoderLayer(D, H, 8, 0.0, batch_first=True, dtype=torch.float64))
    torch.testing.assert_close(
        layer(x, memory, tgt_key_padding_mask=padding, tgt_is_causal=True),
        layer(x, memory, tgt_mask=mask, tgt_key_padding_mask=padding),
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"is_causal": True}, "is_causal: expected False without src_mask"),
        ({"src_mask": torch.zeros(T, T + 1)}, r"src_mask: expected shape \(4, 4\) or \(4, 4, 4\); got \(4, 5\)"),
        ({"src_mask": torch.zeros(3, T, T)}, r"src_mask: .* got \(3, 4, 4\)"),
        ({"src_key_padding_mask": torch.zeros(T, B)}, r"src_key_padding_mask: expected shape \(2, 4\)"),
    ],
)
def test_encoder_refuses_masks(arguments, message):
    layer = LieTrotterEncoderLayer(D, H, 8, batch_first=True)
    with pytest.raises(ValueError, match=message):
        layer(torch.randn(B, T, D), **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tgt_is_causal": True}, "tgt_is_causal: expected False without tgt_mask"),
        ({"memory_is_causal": True}, "memory_is_causal: expected False without memory_mask"),
        ({"memory_mask": torch.zeros(T, T)}, r"memory_mask: expected shape \(4, 5\)"),
        ({"memory_key_padding_mask": torch.zeros(B, T)}, r"memory_key_padding_mask: expected shape \(2, 5\)"),
    ],
)
def test_decoder_refuses_masks(arguments, message):
    layer = LieTrotterDecoderLayer(D, H, 8, batch_first=True)
    with pytest.raises(ValueError, match=message):
        layer(torch.randn(B, T, D), torch.randn(B, S, D), **arguments)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_float32_masks_go_with_every_dtype(dtype):
    """``generate_square_subsequent_mask`` makes one unless told otherwise."""
    layer = LieTrotterEncoderLayer(D, H, 8, 0.0, batch_first=True, dtype=dtype)
    x = torch.randn(B, T, D, dtype=dtype)
    padding = torch.tensor([[False] * T, [False] * 2 + [True] * 2])
    added = torch.zeros(B, T).masked_fill(padding, -torch.inf)
    causal = nn.Transformer.generate_square_subsequent_mask(T)
    assert torch.equal(layer(x, causal, added), layer(x, causal == -torch.inf, padding))
    with pytest.raises(TypeError, match="src_mask: expected dtype bool, float32 or that of the input"):
        layer(x, causal.to(torch.float16 if dtype != torch.float16 else torch.bfloat16))
    if dtype != torch.float64:
        with torch.autocast("cpu", dtype):
            assert torch.equal(layer(x, causal.to(torch.float16), added), layer(x, causal, added))
            with pytest.raises(TypeError, match="src_mask: expected dtype bool, float32 or that of the input"):
                layer(x, causal.double())


def test_integer_masks_are_refused():
    layer = LieTrotterEncoderLayer(D, H, 8, batch_first=True)
    with pytest.raises(
        TypeError, match="src_mask: expected dtype bool, float32 or that of the input, .*; got torch.uint8"
    ):
        layer(torch.randn(B, T, D), torch.zeros(T, T, dtype=torch.uint8))
    with pytest.raises(TypeError, match="src_key_padding_mask: expected a tensor or None; got list"):
        layer(torch.randn(B, T, D), src_key_padding_mask=[1, 2])


def test_inputs_that_do_not_fit_are_refused():
    encoder = LieTrotterEncoderLayer(D, H, 8, batch_first=True)
    with pytest.raises(ValueError, match=r"src: expected shape \(B, T, 6\) or \(T, 6\); got \(2, 4, 5\)"):
        encoder(torch.randn(B, T, D - 1))
    decoder = LieTrotterDecoderLayer(D, H, 8, batch_first=True)
    with pytest.raises(ValueError, match="memory: expected the batch of tgt"):
        decoder(torch.randn(B, T, D), torch.randn(B + 1, S, D))


@pytest.mark.parametrize("kind", [LieTrotterEncoderLayer, MacaronEncoderLayer])
def test_a_mask_that_the_hint_replaces_is_checked_too(kind):
    layer, x = kind(D, H, 8, batch_first=True), torch.randn(B, T, D)
    for mask, error, message in (
        (torch.zeros(T + 1, T + 1), ValueError, r"src_mask: expected shape \(4, 4\)"),
        (torch.zeros(T, T, dtype=torch.uint8), TypeError, "src_mask: expected dtype bool"),
        ("zz", TypeError, "src_mask: expected a tensor or None; got str"),
    ):
        with pytest.raises(error, match=message):
            layer(x, mask, is_causal=True)


@pytest.mark.parametrize("hint", ["yes", 1, None])
def test_hints_are_bools(hint):
    x, mask = torch.randn(B, T, D), torch.zeros(T, T)
    for kind in (LieTrotterEncoderLayer, MacaronEncoderLayer):
        for src_mask in (None, mask):
            with pytest.raises(TypeError, match=f"^is_causal: expected True or False; got {hint!r}"):
                kind(D, H, 8, batch_first=True)(x, src_mask, is_causal=hint)
    for kind in (LieTrotterDecoderLayer, MacaronDecoderLayer):
        for name in ("tgt_is_causal", "memory_is_causal"):
            with pytest.raises(TypeError, match=f"{name}: expected True or False; got {hint!r}"):
                kind(D, H, 8, batch_first=True)(x, x, mask, mask, **{name: hint})


ENCODERS = (LieTrotterEncoderLayer, MacaronEncoderLayer, MacaronEncoder)
DECODERS = (LieTrotterDecoderLayer, MacaronDecoderLayer, MacaronDecoder)


@pytest.mark.parametrize("kind", [*ENCODERS, *DECODERS])
def test_inputs_are_named(kind):
    module, x = kind(D, H, 1 if kind in (MacaronEncoder, MacaronDecoder) else 8, batch_first=True), torch.randn(B, T, D)
    calls = {"src": module} if kind in ENCODERS else {"tgt": lambda t: module(t, x), "memory": lambda t: module(x, t)}
    for name, call in calls.items():
        for value in ("a", None, x.numpy()):
            with pytest.raises(TypeError, match=f"^{name}: expected a tensor; got {type(value).__name__}"):
                call(value)
        for dtype in (torch.float64, torch.int64):
            with pytest.raises(TypeError, match=f"^{name}: expected the parameters' dtype, torch.float32; got {dtype}"):
                call(x.to(dtype))
            with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match=f"^{name}: expected the param"):
                call(x.to(dtype))
        with torch.autocast("cpu", torch.bfloat16):
            assert kind in DECODERS or call(x.bfloat16()).isfinite().all()
        with pytest.raises(ValueError, match=f"^{name}: expected a tensor on the parameters' device, cpu; got meta"):
            call(x.to("meta"))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_inputs_are_named():
    x = torch.nested.nested_tensor([torch.randn(3, D), torch.randn(2, D)], dtype=torch.float64)
    with pytest.raises(TypeError, match="^src: expected the parameters' dtype, torch.float32; got torch.float64"):
        LieTrotterEncoderLayer(D, H, 8, batch_first=True)(x)


@pytest.mark.parametrize("kind", [LieTrotterEncoderLayer, MacaronEncoderLayer])
def test_masks_on_another_device(kind):
    layer, x = kind(D, H, 8, batch_first=True), torch.randn(B, T, D)
    masks = {"src_mask": torch.zeros(T, T), "src_key_padding_mask": torch.zeros(B, T)}
    for name, mask in masks.items():
        with pytest.raises(ValueError, match=f"^{name}: expected a tensor on the device of the input, cpu; got meta"):
            layer(x, **{name: mask.to("meta")})
        y = layer.to("meta")(x.to("meta"), **{name: mask.to("meta")})
        assert y.shape == x.shape
        layer = kind(D, H, 8, batch_first=True)
