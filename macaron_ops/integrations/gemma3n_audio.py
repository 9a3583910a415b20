"""The half-steps of transformers' Gemma 3n audio Conformer, where the residual is inside the FFN module.

    y = x + c RMS'(clamp(W_2 silu(W_1 RMS(clamp(x)))))

The operator covers the norm, both products and the activation. The clamps and the norm of the sublayer's output lie
between it and the residual sum, and stay as they are.
"""

import torch
from torch import Tensor, nn

from macaron_ops.ops import ffn_step

from .foreign import FusedLayer, Layers

__all__ = ["FAMILY"]


class _FusedGemma3nAudio(FusedLayer):
    def forward(self, audio_encodings: Tensor) -> Tensor:
        self.require_unchanged()
        bound, norm = self.gradient_clipping, self.pre_layer_norm
        update = ffn_step(
            torch.clamp(audio_encodings, -bound, bound),
            self.ffw_layer_1.weight,
            self.ffw_layer_1.bias,
            self.ffw_layer_2.weight,
            self.ffw_layer_2.bias,
            norm="rms",
            norm_weight=norm.weight if norm.with_scale else None,
            eps=norm.eps,
            activation="silu",
            step=1.0,
            residual_scale=0.0,
            save=self.save,
        )
        update = self.post_layer_norm(torch.clamp(update, -bound, bound))
        return audio_encodings + update * self.post_layer_scale


_LAYERS = Layers(
    __name__,
    "AudioConformerFeedForward",
    {"Gemma3nAudioConformerFeedForward": "gemma3n.modeling_gemma3n"},
    {"3a57f262df54": _FusedGemma3nAudio},
    {"pre_layer_norm": "*RMSNorm", "ffw_layer_1": nn.Linear, "ffw_layer_2": nn.Linear},
    {"*RMSNorm": ("f00c92573ad8",)},
)
__getattr__ = _LAYERS.attribute
FAMILY = _LAYERS.family("gemma3n_audio")
