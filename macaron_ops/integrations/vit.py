"""transformers' Vision Transformer and the models with its layer: pre-norm, one fused Lie-Trotter step each.

y = x + drop(W_o MHA(LN x) + b_o),    z = y + drop(W_2 act(W_1 LN y + b_1) + b_2)
"""

from collections.abc import Mapping

from torch import Tensor, nn

from macaron_ops.nn.norm import norm_arguments
from macaron_ops.ops import split_layer

from .family import activation_name
from .foreign import FusedLayer, Layers, attend_substep, dropped, ffn_substep, refuse, why_not_attention

__all__ = ["FAMILY"]


class _FusedViT(FusedLayer):
    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: object) -> Tensor:
        self.require_unchanged()
        attention, mlp = self.attention, self.mlp
        refuse(attention_mask, **{"output_attentions": attention.config.output_attentions, **kwargs})
        dropout = dropped(self.dropout, self.training)
        attend = attend_substep(
            attention.q_proj,
            attention.k_proj,
            attention.v_proj,
            attention.o_proj,
            attention.num_attention_heads,
            attention_mask,
            **norm_arguments(self.layernorm_before),
            scale=attention.scaling,
            dropout=dropout,
            attention_dropout=dropped(attention.attention_dropout, attention.training),
        )
        options = {**norm_arguments(self.layernorm_after), "dropout": dropout}
        feed = ffn_substep(mlp.fc1, mlp.fc2, activation_name(mlp.activation_fn), **options)
        return split_layer(hidden_states, [attend, feed], save=self.save)


def _why_not(layer: nn.Module, found: Mapping[str, nn.Module]) -> str | None:
    if found["attention"].is_causal:
        return "attention.is_causal: causal attention is not fused"
    return why_not_attention(found["attention"].config)


_LAYERS = Layers(
    __name__,
    "Layer",
    {
        "ASTLayer": "audio_spectrogram_transformer.modeling_audio_spectrogram_transformer",
        "DeiTLayer": "deit.modeling_deit",
        "IJepaLayer": "ijepa.modeling_ijepa",
        "ViTLayer": "vit.modeling_vit",
        "ViTMSNLayer": "vit_msn.modeling_vit_msn",
        "VivitLayer": "vivit.modeling_vivit",
    },
    {"231797e26ba5": _FusedViT},
    {
        "attention": "*Attention",
        "attention.q_proj": nn.Linear,
        "attention.k_proj": nn.Linear,
        "attention.v_proj": nn.Linear,
        "attention.o_proj": nn.Linear,
        "layernorm_before": nn.LayerNorm,
        "mlp": "*MLP",
        "mlp.fc1": nn.Linear,
        "mlp.fc2": nn.Linear,
        "layernorm_after": nn.LayerNorm,
        "dropout": nn.Dropout,
    },
    {"*Attention": ("8152812bd5a1",), "*MLP": ("34c6f5603d77",)},
    activation="mlp.activation_fn",
    why_not=_why_not,
)
__getattr__ = _LAYERS.attribute
FAMILY = _LAYERS.family("vit")
