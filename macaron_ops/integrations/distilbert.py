"""transformers' DistilBERT: BERT's post-norm layer under other names, without dropout after the attention.

y = LN(x + W_o MHA(x) + b_o),    z = LN(y + drop(W_2 act(W_1 y + b_1) + b_2))
"""

from collections.abc import Mapping

from torch import Tensor, nn

from macaron_ops.nn.norm import norm_arguments
from macaron_ops.ops import split_layer

from .family import activation_name
from .foreign import FusedLayer, Layers, attend_substep, dropped, ffn_substep, refuse, why_not_attention

__all__ = ["FAMILY"]


class _FusedDistilBert(FusedLayer):
    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: object) -> Tensor:
        self.require_unchanged()
        attention, ffn = self.attention, self.ffn
        refuse(attention_mask, **{"output_attentions": attention.config.output_attentions, **kwargs})
        attend = attend_substep(
            attention.q_lin,
            attention.k_lin,
            attention.v_lin,
            attention.out_lin,
            attention.n_heads,
            attention_mask,
            **norm_arguments(self.sa_layer_norm),
            placement="post",
            scale=attention.scaling,
            attention_dropout=dropped(attention.dropout.p, attention.training),
        )
        feed = ffn_substep(
            ffn.lin1,
            ffn.lin2,
            activation_name(ffn.activation),
            **norm_arguments(self.output_layer_norm),
            placement="post",
            dropout=dropped(ffn.dropout, ffn.training),
        )
        return split_layer(hidden_states, [attend, feed], save=self.save)


def _why_not(layer: nn.Module, found: Mapping[str, nn.Module]) -> str | None:
    chunk = found["ffn"].chunk_size_feed_forward
    if chunk:
        return f"chunk_size_feed_forward = {chunk}: the fused layer runs its FFN whole"
    if found["attention"].is_causal:
        return "attention.is_causal: causal attention is not fused"
    return why_not_attention(found["attention"].config)


_LAYERS = Layers(
    __name__,
    "TransformerBlock",
    {"TransformerBlock": "distilbert.modeling_distilbert"},
    {"0f9a6b3ca0d0": _FusedDistilBert},
    {
        "attention": "DistilBertSelfAttention",
        "attention.q_lin": nn.Linear,
        "attention.k_lin": nn.Linear,
        "attention.v_lin": nn.Linear,
        "attention.out_lin": nn.Linear,
        "attention.dropout": nn.Dropout,
        "sa_layer_norm": nn.LayerNorm,
        "ffn": "FFN",
        "ffn.dropout": nn.Dropout,
        "ffn.lin1": nn.Linear,
        "ffn.lin2": nn.Linear,
        "output_layer_norm": nn.LayerNorm,
    },
    {
        "DistilBertSelfAttention": ("032c969758f7",),
        "FFN": ("a7fbd2f25a8c",),
    },
    activation="ffn.activation",
    why_not=_why_not,
)
__getattr__ = _LAYERS.attribute
FAMILY = _LAYERS.family("distilbert")
