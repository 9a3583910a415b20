"""Counter-based dropout: the mask is a pure function of (seed, stream, position), the same on every backend.

The generator is Philox-4x32-10 (Salmon et al. 2011, doi:10.1145/2063384.2063405) in Triton's arrangement, so that a
kernel writes ``tl.rand(seed, position + (stream << 52))`` and gets these numbers bit for bit:

    key      = (seed mod 2^32, seed div 2^32)
    counter  = (position mod 2^32, position div 2^32 + stream * 2^20, 0, 0)
    r        = first word of Philox-4x32-10(counter, key), read as int32
    u        = float32(r if r >= 0 else -r - 1) * float32(4.6566127342e-10)        in [0, 1)
    keep     = u >= p;    drop(x) = keep ? x / (1 - p) : 0

``position`` is the element's index in the contiguous tensor that is dropped: ``row * features + feature`` for the
output and the hidden activations, ``((b * H + h) * T + i) * S + j`` for attention weights; it stays below 2^52. The
dropouts that share a seed take the numbers of different streams: 0 and 1 within one operator, ``2 i`` and ``2 i + 1``
for the i-th substep of a layer that draws its own seed. So consecutive seeds never share numbers.
"""

import math

import torch
from torch import Tensor

__all__ = ["HIDDEN_STREAM", "OUTPUT_STREAM", "dropout", "philox", "uniform"]

OUTPUT_STREAM = 0  # dropout of the sublayer's output
HIDDEN_STREAM = 1  # dropout of the hidden activations, or of the attention weights

_WORD = 0xFFFFFFFF
_ROUND_A, _ROUND_B = 0xD2511F53, 0xCD9E8D57
_KEY_A, _KEY_B = 0x9E3779B9, 0xBB67AE85
_BLOCK = 1 << 17
_TO_UNIT = 4.6566127342e-10  # Triton's uint_to_uniform_float: the largest float32 result stays below 1


def philox(seed: Tensor, low: Tensor, high: Tensor, rounds: int = 10) -> Tensor:
    """First output word of Philox-4x32 for the counter ``(low, high, 0, 0)``.

    Args:
        seed: int64, 0-d; its two halves are the key.
        low, high: int64 counter words in [0, 2^32), any (equal) shape.

    Returns:
        int64 in [0, 2^32), of the counters' shape.
    """
    # A 32 x 32 bit product fits 64 bits; int64 multiplication keeps exactly those bits, and the mask after the
    # arithmetic shift removes the copies of the sign.
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    c0, c1, c2, c3 = low, high, torch.zeros_like(low), torch.zeros_like(low)
    for _ in range(rounds):
        product_a, product_b = c0 * _ROUND_A, c2 * _ROUND_B
        c0, c2 = ((product_b >> 32) & _WORD) ^ c1 ^ k0, ((product_a >> 32) & _WORD) ^ c3 ^ k1
        c1, c3 = product_b & _WORD, product_a & _WORD
        k0, k1 = (k0 + _KEY_A) & _WORD, (k1 + _KEY_B) & _WORD
    return c0


def uniform(seed: Tensor, shape: torch.Size, stream: int) -> Tensor:
    """float32 numbers in [0, 1), one per element of a contiguous tensor of ``shape`` (on the seed's device)."""
    count = math.prod(shape)
    if seed.device.type != "cpu" or torch.compiler.is_compiling():
        return _uniform(seed, 0, count, stream).view(shape)
    # On the CPU block by block: the 64-bit words of ten rounds stay in the cache, and never take the whole memory.
    blocks = [_uniform(seed, start, min(start + _BLOCK, count), stream) for start in range(0, max(count, 1), _BLOCK)]
    return torch.cat(blocks).view(shape)


def _uniform(seed: Tensor, start: int, stop: int, stream: int) -> Tensor:
    position = torch.arange(start, stop, device=seed.device)
    r = philox(seed, position & _WORD, (position >> 32) | (stream << 20))
    r = torch.where(r > 0x7FFFFFFF, _WORD - r, r)  # as int32: r if r >= 0 else -r - 1
    return r.to(torch.float32) * _TO_UNIT


def dropout(x: Tensor, p: float, seed: Tensor | None, stream: int) -> Tensor:
    """``x / (1 - p)`` where the element is kept, 0 elsewhere. Linear in ``x``: its backward is itself."""
    if p == 0.0:
        return x
    keep = uniform(seed, x.shape, stream) >= p
    return torch.where(keep, x * (1.0 / (1.0 - p) if p < 1.0 else 0.0), 0.0)
