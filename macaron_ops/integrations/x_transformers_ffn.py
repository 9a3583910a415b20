"""The ``FeedForward`` of lucidrains' x-transformers: both products and the activation in one operator.

    u = W_2 drop(act(W_1 x + b_1)) + b_2

Norm, factor 1/2 (of ``macaron=True``) and residual sum are its ``AttentionLayers``', which stay.
"""

from collections.abc import Mapping

from torch import Tensor, nn

from macaron_ops.ops import ffn_step

from .family import activation_name, why_not_activation
from .foreign import FusedLayer, Layers, dropped

__all__ = ["FAMILY"]


class _FusedXTransformers(FusedLayer):
    def forward(self, x: Tensor, deep_embed: Tensor | None = None) -> Tensor:
        self.require_unchanged()
        (linear1, activation), dropout, linear2 = self.ff
        update = ffn_step(
            x,
            linear1.weight,
            linear1.bias,
            linear2.weight,
            linear2.bias,
            norm=None,
            activation=activation_name(activation),
            step=1.0,
            residual_scale=0.0,
            activation_dropout=dropped(dropout, self.training),
            save=self.save,
        )
        return update if deep_embed is None else update * deep_embed


def _why_not(layer: nn.Module, found: Mapping[str, nn.Module]) -> str | None:
    if len(found["ff"]) != 3 or len(found["ff.0"]) != 2:
        return "ff: expected a Linear, an activation, a Dropout and a Linear; there is more"
    if found["ff.2"].out_features != found["ff.0.0"].in_features:
        return "dim_out is not dim: the operator's output is as wide as its input"
    return why_not_activation("ff.0.1", found["ff.0"][1])


_LAYERS = Layers(
    __name__,
    "FeedForward",
    {"FeedForward": "x_transformers"},
    {"4ce495f1c99f": _FusedXTransformers},
    {
        "ff": nn.Sequential,
        "ff.0": nn.Sequential,
        "ff.0.0": nn.Linear,
        "ff.1": nn.Dropout,
        "ff.2": nn.Linear,
    },
    {},
    why_not=_why_not,
    within="x_transformers",
)
__getattr__ = _LAYERS.attribute
FAMILY = _LAYERS.family("x_transformers")
