"""Conformers of transformers' multimodal models, whose FFN modules hold their norm: Granite Speech, Phi-4 audio.

    x = x + 1/2 FFN'(LN x),   x = x + Attention(x),   x = x + Convolution(x),   x = LN(x + 1/2 FFN(LN x))

Granite's attention has its norm inside, Phi-4's beside it. Phi-4's FFN is gated, ``W_2 drop(up * act(gate))`` with the
rows of ``up`` first: they change places in a copy in each call, for the operator reads the gate's first.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from macaron_ops.nn.norm import norm_arguments
from macaron_ops.ops import ffn_step

from .family import activation_name, why_not_activation
from .foreign import FusedLayer, Layers, dropped

__all__ = ["FAMILIES"]


class _FusedGraniteSpeech(FusedLayer):
    def forward(self, hidden_states: Tensor, attention_dists: Tensor) -> Tensor:
        self.require_unchanged()
        x = self._half_step(hidden_states, self.ff1)
        x = self.attn(x, attention_dists=attention_dists) + x
        x = self.conv(x) + x
        return self.post_norm(self._half_step(x, self.ff2))

    def _half_step(self, x: Tensor, ffn: nn.Module) -> Tensor:
        dropout = dropped(ffn.dropout, ffn.training)
        options = {"dropout": dropout, "activation_dropout": dropout}
        return self.ffn_step(x, ffn.pre_norm, ffn.up_proj, ffn.down_proj, activation_name(ffn.silu), **options)


class _FusedPhi4Audio(FusedLayer):
    def forward(self, hidden_states: Tensor, attention_mask: Tensor) -> Tensor:
        self.require_unchanged()
        x = self._half_step(hidden_states, self.feed_forward_in)
        x = x + self.self_attn(self.layer_norm_att(x), attention_mask)
        x = x + self.conv(x)
        return self.layer_norm(self._half_step(x, self.feed_forward_out))

    def _half_step(self, x: Tensor, ffn: nn.Module) -> Tensor:
        dropout = dropped(ffn.dropout, ffn.training)
        w_in, b_in = (torch.cat(p.chunk(2)[::-1]) for p in (ffn.gate_up_proj.weight, ffn.gate_up_proj.bias))
        return ffn_step(
            x,
            w_in,
            b_in,
            ffn.down_proj.weight,
            ffn.down_proj.bias,
            **norm_arguments(ffn.layer_norm),
            activation=activation_name(ffn.act_fn, gated=True),
            step=0.5,
            dropout=dropout,
            activation_dropout=dropout,
            save=self.save,
        )


def _both(names: tuple[str, str], ffn: Mapping[str, str | type]) -> dict[str, str | type]:
    return {name + path: kind for name in names for path, kind in ffn.items()}


def _why_not_granite(layer: nn.Module, found: Mapping[str, nn.Module]) -> str | None:
    return next(filter(None, (why_not_activation(f"{n}.silu", found[n].silu) for n in ("ff1", "ff2"))), None)


def _why_not_phi4(layer: nn.Module, found: Mapping[str, nn.Module]) -> str | None:
    names = ("feed_forward_in", "feed_forward_out")
    reasons = (why_not_activation(f"{n}.act_fn", found[n].act_fn, gated=True) for n in names)
    return next(filter(None, reasons), None)


_GRANITE = Layers(
    __name__,
    "Block",
    {
        "GraniteSpeechConformerBlock": "granite_speech.modeling_granite_speech",
        "GraniteSpeechPlusConformerBlock": "granite_speech_plus.modeling_granite_speech_plus",
    },
    {"326b7de1e32c": _FusedGraniteSpeech},
    _both(
        ("ff1", "ff2"),
        {
            "": "*FeedForward",
            ".pre_norm": nn.LayerNorm,
            ".up_proj": nn.Linear,
            ".down_proj": nn.Linear,
            ".dropout": nn.Dropout,
        },
    ),
    {"*FeedForward": ("a603465af85f",)},
    why_not=_why_not_granite,
)
_PHI4 = Layers(
    __name__,
    "EncoderLayer",
    {"Phi4MultimodalAudioConformerEncoderLayer": "phi4_multimodal.modeling_phi4_multimodal"},
    {"ac3341b56c4b": _FusedPhi4Audio},
    _both(
        ("feed_forward_in", "feed_forward_out"),
        {
            "": "Phi4MultimodalAudioMLP",
            ".layer_norm": nn.LayerNorm,
            ".gate_up_proj": nn.Linear,
            ".down_proj": nn.Linear,
            ".dropout": nn.Dropout,
        },
    ),
    {"Phi4MultimodalAudioMLP": ("835e76fbd342",)},
    why_not=_why_not_phi4,
)
FAMILIES = _GRANITE.family("granite_speech"), _PHI4.family("phi4_audio")


def __getattr__(name: str) -> type[nn.Module]:
    return (_PHI4 if name.startswith("FusedPhi4") else _GRANITE).attribute(name)
