"""The BERT family of transformers: post-norm layers with biases everywhere, one fused Lie-Trotter step each.

y = LN(x + drop(W_o MHA(x) + b_o)),    z = LN(y + drop(W_2 act(W_1 y + b_1) + b_2))
"""

from collections.abc import Mapping

from torch import Tensor, nn

from macaron_ops.ops import Substep, split_layer

from .family import activation_name
from .foreign import FusedLayer, Layers, attend_substep, dropped, ffn_substep, refuse, why_not_attention

__all__ = ["FAMILY"]


class _FusedBert(FusedLayer):
    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_values: object | None = None,
        **kwargs: object,
    ) -> Tensor:
        self.require_unchanged()
        asked = {"output_attentions": self.attention.self.config.output_attentions, **kwargs}
        refuse(attention_mask, past_key_values=past_key_values, **asked)
        return split_layer(hidden_states, self.substeps(attention_mask), save=self.save)

    def substeps(self, attention_mask: Tensor | None) -> list[Substep]:
        """A, B."""
        attention, own = self.attention, self.attention.self
        attend = attend_substep(
            own.query,
            own.key,
            own.value,
            attention.output.dense,
            own.num_attention_heads,
            attention_mask,
            **_post_norm(attention.output),
            scale=own.scaling,
            attention_dropout=dropped(own.dropout.p, own.training),
        )
        activation = activation_name(self.intermediate.intermediate_act_fn)
        return [attend, ffn_substep(self.intermediate.dense, self.output.dense, activation, **_post_norm(self.output))]


def _post_norm(output: nn.Module) -> dict[str, object]:
    """What an output block (Linear, dropout, residual, LayerNorm) says of a step, except the Linear."""
    norm = output.LayerNorm
    return {
        "placement": "post",
        "norm_weight": norm.weight,
        "norm_bias": norm.bias,
        "eps": norm.eps,
        "dropout": dropped(output.dropout, output.training),
    }


def _why_not(layer: nn.Module, found: Mapping[str, nn.Module]) -> str | None:
    if layer.is_decoder:
        return "config.is_decoder: causal attention with a cache is not fused"
    if layer.chunk_size_feed_forward:
        return f"chunk_size_feed_forward = {layer.chunk_size_feed_forward}: the fused layer runs its FFN whole"
    if found["attention.self"].is_causal:
        return "attention.self.is_causal: causal attention is not fused"
    return why_not_attention(found["attention.self"].config)


_LAYERS = Layers(
    __name__,
    "Layer",
    {
        "BertLayer": "bert.modeling_bert",
        "BertGenerationLayer": "bert_generation.modeling_bert_generation",
        "CamembertLayer": "camembert.modeling_camembert",
        "Data2VecTextLayer": "data2vec.modeling_data2vec_text",
        "ElectraLayer": "electra.modeling_electra",
        "ErnieLayer": "ernie.modeling_ernie",
        "RobertaLayer": "roberta.modeling_roberta",
        "RoCBertLayer": "roc_bert.modeling_roc_bert",
        "XLMRobertaLayer": "xlm_roberta.modeling_xlm_roberta",
    },
    {"a0ea4a57cff9": _FusedBert, "565edfdc8735": _FusedBert, "1f1f465efd29": _FusedBert},
    {
        "attention": "*Attention",
        "attention.self": "*SelfAttention",
        "attention.self.query": nn.Linear,
        "attention.self.key": nn.Linear,
        "attention.self.value": nn.Linear,
        "attention.self.dropout": nn.Dropout,
        "attention.output": "*SelfOutput",
        "attention.output.dense": nn.Linear,
        "attention.output.dropout": nn.Dropout,
        "attention.output.LayerNorm": nn.LayerNorm,
        "intermediate": "*Intermediate",
        "intermediate.dense": nn.Linear,
        "output": "*Output",
        "output.dense": nn.Linear,
        "output.dropout": nn.Dropout,
        "output.LayerNorm": nn.LayerNorm,
    },
    {  # of transformers 5.2 and 5.3, of 5.5 to 5.23, of 5.24
        "*Attention": ("922ce891984c", "b6c6954f1129", "6867f22bd9c9"),
        "*SelfAttention": ("cc40b247e69f", "13dbe6b4a8f5", "18259e6c531a"),
        "*SelfOutput": ("c4503fdc6996",),
        "*Intermediate": ("a4c491295aab",),
        "*Output": ("c4503fdc6996",),
    },
    activation="intermediate.intermediate_act_fn",
    why_not=_why_not,
)
__getattr__ = _LAYERS.attribute
FAMILY = _LAYERS.family("bert")
