"""Which kernels compute the attention itself, between the projections: ours, or PyTorch's where they are faster.

    triton   attention_forward, attention_backward: every option, the same bits every time
    cudnn    PyTorch's cuDNN attention
    flash    PyTorch's flash attention; on the CPU too, beside our kernels in Triton's interpreter

PyTorch's take softmax(scale q k^T) v, causal or not, for heads of 8, 16, ... channels in 16 bits. They read q, k and v
where they lie side by side, by their strides, and keep the log-sum-exp of the scores; dq, dk and dv come as matrices of
their own (:mod:`side_by_side`). cuDNN's backward pass adds dq by atomic operations: the last bits may change from run
to run, and ``torch.use_deterministic_algorithms(True)`` keeps ours.

``with use_core("triton"): ...`` or ``MACARON_OPS_ATTENTION=triton`` ask for one by name.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from .attention import Attention
from .attention_forward import attention_forward
from .device import ceil_div, processors, target

__all__ = [
    "CORES",
    "OPERATORS",
    "Core",
    "attention",
    "attention_gradients",
    "choose",
    "core_asked_for",
    "core_of",
    "gradients_in_pieces",
    "pieces_of",
    "settings",
    "statistics_shape",
    "use_core",
    "why_not_core",
]

CORES = ("triton", "cudnn", "flash")
_aten = torch.ops.aten
# What the cores of PyTorch's are: its operators, without randomness or state of their own where nothing is dropped.
OPERATORS = (
    _aten._scaled_dot_product_cudnn_attention.default,
    _aten._scaled_dot_product_cudnn_attention_backward.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_flash_attention_backward.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward.default,
)


class Core(NamedTuple):
    name: str
    why: str


class Faster(NamedTuple):
    """Where a core of PyTorch's was measured to be faster than ours, forward and backward."""

    architecture: str
    head_dim: int
    tokens: int  # from so many on
    core: str
    measured: str


# The first row that fits a call holds; where none fits, ours runs. Timed on an H200 at 16 x 1024 tokens of 512
# channels; causal the ratios are alike. That they hold from 512 tokens on is a guess.
FASTER = (
    Faster("sm90", 64, 512, "cudnn", "85 us forward, ours 124; 252 us backward, ours 511"),
    Faster("sm90", 128, 512, "cudnn", "61 us forward, ours 107; 209 us backward, ours 402"),
)

ROWS_OF_A_PROGRAM = 128  # about: keys that a program of their backward kernels holds

_asked_for: str | None = os.environ.get("MACARON_OPS_ATTENTION") or None


@contextmanager
def use_core(name: str) -> Iterator[None]:
    """Inside, attention runs on the core of this name; a call that it cannot run is an error that says why. Backward
    passes take the core of their forward pass."""
    global _asked_for
    if name not in CORES:
        raise ValueError(f"name: expected one of {', '.join(map(repr, CORES))}; got {name!r}")
    before, _asked_for = _asked_for, name
    try:
        yield
    finally:
        _asked_for = before


def core_asked_for() -> str | None:
    """The core that was asked for by name."""
    if _asked_for is not None and _asked_for not in CORES:
        raise ValueError(f"MACARON_OPS_ATTENTION: expected one of {', '.join(CORES)}; got {_asked_for!r}")
    return _asked_for


def settings() -> tuple[str | None, bool]:
    """What :func:`choose` looks at beside the call."""
    return _asked_for, torch.are_deterministic_algorithms_enabled()


def why_not_core(name: str, x: Tensor, t, o) -> str | None:
    """Why a core cannot run a call; None where it can. Looks at shapes, dtypes and options alone."""
    if name == "triton":
        return None
    width = t.w_out.shape[1]
    head_dim, keys = width // o.num_heads, (x if t.context is None else t.context).shape[-2]
    widest = 128 if name == "cudnn" else 256
    narrow = t.w_q.dtype in (torch.bfloat16, torch.float16)
    if t.attn_mask is not None or t.key_padding_mask is not None or t.cu_seqlens is not None:
        return "masks and packed sequences are ours alone"
    if o.attention_dropout > 0.0:
        return "the masks of attention_dropout are ours alone"
    if o.num_kv_heads != o.num_heads:
        return "heads that share keys were not tried on it"
    if o.causal and keys != x.shape[-2]:
        return "causal with another number of keys than of queries means something else there"
    if not o.scale > 0.0:
        return f"it takes a positive scale, not {o.scale}"
    if head_dim % 8 or head_dim > widest:
        return f"its heads have a multiple of 8 channels, at most {widest}, not {head_dim}"
    if name == "cudnn" and x.device.type == "cpu":
        return "cuDNN has no attention for the CPU"
    if not narrow and x.device.type != "cpu":
        return f"it runs bfloat16 and float16, not {t.w_q.dtype}"
    if name == "cudnn" and min(x.shape[-2], keys) < 2:
        return "it takes two tokens and more"
    if 3 * width * max(x.shape[:-1].numel(), x.shape[:-2].numel() * keys) >= 2**31:
        return "not tried past 2^31 numbers"
    return None


def choose(x: Tensor, t, o) -> Core:
    """The core of a call, and why.

    Raises:
        RuntimeError: the core that was asked for cannot run it.
    """
    asked = core_asked_for()
    if asked is not None:
        why_not = why_not_core(asked, x, t, o)
        if why_not is not None:
            raise RuntimeError(f"attention core {asked!r} was asked for, but {why_not}")
        return Core(asked, "asked for")
    if torch.are_deterministic_algorithms_enabled():
        return Core("triton", "torch.use_deterministic_algorithms asks for the same bits every time")
    on, head_dim = target(x.device), t.w_out.shape[1] // o.num_heads
    rows = [row for row in FASTER if (row.architecture, row.head_dim) == (on.architecture, head_dim)]
    why_not = f"none was measured to be faster on {on.name or on.architecture} in heads of {head_dim}"
    for row in rows:
        why_not = why_not_core(row.core, x, t, o)
        if why_not is None and x.shape[-2] >= row.tokens:
            return Core(row.core, f"on an H200 at 16 x 1024 tokens {row.measured}")
        why_not = f"{row.core}: {why_not or f'faster from {row.tokens} tokens on'}"
    return Core("triton", why_not)


def statistics_shape(core: str, batch: int, heads: int, tokens: int) -> tuple[int, ...]:
    """Of what a core keeps of the scores: ours m and 1 / l, PyTorch's their log-sum-exp."""
    of_a_head = {"triton": (2, tokens), "cudnn": (tokens, 1), "flash": (tokens,)}
    return batch, heads, *of_a_head[core]


def core_of(statistics: Tensor, tokens: int) -> str:
    """The core that kept them."""
    return "flash" if statistics.dim() == 3 else "triton" if statistics.shape[2:] == (2, tokens) else "cudnn"


def attention(core: str, q: Tensor, k: Tensor, v: Tensor, a: Attention, keep: bool) -> tuple[Tensor, Tensor | None]:
    """``o (B T, H head_dim)`` of q, of that shape, and ``k``, ``v (B S, Hkv head_dim)``, whose rows have no gaps; and
    the statistics, if they are to be kept."""
    if core == "triton":
        o = torch.empty((q.shape[0], a.widths[0]), dtype=q.dtype, device=q.device)
        shape = statistics_shape(core, a.batch, a.heads, a.queries)
        statistics = torch.empty(shape, dtype=torch.float32, device=q.device) if keep else None
        attention_forward(q, k, v, a, o, statistics)
        return o, statistics
    inputs = [_heads(p, a) for p in (q, k, v)]
    if core == "cudnn":
        o, lse = _aten._scaled_dot_product_cudnn_attention(*inputs, None, keep, 0.0, a.causal, scale=a.scale)[:2]
    elif q.device.type == "cpu":
        o, lse = _aten._scaled_dot_product_flash_attention_for_cpu(*inputs, 0.0, a.causal, scale=a.scale)
    else:
        o, lse = _aten._scaled_dot_product_flash_attention(*inputs, 0.0, a.causal, scale=a.scale)[:2]
    return _matrix(o), lse if keep else None


def pieces_of(a: Attention, device: torch.device) -> int:
    """In how many pieces of the batch to form the gradients where memory counts: apart from what they become they and
    cuDNN's sums are five matrices like q. Each piece fills the device, and its statistics begin at 16 bytes."""
    programs, numbers = ceil_div(a.queries, ROWS_OF_A_PROGRAM) * a.heads * a.batch, a.batch * a.heads * a.queries
    fit = (n for n in (4, 2) if a.batch % n == 0 and programs >= n * processors(device) and numbers // n % 4 == 0)
    return next(fit, 1)


def gradients_in_pieces(core: str, tensors: Sequence[Tensor], a: Attention, count: int) -> Iterator[list[Tensor]]:
    """:func:`attention_gradients` of ``(do, q, k, v, o, statistics)``, of one piece of the batch after the other."""
    batch = a.batch // count
    for first in range(0, a.batch, batch):
        piece = [t[first * (n := t.shape[0] // a.batch) : (first + batch) * n] if count > 1 else t for t in tensors]
        yield attention_gradients(core, *piece, a._replace(batch=batch))


def attention_gradients(
    core: str, do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, statistics: Tensor, a: Attention
) -> list[Tensor]:
    """PyTorch's dq, dk and dv, matrices like q, k and v without gaps; ``do`` and ``o`` are contiguous."""
    inputs = [_heads(p, a) for p in (do, q, k, v, o)]
    options = (0.0, a.causal)
    nothing, seed = (None, None), torch.empty(2, dtype=torch.uint64, device=q.device)  # not read without dropout
    if core == "cudnn":
        found = _aten._scaled_dot_product_cudnn_attention_backward(
            *inputs, statistics, seed, seed, None, *nothing, a.queries, a.keys, *options, scale=a.scale
        )
    elif q.device.type == "cpu":
        found = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *inputs, statistics, *options, scale=a.scale
        )  # fmt: skip
    else:
        found = _aten._scaled_dot_product_flash_attention_backward(
            *inputs, statistics, *nothing, a.queries, a.keys, *options, seed, seed, scale=a.scale
        )
    return [_matrix(p) for p in found]


def _heads(p: Tensor, a: Attention) -> Tensor:
    """``(B tokens, heads head_dim)`` as (B, heads, tokens, head_dim), where it lies."""
    return p.view(a.batch, -1, p.shape[1] // a.head_dim, a.head_dim).transpose(1, 2)


def _matrix(p: Tensor) -> Tensor:
    """The way back; PyTorch's results lie like the queries."""
    return p.transpose(1, 2).flatten(2).flatten(0, 1)
