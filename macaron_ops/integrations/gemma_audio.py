"""The half-steps of transformers' Gemma 3n and Gemma 4 audio Conformers, where the residual is inside the FFN module.

    y = x + c RMS'(clamp(W_2 silu(W_1 RMS(clamp(x)))))

The operator covers the norm, both products and the activation. The clamps and the norm of the sublayer's output lie
between it and the residual sum, and stay as they are. Gemma 4's linears may clamp what they read and return
(``use_clipped_linears``): between the products, so that such layers are left.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from macaron_ops.ops import ffn_step

from .family import activation_name
from .foreign import FusedLayer, Layers

__all__ = ["FAMILIES"]


class _GemmaAudio(FusedLayer):
    def _run(self, x: Tensor, bound: float, linear1: nn.Linear, linear2: nn.Linear, activation: str) -> Tensor:
        self.require_unchanged()
        norm = self.pre_layer_norm
        update = ffn_step(
            torch.clamp(x, -bound, bound),
            linear1.weight,
            linear1.bias,
            linear2.weight,
            linear2.bias,
            norm="rms",
            norm_weight=norm.weight if norm.with_scale else None,
            eps=norm.eps,
            activation=activation,
            step=1.0,
            residual_scale=0.0,
            save=self.save,
        )
        update = self.post_layer_norm(torch.clamp(update, -bound, bound))
        return x + update * self.post_layer_scale


class _FusedGemma3n(_GemmaAudio):
    def forward(self, audio_encodings: Tensor) -> Tensor:
        return self._run(audio_encodings, self.gradient_clipping, self.ffw_layer_1, self.ffw_layer_2, "silu")


class _FusedGemma4(_GemmaAudio):
    def forward(self, hidden_states: Tensor) -> Tensor:
        bound = min(self.gradient_clipping, torch.finfo(hidden_states.dtype).max)
        linears = self.ffw_layer_1.linear, self.ffw_layer_2.linear
        return self._run(hidden_states, bound, *linears, activation_name(self.act_fn))


def _why_not_gemma4(layer: nn.Module, found: Mapping[str, nn.Module]) -> str | None:
    if found["ffw_layer_1"].use_clipped_linears or found["ffw_layer_2"].use_clipped_linears:
        return "use_clipped_linears: a clamp between the products and the activation is not fused"
    return None


_GEMMA3N = Layers(
    __name__,
    "AudioConformerFeedForward",
    {"Gemma3nAudioConformerFeedForward": "gemma3n.modeling_gemma3n"},
    {"3a57f262df54": _FusedGemma3n},
    {"pre_layer_norm": "*RMSNorm", "ffw_layer_1": nn.Linear, "ffw_layer_2": nn.Linear},
    {"*RMSNorm": ("f00c92573ad8",)},
)
_GEMMA4 = Layers(
    __name__,
    "AudioFeedForward",
    {"Gemma4AudioFeedForward": "gemma4.modeling_gemma4"},
    {"f8b60faeada6": _FusedGemma4},
    {
        "pre_layer_norm": "*RMSNorm",
        "ffw_layer_1": "*ClippableLinear",
        "ffw_layer_1.linear": nn.Linear,
        "ffw_layer_2": "*ClippableLinear",
        "ffw_layer_2.linear": nn.Linear,
    },
    {"*RMSNorm": ("f00c92573ad8",), "*ClippableLinear": ("3ff025fca1fb",)},
    activation="act_fn",
    why_not=_why_not_gemma4,
)
FAMILIES = _GEMMA3N.family("gemma3n_audio"), _GEMMA4.family("gemma4_audio")


def __getattr__(name: str) -> type[nn.Module]:
    return (_GEMMA4 if name.startswith("FusedGemma4") else _GEMMA3N).attribute(name)
