"""Claim: MacaronTransformer is embeddings, encoder, decoder and a linear map; no logit depends on a later target token
or on padding; shared embeddings are one tensor."""

import copy
import math
import pickle

import pytest
import torch

from macaron_ops.nn import MacaronTransformer
from tests.nn.tools import output_and_grads, randomize

V, PAD = 20, 0
SIZES = {"d_model": 8, "nhead": 2, "num_encoder_layers": 2, "num_decoder_layers": 2, "dim_feedforward": 12}


def build(**options):
    return MacaronTransformer(V, **{**SIZES, "dropout": 0.0, "dtype": torch.float64, **options})


def pair():
    return torch.randint(1, V, (2, 6)), torch.randint(1, V, (2, 5))


def test_its_parts_written_out():
    model = build(positions="sinusoidal", tgt_vocab=30)
    src, tgt = pair()
    rows = []
    for t in range(6):
        angles = [t / 10000 ** (2 * i / 8) for i in range(4)]
        rows.append([f(a) for a in angles for f in (math.sin, math.cos)])
    positions = torch.tensor(rows, dtype=torch.float64)

    def embed(module, ids):
        return math.sqrt(8) * module.tokens.weight[ids] + positions[: ids.shape[1]].float()

    memory = model.encoder(embed(model.src_embedding, src))
    x = model.decoder(embed(model.tgt_embedding, tgt), memory, torch.ones(5, 5, dtype=torch.bool).triu(1))
    logits = x @ model.head.weight.T
    assert logits.shape == (2, 5, 30)
    # the table is computed in float32
    torch.testing.assert_close(model(src, tgt), logits, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("positions", ["sinusoidal", "learned"])
@pytest.mark.parametrize("norm_first", [True, False])
def test_causal_and_blind_to_padding(norm_first, positions):
    model = randomize(build(norm_first=norm_first, positions=positions, padding_idx=PAD))
    src, tgt = pair()
    expected = model(src, tgt)
    later = tgt.clone()
    later[:, 3:] = (later[:, 3:] + 1) % (V - 1) + 1
    torch.testing.assert_close(model(src, later)[:, :3], expected[:, :3])
    assert not torch.allclose(model(src, later)[:, 3:], expected[:, 3:])
    wide_src = torch.cat([src, torch.full((2, 3), PAD)], 1)
    wide_tgt = torch.cat([tgt, torch.full((2, 2), PAD)], 1)
    torch.testing.assert_close(model(wide_src, wide_tgt)[:, :5], expected)
    # the same by masks
    other = build(norm_first=norm_first, positions=positions)
    other.load_state_dict(model.state_dict())
    padding = wide_src == PAD
    torch.testing.assert_close(other(wide_src, tgt, padding), expected)
    assert not torch.allclose(other(wide_src, tgt), expected)


def test_encode_and_decode_are_the_forward():
    model = randomize(build())
    src, tgt = pair()
    torch.testing.assert_close(model.decode(tgt, model.encode(src)), model(src, tgt))


@pytest.mark.parametrize("sharing", ["none", "decoder", "all"])
def test_shared_embeddings(sharing):
    model = build(share_embeddings=sharing)
    src, tgt, head = model.src_embedding.tokens.weight, model.tgt_embedding.tokens.weight, model.head.weight
    assert (tgt is head) == (sharing != "none") and (src is tgt) == (sharing == "all")
    again = pickle.loads(pickle.dumps(model))
    assert (again.tgt_embedding.tokens.weight is again.head.weight) == (sharing != "none")
    inputs = pair()
    torch.testing.assert_close(copy.deepcopy(model)(*inputs), model(*inputs))
    assert f"share_embeddings={sharing!r}" in repr(model)


def test_initialisation():
    model = build(d_model=64, nhead=4, dim_feedforward=128, share_embeddings="none", padding_idx=PAD)
    for stack in (model.encoder, model.decoder):
        for name, parameter in stack.named_parameters():
            if parameter.dim() > 1:
                bound = math.sqrt(6 / sum(parameter.shape))
                assert 0.9 * bound < parameter.abs().max() <= bound, name
            else:
                assert torch.all(parameter == ("norm" in name and "weight" in name)), name
    table = model.src_embedding.tokens.weight
    assert not table[PAD].any()
    assert 0.1 < table[1:].std() < 0.15  # 64 ** -0.5 = 0.125


def test_policies_and_compile():
    model = randomize(build(padding_idx=PAD))
    src, tgt = pair()
    src[0, 4:] = PAD
    expected = output_and_grads(model, src, tgt)
    for options in ({"save": "lean"}, {"checkpoint": True}):
        other = build(padding_idx=PAD, **options)
        other.load_state_dict(model.state_dict())
        torch.testing.assert_close(output_and_grads(other, src, tgt), expected)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(output_and_grads(compiled, src, tgt), expected)


def test_dropouts():
    model = build(dropout=0.3, attention_dropout=0.1, activation_dropout=0.2)
    layer = model.decoder.layers[0]
    assert (layer.dropout.p, layer.dropout1.p, layer.multihead_attn.dropout) == (0.2, 0.3, 0.1)
    src, tgt = pair()
    assert not torch.allclose(model(src, tgt), model(src, tgt))
    model.eval()
    assert torch.equal(model(src, tgt), model(src, tgt))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"share_embeddings": "all", "tgt_vocab": 30}, "share_embeddings: 'all' expects one vocabulary"),
        ({"share_embeddings": True}, "share_embeddings: expected one of 'none', 'decoder', 'all'"),
        ({"positions": "rotary"}, "positions: expected one of 'sinusoidal', 'learned'"),
        ({"padding_idx": V}, "padding_idx: expected a token of the vocabulary"),
        ({"tgt_vocab": 0}, "tgt_vocab: expected an integer of at least 1"),
        ({"nhead": 3}, "nhead: expected a divisor of d_model"),
    ],
)
def test_constructor_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


@pytest.mark.parametrize("padding_idx", ["a", 1.0, True])
def test_padding_idx_is_an_integer(padding_idx):
    with pytest.raises(TypeError, match=f"padding_idx: expected an integer or None; got {padding_idx!r}"):
        build(padding_idx=padding_idx)


def test_input_refusals():
    model = build(positions="learned", max_len=5)
    src, tgt = pair()
    with pytest.raises(ValueError, match="tokens: expected at most max_len = 5 a sequence; got 6"):
        model(src, tgt)
    for dtype in (torch.float32, torch.bool, torch.uint8):
        with pytest.raises(TypeError, match=f"src: expected integer token ids, int64 or int32; got {dtype}"):
            model(src.to(dtype), tgt)
        with pytest.raises(TypeError, match=f"tgt: expected integer token ids, int64 or int32; got {dtype}"):
            model(src[:, :5], tgt.to(dtype))
    with pytest.raises(TypeError, match="src: expected a tensor of token ids; got NoneType"):
        model(None, tgt)
    with pytest.raises(TypeError, match="memory: expected a tensor; got NoneType"):
        model.decode(tgt, None)
    with pytest.raises(ValueError, match=r"tgt: expected shape \(B, T\); got \(5,\)"):
        model(src[:, :5], tgt[0])
    with pytest.raises(ValueError, match="memory: expected the batch of tgt"):
        model(src[:1, :5], tgt)
