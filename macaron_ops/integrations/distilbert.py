"""transformers' DistilBERT: BERT's post-norm layer under other names, without dropout after the attention.

y = LN(x + W_o MHA(x) + b_o),    z = LN(y + drop(W_2 act(W_1 y + b_1) + b_2))
"""

from collections.abc import Mapping

from torch import Tensor, nn

from macaron_ops.ops import attend_step, ffn_step, split_layer, substep

from .family import activation_name
from .foreign import FusedLayer, Layers, blocked, dropped, refuse, why_not_attention

__all__ = ["FAMILY"]


class _FusedDistilBert(FusedLayer):
    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: object) -> Tensor:
        self.require_unchanged()
        attention, ffn = self.attention, self.ffn
        refuse(attention_mask, **{"output_attentions": attention.config.output_attentions, **kwargs})
        return split_layer(
            hidden_states,
            [
                substep(
                    attend_step,
                    (attention.q_lin.weight, attention.k_lin.weight, attention.v_lin.weight),
                    (attention.q_lin.bias, attention.k_lin.bias, attention.v_lin.bias),
                    attention.out_lin.weight,
                    attention.out_lin.bias,
                    attention.n_heads,
                    **_post_norm(self.sa_layer_norm),
                    attn_mask=blocked(attention_mask),
                    scale=attention.scaling,
                    attention_dropout=dropped(attention.dropout.p, attention.training),
                ),
                substep(
                    ffn_step,
                    ffn.lin1.weight,
                    ffn.lin1.bias,
                    ffn.lin2.weight,
                    ffn.lin2.bias,
                    **_post_norm(self.output_layer_norm),
                    activation=activation_name(ffn.activation),
                    dropout=dropped(ffn.dropout, ffn.training),
                ),
            ],
            save=self.save,
        )


def _post_norm(norm: nn.LayerNorm) -> dict[str, object]:
    return {"placement": "post", "step": 1.0, "norm_weight": norm.weight, "norm_bias": norm.bias, "eps": norm.eps}


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
