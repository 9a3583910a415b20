"""Claim: MacaronLM is causal in every scheme and kind of positions, learns a sequence by heart, and continues it."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F

from macaron_ops.nn import MacaronLM
from macaron_ops.nn.positions import rotary_angles
from tests.nn.tools import output_and_grads, randomize

V = 13
SIZES = {"vocab_size": V, "d_model": 16, "nhead": 4, "num_layers": 2, "dim_feedforward": 32}


def build(**options):
    return MacaronLM(**{**SIZES, "dtype": torch.float64, **options})


@pytest.mark.parametrize("positions", ["rotary", "learned", "sinusoidal"])
@pytest.mark.parametrize("scheme", ["lie_trotter_AB", "lie_trotter_BA", "strang_BAB", "strang_ABA", "parallel", "sws"])
def test_causal(scheme, positions):
    model = randomize(build(scheme=scheme, positions=positions))
    tokens = torch.randint(V, (2, 9))
    later = tokens.clone()
    later[:, 5:] = (later[:, 5:] + 1) % V
    expected, other = model(tokens), model(later)
    torch.testing.assert_close(other[:, :5], expected[:, :5])
    assert not torch.allclose(other[:, 5:], expected[:, 5:])


@pytest.mark.parametrize("positions", ["rotary", "learned", "sinusoidal"])
def test_positions_matter(positions):
    """Without positions the last logits are the same for every order of the tokens before."""
    model = randomize(build(positions=positions))
    tokens = torch.arange(9)[None]
    turned = torch.cat([tokens[:, :8].flip(1), tokens[:, 8:]], 1)
    assert not torch.allclose(model(tokens)[:, -1], model(turned)[:, -1])


def test_rotary_scores_depend_on_the_distance_alone():
    cos, sin = rotary_angles(7, 6, dtype=torch.float64)
    assert cos.shape == sin.shape == (7, 3)
    q, k = torch.randn(2, 6, dtype=torch.float64)

    def turn(u, t):
        a, b = u.chunk(2)
        return torch.cat([a * cos[t] - b * sin[t], b * cos[t] + a * sin[t]])

    # the angles are computed in float32
    torch.testing.assert_close(turn(q, 5) @ turn(k, 3), turn(q, 2) @ turn(k, 0), rtol=1e-6, atol=1e-6)
    assert not torch.allclose(turn(q, 5) @ turn(k, 3), turn(q, 5) @ turn(k, 2), rtol=1e-3)


def test_loss():
    model = randomize(build())
    tokens = torch.randint(V, (2, 9))
    inputs, targets = tokens[:, :-1], tokens[:, 1:].clone()
    targets[0, :3] = -100
    logits, loss = model(inputs, targets)
    torch.testing.assert_close(logits, model(inputs))
    picked = -torch.log_softmax(logits, -1).gather(-1, targets.clamp_min(0)[..., None])[..., 0]
    torch.testing.assert_close(loss, picked[targets != -100].mean())
    assert model.to(torch.bfloat16)(inputs, targets)[1].dtype == torch.float32


@pytest.mark.parametrize("scheme", ["strang_BAB", "lie_trotter_AB"])
def test_learns_a_sequence_and_continues_it(scheme):
    model = MacaronLM(**SIZES, scheme=scheme)
    sequence = torch.randperm(V)[None].repeat(1, 3)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        _, loss = model(sequence[:, :-1], sequence[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 2.0 and losses[-1] < 0.1
    assert torch.equal(model.generate(sequence[:, :6], 20, temperature=0), sequence[:, :26])


def test_sampling():
    model = randomize(build(dropout=0.5)).train()
    start = torch.randint(V, (3, 2))
    a = model.generate(start, 12, seed=4)
    assert model.training and a.shape == (3, 14) and torch.equal(a[:, :2], start)
    assert torch.equal(model.generate(start, 12, seed=4), a)
    assert not torch.equal(model.generate(start, 12, seed=5), a)
    greedy = model.generate(start, 12, temperature=0)
    assert torch.equal(model.generate(start, 12, top_k=1), greedy)
    model.eval()
    for t in range(2, 14):
        assert torch.equal(model(greedy[:, :t])[:, -1].argmax(-1), greedy[:, t])


def test_sampling_probabilities():
    """Temperature and top_k, by counting: 4000 samples of the first token."""
    model = randomize(build())
    start = torch.zeros(4000, 1, dtype=torch.int64)
    logits = model(start[:1])[0, -1]
    best = logits.topk(4).indices
    expected = torch.zeros_like(logits)
    expected[best] = torch.softmax(logits[best] / 0.5, -1)
    drawn = model.generate(start, 1, temperature=0.5, top_k=4, seed=0)[:, 1]
    counted = F.one_hot(drawn, V).double().mean(0)
    assert (counted - expected).abs().max() < 4 * 0.5 / 4000**0.5  # four standard deviations at most
    assert not counted[expected == 0].any()


def test_learned_positions_slide_in_generation():
    model = randomize(build(positions="learned", max_len=4))
    tokens = model.generate(torch.zeros(1, 3, dtype=torch.int64), 5, temperature=0)
    assert tokens.shape == (1, 8)
    assert model(tokens[:, 3:7])[:, -1].argmax(-1) == tokens[0, 7]
    with pytest.raises(ValueError, match="tokens: expected at most max_len = 4 a sequence; got 8"):
        model(tokens)


def test_padding():
    model = randomize(build(positions="sinusoidal"))
    tokens = torch.randint(V, (2, 6))
    padding = torch.zeros(2, 6, dtype=torch.bool)
    padding[1, 2] = True
    other = tokens.clone()
    other[1, 2] = (other[1, 2] + 1) % V
    a, b = (model(t, key_padding_mask=padding) for t in (tokens, other))
    torch.testing.assert_close(a[1, 3:], b[1, 3:])
    assert not torch.allclose(model(tokens)[1, 3:], model(other)[1, 3:])


def test_policies_copies_and_compile():
    model = randomize(build())
    tokens = torch.randint(V, (2, 6))
    expected = output_and_grads(model, tokens)
    lean, saving = build(save="lean"), build(checkpoint=True)
    for other in (lean, saving):
        other.load_state_dict(model.state_dict())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for other in (lean, saving, compiled, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(output_and_grads(other, tokens), expected)


def test_tied_embeddings():
    assert build().head.weight is not build(tie_embeddings=False).embedding.tokens.weight
    tied, untied = build(), build(tie_embeddings=False)
    assert tied.head.weight is tied.embedding.tokens.weight
    assert untied.head.weight is not untied.embedding.tokens.weight
    assert sum(p.numel() for p in untied.parameters()) - sum(p.numel() for p in tied.parameters()) == 16 * V


def test_autocast():
    model = MacaronLM(**SIZES)
    tokens = torch.randint(V, (2, 6))
    with torch.autocast("cpu", torch.bfloat16):
        logits, loss = model(tokens, tokens)
    assert logits.dtype == torch.bfloat16 and loss.dtype == torch.float32
    loss.backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m(torch.zeros(6, dtype=torch.int64)), r"tokens: expected shape \(B, T\)"),
        (lambda m: m(torch.zeros(2, 6, dtype=torch.int64), torch.zeros(2, 5, dtype=torch.int64)), "targets: expected"),
        (lambda m: m.generate(torch.zeros(2, 0, dtype=torch.int64), 3), "tokens: expected at least one token"),
        (lambda m: m.generate(torch.zeros(2, 1, dtype=torch.int64), 0), "max_new_tokens: expected an integer"),
        (lambda m: m.generate(torch.zeros(2, 1, dtype=torch.int64), 1, temperature=-1.0), "temperature: expected"),
        (lambda m: m.generate(torch.zeros(2, 1, dtype=torch.int64), 1, top_k=0), "top_k: expected an integer"),
        (lambda m: build(positions="absolute"), "positions: expected one of"),
        (lambda m: build(num_layers=0), "num_layers: expected an integer of at least 1"),
        (lambda m: build(scheme="strang_CAC"), "scheme: expected one of .* Did you mean"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call(build())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m([[1, 2]]), "tokens: expected a tensor of token ids; got list"),
        (lambda m: m(torch.zeros(2, 6, dtype=torch.bool)), "tokens: expected integer token ids, .*; got torch.bool"),
        (lambda m: m.generate(torch.zeros(2, 1, dtype=torch.int64), 1, seed="a"), "seed: expected an integer or None"),
    ],
)
def test_refusals_of_types(call, message):
    with pytest.raises(TypeError, match=message):
        call(build())


def test_int32_tokens():
    model = randomize(build())
    tokens = torch.randint(V, (2, 6))
    torch.testing.assert_close(model(tokens.int(), tokens.int()), model(tokens, tokens))
