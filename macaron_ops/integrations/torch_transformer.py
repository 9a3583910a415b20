"""torch's own layers: ``nn.TransformerEncoderLayer`` and ``nn.TransformerDecoderLayer``."""

from torch import nn

from .family import Family, activation_name, why_not_part

__all__ = ["FAMILY"]

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
_DECODER = _ENCODER | {"multihead_attn": nn.MultiheadAttention, "norm3": nn.LayerNorm, "dropout3": nn.Dropout}
_FUSED = {nn.TransformerEncoderLayer: "LieTrotterEncoderLayer", nn.TransformerDecoderLayer: "LieTrotterDecoderLayer"}


def _why_not(layer: nn.Module) -> str | None:
    parts = _DECODER if isinstance(layer, nn.TransformerDecoderLayer) else _ENCODER
    for name, expected in parts.items():
        part = getattr(layer, name)
        reason = why_not_part(name, part, expected)
        if reason is not None:
            return reason
    for name in ("self_attn", "multihead_attn"):
        attention = getattr(layer, name, None)
        if attention is None:
            continue
        if attention.bias_k is not None or attention.add_zero_attn:
            return f"{name} has add_bias_kv or add_zero_attn"
        reason = why_not_part(f"{name}.out_proj", attention.out_proj, type(nn.MultiheadAttention(1, 1).out_proj))
    if activation_name(layer.activation) is None:
        return f"activation {getattr(layer.activation, '__name__', type(layer.activation).__name__)} has no fused form"
    return None


def _fused(original: type[nn.Module]) -> type[nn.Module]:
    import macaron_ops.nn

    return getattr(macaron_ops.nn, _FUSED[original])


FAMILY = Family("torch", tuple(f"torch.nn.modules.transformer.{cls.__name__}" for cls in _FUSED), _fused, _why_not)
