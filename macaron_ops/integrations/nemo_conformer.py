"""NeMo's ``ConformerLayer`` (Conformer and FastConformer encoders): its half-steps are fused.

    x = x + s FFN'(LN x),   x = x + Attention(LN x),   x = x + Convolution(LN x),   x = LN(x + s FFN(LN x))

with ``s = fc_factor = 1/2``. Layers with adapters are left.
"""

from collections.abc import Mapping

from torch import Tensor, nn

from .foreign import FusedLayer, Layers, dropped

__all__ = ["FAMILY"]


class _FusedNeMo(FusedLayer):
    def forward(
        self,
        x: Tensor,
        att_mask: Tensor | None = None,
        pos_emb: Tensor | None = None,
        pad_mask: Tensor | None = None,
        cache_last_channel: Tensor | None = None,
        cache_last_time: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor | None]:
        self.require_unchanged()
        x = self._half_step(x, self.norm_feed_forward1, self.feed_forward1)
        n = self.norm_self_att(x)
        positions = {"pos_emb": pos_emb} if self.self_attention_model.startswith("rel_pos") else {}
        masks = {"pad_mask": pad_mask} if self.self_attention_model == "rel_pos_local_attn" else {"mask": att_mask}
        attended = self.self_attn(query=n, key=n, value=n, **masks, **positions, cache=cache_last_channel)
        if cache_last_channel is not None:
            attended, cache_last_channel = attended
        x = x + self.dropout(attended)
        convolved = self.conv(self.norm_conv(x), pad_mask=pad_mask, cache=cache_last_time)
        if cache_last_time is not None:
            convolved, cache_last_time = convolved
        x = x + self.dropout(convolved)
        x = self.norm_out(self._half_step(x, self.norm_feed_forward2, self.feed_forward2))
        if self.is_access_enabled(getattr(self, "model_guid", None)) and self.access_cfg.get("save_encoder_tensors"):
            self.register_accessible_tensor(name="encoder", tensor=x)
        return x if cache_last_channel is None else (x, cache_last_channel, cache_last_time)

    def _half_step(self, x: Tensor, norm: nn.LayerNorm, ffn: nn.Module) -> Tensor:
        options = {
            "step": self.fc_factor,
            "dropout": dropped(self.dropout, self.training),
            "activation_dropout": dropped(ffn.dropout, ffn.training),
        }
        return self.ffn_step(x, norm, ffn.linear1, ffn.linear2, "silu", **options)


def _why_not(layer: nn.Module, found: Mapping[str, nn.Module]) -> str | None:
    return "it has adapters, which are not fused" if layer.is_adapter_available() else None


_FFN = {
    "": "ConformerFeedForward",
    ".linear1": nn.Linear,
    ".activation": "Swish",
    ".dropout": nn.Dropout,
    ".linear2": nn.Linear,
}
_LAYERS = Layers(
    __name__,
    "ConformerLayer",
    {"ConformerLayer": "submodules.conformer_modules"},
    {"3d3337c48484": _FusedNeMo},
    {
        "dropout": nn.Dropout,
        "norm_feed_forward1": nn.LayerNorm,
        "norm_feed_forward2": nn.LayerNorm,
        **{ffn + path: kind for ffn in ("feed_forward1", "feed_forward2") for path, kind in _FFN.items()},
    },
    {"ConformerFeedForward": ("de9d1fc0a3b1",), "Swish": ("e3b0c44298fc",)},
    why_not=_why_not,
    within="nemo.collections.asr.parts",
)
__getattr__ = _LAYERS.attribute
FAMILY = _LAYERS.family("nemo")
