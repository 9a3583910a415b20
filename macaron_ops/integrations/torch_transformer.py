"""torch's own layers, ``nn.TransformerEncoderLayer`` and ``nn.TransformerDecoderLayer``; see ``macaron_ops.nn``."""

from torch import nn

from macaron_ops.nn import LieTrotterDecoderLayer, LieTrotterEncoderLayer
from macaron_ops.nn.parts import class_name, why_not_part

from .family import Family, why_not_activation

__all__ = ["FAMILY"]

_FUSED = {
    nn.TransformerEncoderLayer: LieTrotterEncoderLayer,
    nn.TransformerDecoderLayer: LieTrotterDecoderLayer,
}
_ENCODER = {
    "self_attn": nn.MultiheadAttention,
    "linear1": nn.Linear,
    "linear2": nn.Linear,
    "norm1": nn.LayerNorm,
    "norm2": nn.LayerNorm,
    "dropout": nn.Dropout,
    "dropout1": nn.Dropout,
    "dropout2": nn.Dropout,
}
_DECODER = {**_ENCODER, "multihead_attn": nn.MultiheadAttention, "norm3": nn.LayerNorm, "dropout3": nn.Dropout}


def _why_not(layer: nn.Module) -> str | None:
    for name, expected in (_DECODER if isinstance(layer, nn.TransformerDecoderLayer) else _ENCODER).items():
        part = getattr(layer, name)
        reason = why_not_part(name, part, expected)
        if reason is None and expected is nn.MultiheadAttention:
            reason = _why_not_attention(name, part)
        if reason is not None:
            return reason
    return why_not_activation("activation", layer.activation)


def _why_not_attention(name: str, attention: nn.MultiheadAttention) -> str | None:
    if attention.bias_k is not None or attention.add_zero_attn:
        return f"{name} has add_bias_kv or add_zero_attn"
    return why_not_part(f"{name}.out_proj", attention.out_proj, nn.modules.linear.NonDynamicallyQuantizableLinear)


FAMILY = Family("torch", tuple(map(class_name, _FUSED)), _FUSED.__getitem__, _why_not)
