"""Claim: MacaronEncoder and MacaronDecoder are their layers one after the other, pre-norm ones with a norm at the end;
checkpointing changes what is kept and nothing else."""

import copy
import pickle

import pytest
import torch
from torch import nn

from macaron_ops.nn import MacaronDecoder, MacaronEncoder
from tests.nn.tools import kept_bytes, output_and_grads, randomize

D, H = 8, 2


def build(kind, **options):
    options = {"num_layers": 3, "dim_feedforward": 12, "dropout": 0.0, "batch_first": True, **options}
    return randomize(kind(D, H, dtype=torch.float64, **options))


def inputs(kind):
    lengths = (5,) if kind is MacaronEncoder else (5, 4)
    return [torch.randn(2, t, D, dtype=torch.float64, requires_grad=True) for t in lengths]


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("kind", [MacaronEncoder, MacaronDecoder])
def test_layers_in_order(kind, norm_first):
    stack = build(kind, norm_first=norm_first)
    x = inputs(kind)
    mask = torch.ones(5, 5, dtype=torch.bool).triu(1)
    padding = torch.zeros(2, 5, dtype=torch.bool)
    padding[1, 3:] = True
    named = ("src_mask", "src_key_padding_mask") if kind is MacaronEncoder else ("tgt_mask", "tgt_key_padding_mask")
    y = x[0]
    for layer in stack.layers:
        y = layer(y, *x[1:], **dict(zip(named, (mask, padding), strict=True)))
    if norm_first:
        y = nn.functional.layer_norm(y, (D,), stack.norm.weight, stack.norm.bias)
    assert (stack.norm is not None) == norm_first
    outer = ("mask", "src_key_padding_mask") if kind is MacaronEncoder else named
    torch.testing.assert_close(stack(*x, **dict(zip(outer, (mask, padding), strict=True))), y)
    first, second = (next(layer.parameters()) for layer in stack.layers[:2])
    assert not torch.equal(first, second)


def test_the_memory_arguments_reach_the_layers():
    stack = build(MacaronDecoder)
    x, memory = inputs(MacaronDecoder)
    padding = torch.tensor([[False] * 4, [False, False, True, True]])
    changed = memory.detach().clone()
    changed[1, 2:] = 7.0
    torch.testing.assert_close(
        stack(x, memory, memory_key_padding_mask=padding), stack(x, changed, memory_key_padding_mask=padding)
    )
    assert not torch.allclose(stack(x, memory), stack(x, changed))
    causal = torch.ones(5, 4, dtype=torch.bool).triu(1)
    torch.testing.assert_close(stack(x, memory, memory_is_causal=True), stack(x, memory, memory_mask=causal))
    causal = torch.ones(5, 5, dtype=torch.bool).triu(1)
    torch.testing.assert_close(stack(x, memory, tgt_is_causal=True), stack(x, memory, tgt_mask=causal))


@pytest.mark.parametrize("kind", [MacaronEncoder, MacaronDecoder])
def test_checkpointing(kind):
    """Also with dropout: the backward pass draws the forward pass's masks again."""
    plain = build(kind, dropout=0.3)
    saving = build(kind, dropout=0.3, checkpoint=True)
    saving.load_state_dict(plain.state_dict())
    x = inputs(kind)
    results, kept = [], []
    for stack in (saving, plain):
        torch.manual_seed(2)
        results.append(output_and_grads(stack, *x))
        kept.append(kept_bytes(lambda stack=stack: stack(*x)))
    torch.testing.assert_close(*results)
    assert kept[0] < kept[1] / 2


@pytest.mark.parametrize("kind", [MacaronEncoder, MacaronDecoder])
def test_copies_compile_and_save(kind):
    stack = build(kind, norm_first=True, num_layers=2)
    x = inputs(kind)
    expected = output_and_grads(stack, *x)
    lean = build(kind, norm_first=True, num_layers=2, save="lean")
    lean.load_state_dict(stack.state_dict())
    compiled = torch.compile(stack, fullgraph=True, backend="aot_eager")
    for again in (copy.deepcopy(stack), pickle.loads(pickle.dumps(stack)), lean, compiled):
        torch.testing.assert_close(output_and_grads(again, *x), expected)


@pytest.mark.parametrize("kind", [MacaronEncoder, MacaronDecoder])
def test_torch_stacks_take_the_layers(kind):
    stack = build(kind)
    theirs = nn.TransformerEncoder if kind is MacaronEncoder else nn.TransformerDecoder
    options = {"enable_nested_tensor": False} if kind is MacaronEncoder else {}
    other = theirs(copy.deepcopy(stack.layers[0]), 3, **options)
    other.load_state_dict(stack.state_dict())
    x = inputs(kind)
    name = "mask" if kind is MacaronEncoder else "tgt_mask"
    for mask in (None, nn.Transformer.generate_square_subsequent_mask(5)):
        torch.testing.assert_close(other(*x, **{name: mask}), stack(*x, **{name: mask}))


def test_refusals():
    with pytest.raises(ValueError, match="num_layers: expected an integer of at least 1; got 0"):
        MacaronEncoder(D, H, 0)
    with pytest.raises(ValueError, match="dim_feedforward: expected an even width"):
        MacaronDecoder(D, H, 2, dim_feedforward=13)
    with pytest.raises(TypeError, match="nested"):
        MacaronEncoder(D, H, 2, nested=True)
