"""The encoder layer of transformers' Whisper (and Audio Flamingo 3): pre-norm, one fused Lie-Trotter step.

    y = x + drop(W_o MHA(LN x) + b_o),    z = y + drop(W_2 drop_h(act(W_1 LN y + b_1)) + b_2)

The key projection has no bias. In float16 the layer's output is clamped, as theirs is.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from macaron_ops.nn.norm import norm_arguments
from macaron_ops.ops import split_layer

from .family import activation_name
from .foreign import FusedLayer, Layers, attend_substep, dropped, ffn_substep, refuse, why_not_attention

__all__ = ["FAMILY"]


class _FusedWhisper(FusedLayer):
    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None, **kwargs: object) -> Tensor:
        self.require_unchanged()
        attention = self.self_attn
        refuse(attention_mask, **{"output_attentions": attention.config.output_attentions, **kwargs})
        dropout = dropped(self.dropout, self.training)
        attend = attend_substep(
            attention.q_proj,
            attention.k_proj,
            attention.v_proj,
            attention.out_proj,
            attention.num_heads,
            attention_mask,
            **norm_arguments(self.self_attn_layer_norm),
            scale=attention.scaling,
            dropout=dropout,
            attention_dropout=dropped(attention.dropout, attention.training),
        )
        feed = ffn_substep(
            self.fc1,
            self.fc2,
            activation_name(self.activation_fn),
            **norm_arguments(self.final_layer_norm),
            dropout=dropout,
            activation_dropout=dropped(self.activation_dropout, self.training),
        )
        hidden_states = split_layer(hidden_states, [attend, feed], save=self.save)
        if hidden_states.dtype == torch.float16:
            largest = torch.finfo(torch.float16).max - 1000
            hidden_states = hidden_states.clamp(-largest, largest)
        return hidden_states


def _why_not(layer: nn.Module, found: Mapping[str, nn.Module]) -> str | None:
    attention = found["self_attn"]
    if attention.is_causal or attention.is_decoder:
        return "self_attn.is_causal or is_decoder: causal attention with a cache is not fused"
    return why_not_attention(attention.config)


_LAYERS = Layers(
    __name__,
    "EncoderLayer",
    {
        "AudioFlamingo3EncoderLayer": "audioflamingo3.modeling_audioflamingo3",
        "WhisperEncoderLayer": "whisper.modeling_whisper",
    },
    {"3b05f8b88b45": _FusedWhisper},
    {
        "self_attn": "*Attention",
        "self_attn.q_proj": nn.Linear,
        "self_attn.k_proj": nn.Linear,
        "self_attn.v_proj": nn.Linear,
        "self_attn.out_proj": nn.Linear,
        "self_attn_layer_norm": nn.LayerNorm,
        "fc1": nn.Linear,
        "fc2": nn.Linear,
        "final_layer_norm": nn.LayerNorm,
    },
    {"*Attention": ("89494fe2f1fe", "a55747605230")},
    activation="activation_fn",
    why_not=_why_not,
)
__getattr__ = _LAYERS.attribute
FAMILY = _LAYERS.family("whisper")
