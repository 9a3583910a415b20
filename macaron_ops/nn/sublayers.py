"""Substeps that use the parameters of torch's own modules: ``nn.MultiheadAttention``, ``nn.Linear``, norms, dropouts.

The modules hold parameters and settings; their ``forward`` is not called, and a module whose call would do more is
refused (``macaron_ops.nn.parts``).
"""

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from macaron_ops.ops import Substep, attend_step, ffn_step, substep

from .activation import Activation, fused_activation
from .norm import norm_arguments
from .parts import require_part

__all__ = ["attend_substep", "dropout_p", "ffn_substep"]


def ffn_substep(
    linear1: nn.Linear,
    linear2: nn.Linear,
    norm: nn.Module,
    *,
    activation: Activation,
    norm_first: bool,
    activation_dropout: nn.Module,
    dropout: nn.Module,
    step: float = 1.0,
) -> Substep:
    """``x + step drop(linear2(drop(act(linear1(N(x))))))``, or the norm around it."""
    require_part("linear1", linear1, nn.Linear)
    require_part("linear2", linear2, nn.Linear)
    return substep(
        ffn_step,
        linear1.weight,
        linear1.bias,
        linear2.weight,
        linear2.bias,
        activation=fused_activation(activation),
        step=step,
        placement="pre" if norm_first else "post",
        activation_dropout=dropout_p(activation_dropout),
        dropout=dropout_p(dropout),
        **norm_arguments(norm),
    )


def attend_substep(
    attention: nn.MultiheadAttention,
    norm: nn.Module,
    *,
    norm_first: bool,
    dropout: nn.Module,
    context: Tensor | None = None,
    causal: bool = False,
    attn_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Substep:
    """``x + drop(attention(N(x)))``, or the norm around it; ``context``: what cross-attention reads."""
    require_part("attention", attention, nn.MultiheadAttention)
    require_part("attention.out_proj", attention.out_proj, NonDynamicallyQuantizableLinear, nn.Linear)
    if attention.bias_k is not None or attention.bias_v is not None or attention.add_zero_attn:
        raise ValueError("attention: expected an nn.MultiheadAttention without add_bias_kv and add_zero_attn")
    if attention._qkv_same_embed_dim:
        weights, biases = attention.in_proj_weight, attention.in_proj_bias
    else:
        weights = (attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight)
        biases = None if attention.in_proj_bias is None else attention.in_proj_bias.chunk(3)
    return substep(
        attend_step,
        weights,
        biases,
        attention.out_proj.weight,
        attention.out_proj.bias,
        attention.num_heads,
        placement="pre" if norm_first else "post",
        context=context,
        causal=causal,
        attn_mask=attn_mask,
        key_padding_mask=key_padding_mask,
        cu_seqlens=cu_seqlens,
        dropout=dropout_p(dropout),
        attention_dropout=float(attention.dropout) if attention.training else 0.0,
        **norm_arguments(norm),
    )


def dropout_p(module: nn.Module) -> float:
    """The probability with which a dropout module drops now."""
    require_part("dropout", module, nn.Dropout, nn.Identity)
    return float(module.p) if module.training and not isinstance(module, nn.Identity) else 0.0
