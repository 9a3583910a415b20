"""ESPnet's Conformer ``EncoderLayer`` and ``EBranchformerEncoderLayer``: their half-steps are fused.

    x = x + s FFN'(LN x),   then attention and convolution (branches in E-Branchformer),   x = LN(x + s FFN(LN x))

with ``s = ff_scale = 1/2``. Known are FFNs with its Swish, as its recipes have them; the LayerNorm is its own class
with eps 1e-12. A call with a cache, as streaming makes it, runs the layer's own forward.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from macaron_ops.ops import ffn_step

from .foreign import FusedLayer, Layers, dropped

__all__ = ["FAMILY"]

_Inputs = Tensor | tuple[Tensor, Tensor]


class _ESPnet(FusedLayer):
    def _half_step(self, x: Tensor, norm: nn.LayerNorm, ffn: nn.Module) -> Tensor:
        return ffn_step(
            x,
            ffn.w_1.weight,
            ffn.w_1.bias,
            ffn.w_2.weight,
            ffn.w_2.bias,
            norm="layer",
            norm_weight=norm.weight,
            norm_bias=norm.bias,
            eps=norm.eps,
            activation="silu",
            step=self.ff_scale,
            dropout=dropped(self.dropout, self.training),
            activation_dropout=dropped(ffn.dropout, ffn.training),
            save=self.save,
        )


class _FusedConformer(_ESPnet):
    def forward(self, x_input: _Inputs, mask: Tensor | None, cache: Tensor | None = None) -> tuple[_Inputs, object]:
        self.require_unchanged()
        if cache is not None:
            return super().forward(x_input, mask, cache)
        x, *pos_emb = x_input if isinstance(x_input, tuple) else (x_input,)
        x = self._half_step(x, self.norm_ff_macaron, self.feed_forward_macaron)
        n = self.norm_mha(x)
        x = x + self.dropout(self.self_attn(n, n, n, *pos_emb, mask))
        if self.conv_module is not None:
            x = x + self.dropout(self.conv_module(self.norm_conv(x)))
        x = self._half_step(x, self.norm_ff, self.feed_forward)
        if self.conv_module is not None:
            x = self.norm_final(x)
        return ((x, *pos_emb) if pos_emb else x), mask


class _FusedEBranchformer(_ESPnet):
    def forward(self, x_input: _Inputs, mask: Tensor | None, cache: Tensor | None = None) -> tuple[_Inputs, object]:
        self.require_unchanged()
        if cache is not None:
            return super().forward(x_input, mask, cache)
        x, *pos_emb = x_input if isinstance(x_input, tuple) else (x_input,)
        x = self._half_step(x, self.norm_ff_macaron, self.feed_forward_macaron)
        n = self.norm_mha(x)
        tokens = (n,) if type(self.attn).__name__ == "FastSelfAttention" else (n, n, n, *pos_emb)
        attended = self.dropout(self.attn(*tokens, mask))
        local = self.norm_mlp(x)
        local = self.cgmlp((local, *pos_emb) if pos_emb else local, mask)
        local = self.dropout(local[0] if isinstance(local, tuple) else local)
        both = torch.cat([attended, local], dim=-1)
        mixed = self.depthwise_conv_fusion(both.transpose(1, 2)).transpose(1, 2)
        x = x + self.dropout(self.merge_proj(both + mixed))
        x = self.norm_final(self._half_step(x, self.norm_ff, self.feed_forward))
        return ((x, *pos_emb) if pos_emb else x), mask


def _why_not(layer: nn.Module, found: Mapping[str, nn.Module]) -> str | None:
    for name in ("norm_ff_macaron", "norm_ff"):
        if found[name].dim != -1:
            return f"{name} is over dimension {found[name].dim}, not over the last"
    if not getattr(layer, "normalize_before", True):
        return "normalize_before is False: a norm after the residual sum is not fused"
    if getattr(layer, "concat_after", False):
        return "concat_after: attention that is concatenated with its input is not known"
    if getattr(layer, "stochastic_depth_rate", 0.0) > 0:
        return f"stochastic_depth_rate = {layer.stochastic_depth_rate}: layers that are skipped at random are not known"
    return None


_FFN = {
    "": "espnet.nets.pytorch_backend.transformer.positionwise_feed_forward.PositionwiseFeedForward",
    ".w_1": nn.Linear,
    ".w_2": nn.Linear,
    ".dropout": nn.Dropout,
    ".activation": "espnet.nets.pytorch_backend.conformer.swish.Swish",
}
_NORM = "espnet.nets.pytorch_backend.transformer.layer_norm.LayerNorm"
_LAYERS = Layers(
    __name__,
    "EncoderLayer",
    {
        "EncoderLayer": "espnet.nets.pytorch_backend.conformer.encoder_layer",
        "EBranchformerEncoderLayer": "espnet2.asr.encoder.e_branchformer_encoder",
    },
    {"2eda2ba0f8cb": _FusedConformer, "a6635506b3ee": _FusedEBranchformer},
    {
        "dropout": nn.Dropout,
        "norm_ff_macaron": _NORM,
        "norm_ff": _NORM,
        **{ffn + path: kind for ffn in ("feed_forward_macaron", "feed_forward") for path, kind in _FFN.items()},
    },
    {_NORM: ("3a7a5ab15304",), _FFN[""]: ("25504c45f63d",), _FFN[".activation"]: ("2120921ea138",)},
    why_not=_why_not,
    within="",
)
__getattr__ = _LAYERS.attribute
FAMILY = _LAYERS.family("espnet")
