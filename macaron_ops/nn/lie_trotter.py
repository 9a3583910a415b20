"""torch's encoder and decoder layers as fused Lie-Trotter steps: attention, then FFN, in one autograd node.

The classes compute what their base classes compute, from the same parameters. An existing layer becomes one by
``layer.__class__ = LieTrotterEncoderLayer`` and goes back the same way: they need no attribute of their own.
Differences, all intended: a row that is masked entirely gets zeros from the attention, where torch gives NaN; dropout
takes its numbers from ``macaron_ops``' generator; a submodule (``self_attn``, ``linear1``, ...) with hooks or of
another class is refused at the call, since the submodules are read and not called; and ``is_causal=True`` without a
mask is always refused, where torch's inference path ignores it.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from macaron_ops.ops import Substep

from .activation import Activation, torch_activation
from .layer_checks import check_layer
from .sublayers import attend_substep, ffn_substep
from .torch_forward import decode, encode, require_mask

__all__ = ["LieTrotterDecoderLayer", "LieTrotterEncoderLayer"]


class _LieTrotterLayer:
    """What both layers add to torch's: the constructor's checks and its ``save``."""

    save = "fast"

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
        save: str = "fast",
    ):
        check_layer(d_model, nhead, dim_feedforward, dropout, layer_norm_eps, save)
        super().__init__(
            d_model,
            nhead,
            dim_feedforward,
            dropout,
            torch_activation(activation),
            layer_norm_eps,
            batch_first,
            norm_first,
            bias,
            device=device,
            dtype=dtype,
        )
        self.save = save

    def extra_repr(self) -> str:
        return f"norm_first={self.norm_first}, save={self.save!r}"


class LieTrotterEncoderLayer(_LieTrotterLayer, nn.TransformerEncoderLayer):
    """``nn.TransformerEncoderLayer`` with a fused forward: attention step, FFN step.

    Constructor, attributes, initialisation and ``state_dict`` are the base class's; ``activation`` may also be
    ``"silu"`` or ``"gelu_tanh"``, and ``save`` is the memory policy, ``"fast"`` or ``"lean"``.

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
            is_causal: hint that ``src_mask`` is the causal mask.
        """
        require_mask("is_causal", is_causal, "src_mask", src_mask)
        return encode(self.substeps, self.self_attn, src, src_mask, src_key_padding_mask, is_causal, self.save)

    def substeps(self, **attention) -> list[Substep]:
        """A, B."""
        return [
            attend_substep(self.self_attn, self.norm1, norm_first=self.norm_first, dropout=self.dropout1, **attention),
            ffn_substep(
                self.linear1,
                self.linear2,
                self.norm2,
                activation=self.activation,
                norm_first=self.norm_first,
                activation_dropout=self.dropout,
                dropout=self.dropout2,
            ),
        ]


class LieTrotterDecoderLayer(_LieTrotterLayer, nn.TransformerDecoderLayer):
    """``nn.TransformerDecoderLayer`` with a fused forward: self-attention, cross-attention, FFN step.

    Constructor, attributes, initialisation and ``state_dict`` are the base class's; ``activation`` may also be
    ``"silu"`` or ``"gelu_tanh"``, and ``save`` is the memory policy, ``"fast"`` or ``"lean"``. Nested ``tgt`` and
    ``memory`` (which torch's layer does not take) are padded inside.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
    """

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
            tgt_is_causal, memory_is_causal: hints that the masks are causal.
        """
        require_mask("tgt_is_causal", tgt_is_causal, "tgt_mask", tgt_mask)
        require_mask("memory_is_causal", memory_is_causal, "memory_mask", memory_mask)
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
        """Self-attention, cross-attention, B."""
        return [
            attend_substep(self.self_attn, self.norm1, norm_first=self.norm_first, dropout=self.dropout1, **among),
            attend_substep(
                self.multihead_attn, self.norm2, norm_first=self.norm_first, dropout=self.dropout2, **across
            ),
            ffn_substep(
                self.linear1,
                self.linear2,
                self.norm3,
                activation=self.activation,
                norm_first=self.norm_first,
                activation_dropout=self.dropout,
                dropout=self.dropout3,
            ),
        ]
