"""SpeechBrain's ``ConformerEncoderLayer``: its half-steps are fused, attention and convolution stay its own.

    x = x + 1/2 FFN'(LN x),   x = x + Attention(LN x),   x = x + Convolution(x),   x = LN(x + 1/2 FFN(LN x))

Known are FFNs with its Swish, as its recipes have them. ``forward_streaming`` calls the modules as before.
"""

from collections.abc import Mapping

from torch import Tensor, nn

from .foreign import FusedLayer, Layers, dropped

__all__ = ["FAMILY"]


class _FusedSpeechBrain(FusedLayer):
    def forward(
        self,
        x: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        pos_embs: Tensor | None = None,
        dynchunktrain_config: object | None = None,
    ) -> tuple[Tensor, Tensor]:
        self.require_unchanged()
        padding = None if src_key_padding_mask is None else src_key_padding_mask.unsqueeze(-1)
        x = self._half_step(x, self.ffn_module1)
        n = self.norm1(x)
        attended, weights = self.mha_layer(
            n, n, n, attn_mask=src_mask, key_padding_mask=src_key_padding_mask, pos_embs=pos_embs
        )
        x = attended + x
        x = x + self.convolution_module(x, padding, dynchunktrain_config=dynchunktrain_config)
        return self.norm2(self._half_step(x, self.ffn_module2)), weights

    def _half_step(self, x: Tensor, module: nn.Sequential) -> Tensor:
        norm, ffn, dropout = module
        linear1, _, activation_dropout, linear2 = ffn.ffn
        options = {
            "dropout": dropped(dropout, module.training),
            "activation_dropout": dropped(activation_dropout, module.training),
        }
        return self.ffn_step(x, norm, linear1, linear2, "silu", **options)


def _why_not(layer: nn.Module, found: Mapping[str, nn.Module]) -> str | None:
    for name in ("ffn_module1", "ffn_module2"):
        swish = found[f"{name}.1.ffn.1"]
        if swish.beta != 1:
            return f"{name} has a Swish with beta = {swish.beta}, which is not fused"
    return None


_FFN = {
    "": nn.Sequential,
    ".0": nn.LayerNorm,
    ".1": "PositionalwiseFeedForward",
    ".1.ffn": nn.Sequential,
    ".1.ffn.0": nn.Linear,
    ".1.ffn.1": "Swish",
    ".1.ffn.2": nn.Dropout,
    ".1.ffn.3": nn.Linear,
    ".2": nn.Dropout,
}
_LAYERS = Layers(
    __name__,
    "ConformerEncoderLayer",
    {"ConformerEncoderLayer": "transformer.Conformer"},
    {"5111799c8ce4": _FusedSpeechBrain},
    {ffn + path: kind for ffn in ("ffn_module1", "ffn_module2") for path, kind in _FFN.items()},
    {"PositionalwiseFeedForward": ("3e5445baa156",), "Swish": ("fe410e08ec9c",)},
    why_not=_why_not,
    within="speechbrain.lobes.models",
)
__getattr__ = _LAYERS.attribute
FAMILY = _LAYERS.family("speechbrain")
