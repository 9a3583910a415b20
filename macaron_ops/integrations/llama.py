"""transformers' Llama-like decoder layers: their FFN is one fused step; attention, rotary, causal, with a cache, stays.

    y = x + Attention(RMS x),    z = y + W_down (act(W_gate RMS y) * W_up RMS y)

The gate's and the other matrix are two parameters, and the operator takes one: they are put side by side in each call,
which costs as much as reading them. A forward pass of few tokens, as in generation, is little more than that reading,
and runs the layer's own modules (on one AVX2 core the fused layer had 0.5x their speed at 1 token, 0.86x at 64, 0.97x
at 128).
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from macaron_ops.ops import ffn_step

from .family import activation_name
from .foreign import FusedLayer, Layers

__all__ = ["FAMILY"]

FEW_TOKENS = 128


class _FusedLlama(FusedLayer):
    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        **kwargs: object,
    ) -> Tensor:
        self.require_unchanged()
        kwargs |= {"attention_mask": attention_mask, "position_ids": position_ids}
        if not torch.is_grad_enabled() and hidden_states[..., 0].numel() < FEW_TOKENS:
            return super().forward(hidden_states, **kwargs)
        attended, _ = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        norm, mlp = self.post_attention_layernorm, self.mlp
        return ffn_step(
            hidden_states,
            torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]),
            None if mlp.gate_proj.bias is None else torch.cat([mlp.gate_proj.bias, mlp.up_proj.bias]),
            mlp.down_proj.weight,
            mlp.down_proj.bias,
            norm="rms",
            norm_weight=norm.weight,
            eps=norm.variance_epsilon,
            activation=activation_name(mlp.act_fn, gated=True),
            step=1.0,
            save=self.save,
        )


def _why_not(layer: nn.Module, found: Mapping[str, nn.Module]) -> str | None:
    mlp = found["mlp"]
    if (mlp.gate_proj.bias is None) != (mlp.up_proj.bias is None):
        return "mlp.gate_proj and mlp.up_proj: one has a bias, the other has none"
    return None


_LAYERS = Layers(
    __name__,
    "DecoderLayer",
    {
        "CwmDecoderLayer": "cwm.modeling_cwm",
        "Ernie4_5DecoderLayer": "ernie4_5.modeling_ernie4_5",
        "HunYuanDenseV1DecoderLayer": "hunyuan_v1_dense.modeling_hunyuan_v1_dense",
        "LlamaDecoderLayer": "llama.modeling_llama",
        "Ministral3DecoderLayer": "ministral3.modeling_ministral3",
        "MinistralDecoderLayer": "ministral.modeling_ministral",
        "MistralDecoderLayer": "mistral.modeling_mistral",
        "Qwen2DecoderLayer": "qwen2.modeling_qwen2",
        "Qwen3DecoderLayer": "qwen3.modeling_qwen3",
        "SmolLM3DecoderLayer": "smollm3.modeling_smollm3",
    },
    {"b7a0f006413c": _FusedLlama, "2668ba499fa1": _FusedLlama},
    {
        "post_attention_layernorm": "*RMSNorm",
        "mlp": "*MLP",
        "mlp.gate_proj": nn.Linear,
        "mlp.up_proj": nn.Linear,
        "mlp.down_proj": nn.Linear,
    },
    {"*RMSNorm": ("8ebf6ec8983e",), "*MLP": ("8899ae7ec8c6",)},
    activation="mlp.act_fn",
    gated=True,
    why_not=_why_not,
)
__getattr__ = _LAYERS.attribute
FAMILY = _LAYERS.family("llama")
