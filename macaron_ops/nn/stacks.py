"""Stacks of Macaron layers, called as ``nn.TransformerEncoder`` and ``nn.TransformerDecoder`` are."""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from macaron_ops.ops.checks import positive_int

from .macaron import MacaronDecoderLayer, MacaronEncoderLayer

__all__ = ["MacaronDecoder", "MacaronEncoder", "run_layer"]


class MacaronEncoder(nn.Module):
    """``num_layers`` :class:`MacaronEncoderLayer`, each with its own initialisation, and with ``norm_first`` a norm
    at the end.

    Args:
        d_model, nhead: as the layer. num_layers: at least 1.
        checkpoint: keep only the layers' inputs for the backward pass and run each layer again there.
        layer: every other argument of :class:`MacaronEncoderLayer`.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
    """

    def __init__(self, d_model: int = 512, nhead: int = 8, num_layers: int = 6, *, checkpoint: bool = False, **layer):
        super().__init__()
        self.layers = _layers(MacaronEncoderLayer, d_model, nhead, num_layers, layer)
        self.norm = _final_norm(self.layers[0])
        self.checkpoint = checkpoint

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Shapes and masks as :class:`MacaronEncoderLayer`."""
        for layer in self.layers:
            src = run_layer(layer, self.checkpoint, src, mask, src_key_padding_mask, is_causal)
        return src if self.norm is None else self.norm(src)

    def extra_repr(self) -> str:
        return f"checkpoint={self.checkpoint}"


class MacaronDecoder(nn.Module):
    """``num_layers`` :class:`MacaronDecoderLayer`; arguments and errors as :class:`MacaronEncoder`."""

    def __init__(self, d_model: int = 512, nhead: int = 8, num_layers: int = 6, *, checkpoint: bool = False, **layer):
        super().__init__()
        self.layers = _layers(MacaronDecoderLayer, d_model, nhead, num_layers, layer)
        self.norm = _final_norm(self.layers[0])
        self.checkpoint = checkpoint

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
        """Shapes and masks as :class:`MacaronDecoderLayer`."""
        masks = (tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask)
        for layer in self.layers:
            tgt = run_layer(layer, self.checkpoint, tgt, memory, *masks, tgt_is_causal, memory_is_causal)
        return tgt if self.norm is None else self.norm(tgt)

    def extra_repr(self) -> str:
        return f"checkpoint={self.checkpoint}"


def run_layer(layer: nn.Module, checkpoint: bool, *args, **kwargs) -> Tensor:
    """``layer(*args, **kwargs)``; with ``checkpoint`` the backward pass runs it again instead of keeping anything."""
    if checkpoint and torch.is_grad_enabled():
        return recompute(layer, *args, use_reentrant=False, **kwargs)
    return layer(*args, **kwargs)


def _layers(kind: type, d_model: int, nhead: int, num_layers: int, layer: dict) -> nn.ModuleList:
    positive_int("num_layers", num_layers)
    return nn.ModuleList(kind(d_model, nhead, **layer) for _ in range(num_layers))


def _final_norm(layer: nn.Module) -> nn.LayerNorm | None:
    """Pre-norm layers leave their sum unnormalised: a stack of them ends with a norm."""
    if not layer.norm_first:
        return None
    like = layer.norm1
    has_bias = like.bias is not None
    return nn.LayerNorm(
        like.normalized_shape, eps=like.eps, bias=has_bias, device=like.weight.device, dtype=like.weight.dtype
    )
