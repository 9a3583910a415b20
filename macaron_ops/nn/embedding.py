"""``TokenEmbedding``: token ids to vectors, with positions added."""

import torch
from torch import Tensor, nn

from macaron_ops.ops.checks import choice, positive_int, probability

from .positions import POSITIONS, fairseq_sinusoidal, sinusoidal

__all__ = ["TokenEmbedding", "check_tokens"]


class TokenEmbedding(nn.Module):
    """``drop(sqrt(D) E[token] + position)`` (Vaswani et al. 2017, section 3.4), E drawn from N(0, 1 / D).

    Args:
        vocab_size: number of tokens. d_model: D.
        positions: ``"sinusoidal"``, ``"learned"`` (N(0, 1) at first), ``"rotary"`` (nothing is added here) or
            ``"fairseq"`` (sines beside cosines, counted over the tokens that are not padding).
        max_len: longest sequence, of learned positions.
        padding_idx: this token's vector is zero and stays zero.
        dropout: probability, in training.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
    """

    def __init__(
        self,
        vocab_size: int,
        d_model: int,
        *,
        positions: str = "sinusoidal",
        max_len: int = 1024,
        padding_idx: int | None = None,
        dropout: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        vocab_size, d_model = positive_int("vocab_size", vocab_size), positive_int("d_model", d_model)
        choice("positions", positions, POSITIONS)
        if padding_idx is not None and (isinstance(padding_idx, bool) or not isinstance(padding_idx, int)):
            raise TypeError(f"padding_idx: expected an integer or None; got {padding_idx!r}")
        if padding_idx is not None and not 0 <= padding_idx < vocab_size:
            raise ValueError(f"padding_idx: expected a token of the vocabulary, below {vocab_size}; got {padding_idx}")
        if positions == "fairseq" and padding_idx is None:
            raise ValueError("padding_idx: expected a token where positions are 'fairseq'; got None")
        self.kind = positions
        self.scale = d_model**0.5
        self.tokens = nn.Embedding(vocab_size, d_model, padding_idx=padding_idx, **factory)
        self.positions = None
        if positions == "learned":
            self.positions = nn.Embedding(positive_int("max_len", max_len), d_model, **factory)
        self.dropout = nn.Dropout(probability("dropout", dropout))
        nn.init.normal_(self.tokens.weight, std=d_model**-0.5)
        self.tokens._fill_padding_idx_with_zero()

    def forward(self, tokens: Tensor) -> Tensor:
        """``tokens (B, T)`` to ``(B, T, D)``."""
        length = tokens.shape[-1]
        x = self.scale * self.tokens(tokens)
        if self.positions is not None:
            if length > self.positions.num_embeddings:
                raise ValueError(
                    f"tokens: expected at most max_len = {self.positions.num_embeddings} a sequence; got {length}"
                )
            x = x + self.positions.weight[:length]
        elif self.kind == "sinusoidal":
            x = x + sinusoidal(length, x.shape[-1], device=x.device, dtype=x.dtype)
        elif self.kind == "fairseq":
            padding_idx = self.tokens.padding_idx
            x = x + fairseq_sinusoidal(tokens == padding_idx, padding_idx, x.shape[-1], dtype=x.dtype)
        return self.dropout(x)

    def extra_repr(self) -> str:
        return f"positions={self.kind!r}"


def check_tokens(name: str, tokens: object) -> None:
    """Integers ``(B, T)``."""
    if not isinstance(tokens, Tensor):
        raise TypeError(f"{name}: expected a tensor of token ids; got {type(tokens).__name__}")
    if tokens.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name}: expected integer token ids, int64 or int32; got {tokens.dtype}")
    if tokens.dim() != 2:
        raise ValueError(f"{name}: expected shape (B, T); got {tuple(tokens.shape)}")
