"""Claim: the dropout masks are Philox-4x32-10 and equal those of Triton's ``tl.rand`` bit for bit."""

import importlib

import pytest
import torch

from macaron_ops.reference.dropout import HIDDEN_STREAM, OUTPUT_STREAM, dropout, philox, uniform


def seed_tensor(seed: int) -> torch.Tensor:
    return torch.tensor(seed, dtype=torch.int64)


def test_known_answer():
    """The first word of Random123's known answer for counter 0, key 0 (kat_vectors, philox4x32 10)."""
    zero = torch.zeros(1, dtype=torch.int64)
    assert philox(seed_tensor(0), zero, zero).item() == 0x6627E8D5


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**32 + 5, 2**62 + 12345678901, -1])
@pytest.mark.parametrize("stream", [OUTPUT_STREAM, HIDDEN_STREAM, 17])
def test_equals_triton(seed, stream, device):
    triton = pytest.importorskip("triton")
    tl = triton.language

    @triton.jit
    def kernel(out, seed_pointer, stream, n, BLOCK: tl.constexpr):
        position = tl.arange(0, BLOCK).to(tl.int64)
        seed = tl.load(seed_pointer)
        offset = position + (tl.full((BLOCK,), 0, tl.int64) + stream << 52)
        tl.store(out + position, tl.rand(seed, offset), mask=position < n)

    n = 1000
    expected = torch.full((n,), torch.nan, device=device)
    kernel[(1,)](expected, seed_tensor(seed).to(device), stream, n, BLOCK=1024)
    assert torch.equal(uniform(seed_tensor(seed).to(device), torch.Size((n,)), stream), expected)


def test_blocks_are_one_stream(monkeypatch):
    shape = torch.Size((7, 11))
    whole = uniform(seed_tensor(5), shape, OUTPUT_STREAM)
    monkeypatch.setattr(importlib.import_module("macaron_ops.reference.dropout"), "_BLOCK", 10)
    assert torch.equal(uniform(seed_tensor(5), shape, OUTPUT_STREAM), whole)


def test_positions_past_32_bits_use_the_second_counter_word():
    """What ``tl.rand`` does with an int64 offset: the high half is the second word."""
    position = torch.tensor([5, 2**32 + 5, 2**33 + 5])
    words = philox(seed_tensor(3), position & 0xFFFFFFFF, position >> 32)
    assert words.unique().numel() == 3


def test_probability_and_scale():
    x = torch.ones(200, 500)
    y = dropout(x, 0.3, seed_tensor(7), OUTPUT_STREAM)
    kept = y != 0
    assert torch.equal(y[kept], torch.full_like(y[kept], 1 / 0.7))
    deviation = (0.3 * 0.7 / x.numel()) ** 0.5
    assert abs(kept.double().mean() - 0.7) < 5 * deviation


def test_edge_probabilities():
    x = torch.randn(5, 7)
    assert dropout(x, 0.0, None, OUTPUT_STREAM) is x
    assert torch.equal(dropout(x, 1.0, seed_tensor(1), OUTPUT_STREAM), torch.zeros_like(x))


def test_streams_and_seeds_are_independent():
    """Neighbouring seeds and the two streams: no correlation past five standard deviations in 64k draws."""
    draws = [uniform(seed_tensor(s), torch.Size((65536,)), stream) for s in (0, 1, 2) for stream in (0, 1)]
    for i, a in enumerate(draws):
        for b in draws[:i]:
            correlation = torch.corrcoef(torch.stack([a, b]))[0, 1].abs()
            assert correlation < 5 / 65536**0.5
