"""Floating-point operations of a layer, counted as two for each multiply-add of a matrix product and nothing else.

Forward, per token: 8 D^2 for q, k, v and the output projection, 4 D F for the FFN (or two FFNs of half the width),
4 S D for the scores and their weighted sum over S keys. Backward is twice that: each product Y = X W needs dX and dW.
What an implementation recomputes is not counted, so a share of the ceiling is a share of useful work.
"""

from __future__ import annotations

PASSES = ("forward", "forward+backward")


def ffn_flops(tokens: int, width: int, hidden: int, *, gated: bool = False) -> int:
    """Two products, (tokens, D) x (D, F) and (tokens, F) x (F, D); a gated one has a third."""
    return (3 if gated else 2) * 2 * tokens * width * hidden


def attention_flops(batch: int, length: int, width: int, *, causal: bool = False) -> int:
    """q, k, v and the output projection, then Q K^T and P V over all heads; half of these for a causal layer."""
    return 8 * batch * length * width * width + (2 if causal else 4) * batch * length * length * width


def layer_flops(batch: int, length: int, width: int, hidden: int) -> int:
    """Forward of one encoder layer, Lie-Trotter or Strang: `hidden` is the FFN width in total."""
    return attention_flops(batch, length, width) + ffn_flops(batch * length, width, hidden)


def of_pass(forward_flops: int, direction: str) -> int:
    """Operations of `direction`, one of PASSES, given the forward's."""
    return forward_flops if direction == "forward" else 3 * forward_flops
