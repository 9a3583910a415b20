"""Claim: a nested tensor, strided or jagged, gives for each of its sequences what the sequence alone gives, in the same
layout, with the same gradients."""

import pytest
import torch

from macaron_ops.nn import (
    LieTrotterDecoderLayer,
    LieTrotterEncoderLayer,
    MacaronDecoderLayer,
    MacaronEncoder,
    MacaronEncoderLayer,
)
from macaron_ops.nn.nested import pack, pad
from tests.nn.tools import randomize

D, H, F = 8, 2, 12
LAYOUTS = [torch.strided, torch.jagged]
pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")


def sequences(*lengths):
    return [torch.randn(n, D, dtype=torch.float64, requires_grad=True) for n in lengths]


def nest(parts, layout):
    return torch.nested.as_nested_tensor(parts, layout=layout)


def check(module, nested, outputs, leaves):
    """Nested outputs against the sequences' own, with the gradients of everything."""
    for a, b in zip(nested, outputs, strict=True):
        torch.testing.assert_close(a, b)
    leaves = [*leaves, *module.parameters()]
    results = [torch.autograd.grad(sum((t**3).sum() for t in parts), leaves) for parts in (nested, outputs)]
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", [LieTrotterEncoderLayer, MacaronEncoderLayer, MacaronEncoder])
def test_encoders(kind, layout, causal):
    if causal and kind is LieTrotterEncoderLayer:
        pytest.skip("torch's layers have no causal attention without a mask")
    options = {"dim_feedforward": F, "dropout": 0.0, "batch_first": True, "norm_first": causal, "dtype": torch.float64}
    if kind is MacaronEncoder:
        options["num_layers"] = 2
    module = randomize(kind(D, H, **options))
    parts = sequences(3, 1, 5)
    y = module(nest(parts, layout), is_causal=causal)
    assert y.is_nested and y.layout == layout
    check(module, y.unbind(), [module(p, is_causal=causal) for p in parts], parts)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", [LieTrotterDecoderLayer, MacaronDecoderLayer])
def test_decoders(kind, layout):
    module = randomize(kind(D, H, F, 0.0, batch_first=True, dtype=torch.float64))
    tgt, memory = sequences(3, 1, 5), sequences(2, 4, 1)
    y = module(nest(tgt, layout), nest(memory, layout))
    assert y.is_nested and y.layout == layout
    check(module, y.unbind(), [module(t, m) for t, m in zip(tgt, memory, strict=True)], [*tgt, *memory])


def test_a_nested_memory_alone():
    module = randomize(LieTrotterDecoderLayer(D, H, F, 0.0, batch_first=True, dtype=torch.float64))
    tgt, memory = sequences(3, 3), sequences(2, 4)
    y = module(torch.stack(tgt), nest(memory, torch.jagged))
    check(module, y.unbind(), [module(t, m) for t, m in zip(tgt, memory, strict=True)], [*tgt, *memory])


def test_jagged_results_fit_their_input():
    x = nest(sequences(3, 1, 5), torch.jagged)
    module = MacaronEncoderLayer(D, H, F, batch_first=True, dtype=torch.float64)
    assert (x + module(x)).shape == x.shape


@pytest.mark.parametrize("layout", LAYOUTS)
def test_there_and_back(layout):
    parts = sequences(2, 0, 3)
    packed, cu_seqlens, repack = pack(nest(parts, layout))
    assert torch.equal(packed, torch.cat(parts))
    assert cu_seqlens.tolist() == [0, 2, 2, 5] and cu_seqlens.dtype == torch.int32
    padded, padding, unpad = pad(nest(parts, layout))
    assert padded.shape == (3, 3, D)
    assert padding.sum(1).tolist() == [1, 3, 0] and not padded[padding].any()
    for back in (repack(packed), unpad(padded)):
        assert all(torch.equal(a, b) for a, b in zip(back.unbind(), parts, strict=True))


def test_refusals():
    x = nest(sequences(3, 1), torch.jagged)
    layer = LieTrotterEncoderLayer(D, H, F, batch_first=True, dtype=torch.float64)
    with pytest.raises(ValueError, match="src_key_padding_mask: expected None with a nested src"):
        layer(x, src_key_padding_mask=torch.zeros(2, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"src: expected a nested tensor \(B, \*, 6\)"):
        LieTrotterEncoderLayer(6, H, F, batch_first=True, dtype=torch.float64)(x)
    with pytest.raises(ValueError, match="src: expected a dense tensor where batch_first is False"):
        LieTrotterEncoderLayer(D, H, F, dtype=torch.float64)(x)
    decoder = LieTrotterDecoderLayer(D, H, F, batch_first=True, dtype=torch.float64)
    with pytest.raises(ValueError, match="memory_mask: expected None with a nested memory"):
        decoder(x, x, memory_mask=torch.zeros(3, 3))
