"""The Macaron layers: half FFN, attention, half FFN (Strang splitting), in one autograd node.

    x = x + 0.5 FFN'(N x)                              macaron_linear1, macaron_linear2, macaron_norm
    x = x + MHA(N x)                                   self_attn, norm1
    x = x + MHA(N x, memory)     decoder only          multihead_attn, norm2
    x = x + 0.5 FFN(N x)                               linear1, linear2, and norm2 (encoder) or norm3 (decoder)

with ``FFN(x) = drop(linear2(drop_h(act(linear1 x))))``; post-norm ``x = N(x + 0.5 FFN(x))`` and so on. Source: Lu et
al. 2019, arXiv 1906.02762, and its code, github.com/zhuohan123/macaron-net.

Each half has half the width, so the layer has the parameters of the standard one (and one norm more). Names,
signatures and initialisation are those of torch's layers: q, k, v Xavier uniform with zero biases, ``nn.Linear``'s own
for the rest.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from macaron_ops.ops import Substep
from macaron_ops.ops.checks import probability

from .activation import Activation, fused_activation, hidden_rows
from .layer_checks import check_layer
from .sublayers import attend_substep, ffn_substep
from .torch_forward import decode, encode

__all__ = ["MacaronDecoderLayer", "MacaronEncoderLayer"]

HALF = 0.5


class _MacaronLayer(nn.Module):
    """What the encoder's and the decoder's layer share: self-attention between two half-FFNs."""

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: Activation = F.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device=None,
        dtype=None,
        *,
        attention_dropout: float | None = None,
        activation_dropout: float | None = None,
        save: str = "fast",
    ):
        check_layer(d_model, nhead, dim_feedforward, dropout, layer_norm_eps, save, halves=True)
        attention_dropout = dropout if attention_dropout is None else attention_dropout
        activation_dropout = dropout if activation_dropout is None else activation_dropout
        probability("attention_dropout", attention_dropout)
        probability("activation_dropout", activation_dropout)
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        attention = {"dropout": attention_dropout, "bias": bias, "batch_first": batch_first, **factory}
        self.activation = fused_activation(activation)
        self.norm_first = norm_first
        self.save = save
        hidden = dim_feedforward // 2
        rows = hidden_rows(self.activation, hidden)
        self.macaron_linear1 = nn.Linear(d_model, rows, bias=bias, **factory)
        self.macaron_linear2 = nn.Linear(hidden, d_model, bias=bias, **factory)
        self.self_attn = nn.MultiheadAttention(d_model, nhead, **attention)
        if self.has_context:
            self.multihead_attn = nn.MultiheadAttention(d_model, nhead, **attention)
        self.linear1 = nn.Linear(d_model, rows, bias=bias, **factory)
        self.linear2 = nn.Linear(hidden, d_model, bias=bias, **factory)
        norms = ("macaron_norm", "norm1", "norm2", *(("norm3",) if self.has_context else ()))
        for name in norms:
            self.add_module(name, nn.LayerNorm(d_model, eps=layer_norm_eps, bias=bias, **factory))
        self.dropout = nn.Dropout(activation_dropout)
        self.macaron_dropout = nn.Dropout(dropout)
        self.dropout1 = nn.Dropout(dropout)
        self.dropout2 = nn.Dropout(dropout)
        if self.has_context:
            self.dropout3 = nn.Dropout(dropout)

    has_context = False

    def _half(self, linear1: nn.Linear, linear2: nn.Linear, norm: nn.Module, dropout: nn.Module) -> Substep:
        return ffn_substep(
            linear1,
            linear2,
            norm,
            activation=self.activation,
            norm_first=self.norm_first,
            activation_dropout=self.dropout,
            dropout=dropout,
            step=HALF,
        )

    def _first_half(self) -> Substep:
        return self._half(self.macaron_linear1, self.macaron_linear2, self.macaron_norm, self.macaron_dropout)

    def _attend(self, attention: nn.MultiheadAttention, norm: nn.Module, dropout: nn.Module, arguments: dict):
        return attend_substep(attention, norm, norm_first=self.norm_first, dropout=dropout, **arguments)

    def extra_repr(self) -> str:
        order = "FFN/2, attention, cross-attention, FFN/2" if self.has_context else "FFN/2, attention, FFN/2"
        named = self.activation if isinstance(self.activation, str) else type(self.activation).__name__
        return f"{order}; activation={named!r}, norm_first={self.norm_first}, save={self.save!r}"


class MacaronEncoderLayer(_MacaronLayer):
    """Half FFN, self-attention, half FFN, with the signatures of ``nn.TransformerEncoderLayer``.

    Args:
        d_model: D. nhead: heads, divides D.
        dim_feedforward: total hidden width, even: each half-FFN has half of it.
        dropout: probability after attention and FFNs (before their scaling), and unless given below also of
        attention_dropout: the attention weights, and
        activation_dropout: the hidden activations.
        activation: a name (gated ones too), or a callable; ``F.gelu``, ``nn.SiLU()`` and the like are fused.
        layer_norm_eps, batch_first, norm_first, bias: as torch's.
        save: memory policy, ``"fast"`` or ``"lean"``.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
    """

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """``src (B, T, D)``, ``(T, B, D)``, ``(T, D)`` or nested ``(B, *, D)`` to the same shape.

        Args:
            src_mask: ``(T, T)`` or ``(B H, T, T)``. src_key_padding_mask: ``(B, T)`` or ``(T,)``.
            is_causal: token i sees the tokens j <= i; with a ``src_mask``, torch's hint that it says so.
        """
        return encode(self.substeps, self.self_attn, src, src_mask, src_key_padding_mask, is_causal, self.save)

    def substeps(self, **attention) -> list[Substep]:
        """B/2, A, B/2."""
        return [
            self._first_half(),
            self._attend(self.self_attn, self.norm1, self.dropout1, attention),
            self._half(self.linear1, self.linear2, self.norm2, self.dropout2),
        ]


class MacaronDecoderLayer(_MacaronLayer):
    """Half FFN, self-attention, cross-attention, half FFN, with the signatures of ``nn.TransformerDecoderLayer``.

    Args and errors as :class:`MacaronEncoderLayer`.
    """

    has_context = True

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """``tgt (B, T, D)``, ``(T, B, D)``, ``(T, D)`` or nested ``(B, *, D)`` to the same shape.

        Args:
            memory: as tgt, with S tokens.
            tgt_mask: ``(T, T)`` or ``(B H, T, T)``. memory_mask: ``(T, S)`` or ``(B H, T, S)``.
            tgt_key_padding_mask: ``(B, T)`` or ``(T,)``. memory_key_padding_mask: ``(B, S)`` or ``(S,)``.
            tgt_is_causal, memory_is_causal: token i sees the tokens j <= i; with a mask, torch's hint that it says so.
        """
        return decode(
            self.substeps,
            self.self_attn,
            self.multihead_attn,
            tgt,
            memory,
            tgt_mask,
            memory_mask,
            tgt_key_padding_mask,
            memory_key_padding_mask,
            tgt_is_causal,
            memory_is_causal,
            self.save,
        )

    def substeps(self, among: dict, across: dict) -> list[Substep]:
        """B/2, self-attention, cross-attention, B/2."""
        return [
            self._first_half(),
            self._attend(self.self_attn, self.norm1, self.dropout1, among),
            self._attend(self.multihead_attn, self.norm2, self.dropout2, across),
            self._half(self.linear1, self.linear2, self.norm3, self.dropout3),
        ]
