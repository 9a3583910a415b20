"""torchaudio's ``ConformerLayer``: its half-steps and its attention are fused, the convolution stays its own.

    x = x + 1/2 FFN'(LN x),   x = x + MHA(LN x),   x = x + Convolution(x),   x = LN(x + 1/2 FFN(LN x))

With ``convolution_first`` the convolution comes before the attention. What lies on one side of it is one node. Tensors
are ``(T, B, D)``; the operators read them as ``(B, T, D)``, which is a view.
"""

from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from macaron_ops.nn.norm import norm_arguments
from macaron_ops.nn.sublayers import attend_substep
from macaron_ops.ops import Substep, split_layer

from .foreign import FusedLayer, Layers, dropped, ffn_substep

__all__ = ["FAMILY"]


class _FusedTorchaudio(FusedLayer):
    def forward(self, input: Tensor, key_padding_mask: Tensor | None) -> Tensor:
        self.require_unchanged()
        attend = attend_substep(
            self.self_attn,
            self.self_attn_layer_norm,
            norm_first=True,
            dropout=self.self_attn_dropout,
            key_padding_mask=key_padding_mask,
        )
        first, second = self._half_step(self.ffn1), self._half_step(self.ffn2)
        before, after = ([first], [attend, second]) if self.convolution_first else ([first, attend], [second])
        x = split_layer(input.transpose(0, 1), before, save=self.save)
        x = self._apply_convolution(x.transpose(0, 1))
        x = split_layer(x.transpose(0, 1), after, save=self.save)
        return self.final_layer_norm(x).transpose(0, 1)

    def _half_step(self, ffn: nn.Module) -> Substep:
        norm, linear1, _, activation_dropout, linear2, dropout = ffn.sequential
        options = {
            "step": 0.5,
            "dropout": dropped(dropout, ffn.training),
            "activation_dropout": dropped(activation_dropout, ffn.training),
        }
        return ffn_substep(linear1, linear2, "silu", **norm_arguments(norm), **options)


def _why_not(layer: nn.Module, found: Mapping[str, nn.Module]) -> str | None:
    attention = found["self_attn"]
    if attention.bias_k is not None or attention.add_zero_attn:
        return "self_attn has add_bias_kv or add_zero_attn"
    return None


_FFN = {
    "": "_FeedForwardModule",
    ".sequential": nn.Sequential,
    ".sequential.0": nn.LayerNorm,
    ".sequential.1": nn.Linear,
    ".sequential.2": nn.SiLU,
    ".sequential.3": nn.Dropout,
    ".sequential.4": nn.Linear,
    ".sequential.5": nn.Dropout,
}
_LAYERS = Layers(
    __name__,
    "ConformerLayer",
    {"ConformerLayer": "conformer"},
    {"1b3a3cb05016": _FusedTorchaudio},
    {
        "self_attn_layer_norm": nn.LayerNorm,
        "self_attn": nn.MultiheadAttention,
        "self_attn.out_proj": NonDynamicallyQuantizableLinear,
        "self_attn_dropout": nn.Dropout,
        **{ffn + path: kind for ffn in ("ffn1", "ffn2") for path, kind in _FFN.items()},
    },
    {"_FeedForwardModule": ("89cd3fb9f8c8",)},
    why_not=_why_not,
    within="torchaudio.models",
)
__getattr__ = _LAYERS.attribute
FAMILY = _LAYERS.family("torchaudio")
