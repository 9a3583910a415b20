"""torchaudio's ``ConformerLayer``: its half-steps are fused, attention and convolution stay its own.

    x = x + 1/2 FFN'(LN x),   x = x + Attention(LN x),   x = x + Convolution(x),   x = LN(x + 1/2 FFN(LN x))

With ``convolution_first`` the convolution comes before the attention. Tensors are ``(T, B, D)``.
"""

from torch import Tensor, nn

from .foreign import FusedLayer, Layers, dropped

__all__ = ["FAMILY"]


class _FusedTorchaudio(FusedLayer):
    def forward(self, input: Tensor, key_padding_mask: Tensor | None) -> Tensor:
        self.require_unchanged()
        x = self._half_step(input, self.ffn1)
        if self.convolution_first:
            x = self._apply_convolution(x)
        n = self.self_attn_layer_norm(x)
        attended, _ = self.self_attn(n, n, n, key_padding_mask=key_padding_mask, need_weights=False)
        x = self.self_attn_dropout(attended) + x
        if not self.convolution_first:
            x = self._apply_convolution(x)
        return self.final_layer_norm(self._half_step(x, self.ffn2))

    def _half_step(self, x: Tensor, ffn: nn.Module) -> Tensor:
        norm, linear1, _, activation_dropout, linear2, dropout = ffn.sequential
        options = {
            "dropout": dropped(dropout, ffn.training),
            "activation_dropout": dropped(activation_dropout, ffn.training),
        }
        return self.ffn_step(x, norm, linear1, linear2, "silu", **options)


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
    {ffn + path: kind for ffn in ("ffn1", "ffn2") for path, kind in _FFN.items()},
    {"_FeedForwardModule": ("89cd3fb9f8c8",)},
    within="torchaudio.models",
)
__getattr__ = _LAYERS.attribute
FAMILY = _LAYERS.family("torchaudio")
