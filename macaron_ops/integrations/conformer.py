"""transformers' Conformers with the norms beside their FFNs: Wav2Vec2-Conformer, Wav2Vec2-BERT, SeamlessM4T v1 and v2.

    x = x + 1/2 FFN'(LN x),   x = x + Attention(LN x),   x = x + Convolution(x),   x = LN(x + 1/2 FFN(LN x))

The half-steps are fused, attention and convolution stay theirs. The layer is replaced and not its FFN class, for the
adapters of these models use that one too, as a whole step and with relu.
"""

from collections.abc import Mapping

from torch import Tensor, nn

from .family import activation_name, why_not_activation
from .foreign import FusedLayer, Layers, dropped

__all__ = ["FAMILY"]


class _Conformer(FusedLayer):
    def _run(self, x: Tensor, attend: dict[str, object], convolve: dict[str, object]) -> Tensor:
        self.require_unchanged()
        x = self._half_step(x, self.ffn1_layer_norm, self.ffn1)
        attended, _ = self.self_attn(hidden_states=self.self_attn_layer_norm(x), **attend)
        x = self.self_attn_dropout(attended) + x
        x = x + self.conv_module(x, **convolve)
        return self.final_layer_norm(self._half_step(x, self.ffn2_layer_norm, self.ffn2))

    def _half_step(self, x: Tensor, norm: nn.LayerNorm, ffn: nn.Module) -> Tensor:
        return self.ffn_step(
            x,
            norm,
            ffn.intermediate_dense,
            ffn.output_dense,
            activation_name(ffn.intermediate_act_fn),
            dropout=dropped(ffn.output_dropout, ffn.training),
            activation_dropout=dropped(ffn.intermediate_dropout, ffn.training),
        )


class _FusedConformer(_Conformer):
    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        relative_position_embeddings: Tensor | None = None,
        **kwargs: object,
    ) -> Tensor:
        positions = {"relative_position_embeddings": relative_position_embeddings}
        return self._run(hidden_states, {"attention_mask": attention_mask, **positions, **kwargs}, {})


class _FusedMaskedConformer(_Conformer):
    """Its convolution knows what is padding."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        relative_position_embeddings: Tensor | None = None,
        conv_attention_mask: Tensor | None = None,
        **kwargs: object,
    ) -> Tensor:
        positions = {"relative_position_embeddings": relative_position_embeddings}
        attend = {"attention_mask": attention_mask, **positions, **kwargs}
        return self._run(hidden_states, attend, {"attention_mask": conv_attention_mask})


class _FusedSeamlessV2(_Conformer):
    """Its attention makes its own positions."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        conv_attention_mask: Tensor | None = None,
        **kwargs: object,
    ) -> Tensor:
        attend = {"attention_mask": attention_mask, **kwargs}
        return self._run(hidden_states, attend, {"attention_mask": conv_attention_mask})


def _why_not(layer: nn.Module, found: Mapping[str, nn.Module]) -> str | None:
    reasons = (why_not_activation(f"{n}.activation", found[n].intermediate_act_fn) for n in ("ffn1", "ffn2"))
    return next(filter(None, reasons), None)


_FFN = {
    "": "*FeedForward",
    ".intermediate_dense": nn.Linear,
    ".intermediate_dropout": nn.Dropout,
    ".output_dense": nn.Linear,
    ".output_dropout": nn.Dropout,
}
_LAYERS = Layers(
    __name__,
    "EncoderLayer",
    {
        "SeamlessM4TConformerEncoderLayer": "seamless_m4t.modeling_seamless_m4t",
        "SeamlessM4Tv2ConformerEncoderLayer": "seamless_m4t_v2.modeling_seamless_m4t_v2",
        "Wav2Vec2BertEncoderLayer": "wav2vec2_bert.modeling_wav2vec2_bert",
        "Wav2Vec2ConformerEncoderLayer": "wav2vec2_conformer.modeling_wav2vec2_conformer",
    },
    {"5ea71e8c870c": _FusedConformer, "0a0031349aef": _FusedMaskedConformer, "9afb5d6120b8": _FusedSeamlessV2},
    {
        "ffn1_layer_norm": nn.LayerNorm,
        "ffn2_layer_norm": nn.LayerNorm,
        **{ffn + path: kind for ffn in ("ffn1", "ffn2") for path, kind in _FFN.items()},
    },
    {"*FeedForward": ("7735cd11ea9f",)},
    why_not=_why_not,
)
__getattr__ = _LAYERS.attribute
FAMILY = _LAYERS.family("conformer")
