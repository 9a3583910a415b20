"""The ``ConformerBlock`` of lucidrains' package ``conformer``: its half-steps are fused.

x = x + s FFN'(LN x),   x = x + Attention(LN x),   x = x + Convolution(x),   x = LN(x + s FFN(LN x)),   s = 1/2
"""

from torch import Tensor, nn

from .foreign import FusedLayer, Layers, dropped

__all__ = ["FAMILY"]


class _FusedLucidrains(FusedLayer):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        self.require_unchanged()
        x = self._half_step(x, self.ff1)
        x = self.attn(x, mask=mask) + x
        x = self.conv(x) + x
        return self.post_norm(self._half_step(x, self.ff2))

    def _half_step(self, x: Tensor, scaled: nn.Module) -> Tensor:
        linear1, _, activation_dropout, linear2, dropout = scaled.fn.fn.net
        options = {
            "step": scaled.scale,
            "dropout": dropped(dropout, scaled.training),
            "activation_dropout": dropped(activation_dropout, scaled.training),
        }
        return self.ffn_step(x, scaled.fn.norm, linear1, linear2, "silu", **options)


_FFN = {
    "": "Scale",
    ".fn": "PreNorm",
    ".fn.norm": nn.LayerNorm,
    ".fn.fn": "FeedForward",
    ".fn.fn.net": nn.Sequential,
    ".fn.fn.net.0": nn.Linear,
    ".fn.fn.net.1": "Swish",
    ".fn.fn.net.2": nn.Dropout,
    ".fn.fn.net.3": nn.Linear,
    ".fn.fn.net.4": nn.Dropout,
}
_LAYERS = Layers(
    __name__,
    "ConformerBlock",
    {"ConformerBlock": "conformer"},
    {"4e0cedf41e63": _FusedLucidrains},
    {ffn + path: kind for ffn in ("ff1", "ff2") for path, kind in _FFN.items()},
    {
        "Scale": ("af5e3b71c719",),
        "PreNorm": ("bc3430c9693b",),
        "FeedForward": ("06ca168d243c",),
        "Swish": ("14c1e25aa5d9",),
    },
    within="conformer",
)
__getattr__ = _LAYERS.attribute
FAMILY = _LAYERS.family("lucidrains")
