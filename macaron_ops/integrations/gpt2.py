"""transformers' GPT-2 blocks: their FFN is one fused step; their attention, causal and with a cache, stays theirs.

    y = x + Attention(LN x) [+ cross-attention],    z = y + drop(act(LN y W_1 + b_1) W_2 + b_2)

The matrices lie as ``(in, out)`` and are handed over transposed, as views. Kernels copy a matrix whose rows are not
contiguous in each call; the native backend leaves float32 calls of few tokens to the reference, which does not.
"""

from torch import Tensor, nn

from macaron_ops.nn.norm import norm_arguments
from macaron_ops.ops import ffn_step

from .family import activation_name
from .foreign import FusedLayer, Layers, dropped

__all__ = ["FAMILY"]


class _FusedGPT2(FusedLayer):
    cache_name = "past_key_values"  # of the attention's argument

    def forward(
        self,
        hidden_states: Tensor,
        cache: object | None = None,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        use_cache: bool | None = False,
        past_key_values: object | None = None,
        **kwargs: object,
    ) -> Tensor:
        self.require_unchanged()
        attend = {self.cache_name: past_key_values if cache is None else cache, "attention_mask": attention_mask}
        attended, _ = self.attn(self.ln_1(hidden_states), **attend, use_cache=use_cache, **kwargs)
        hidden_states = attended + hidden_states
        if encoder_hidden_states is not None:
            if not hasattr(self, "crossattention"):
                raise ValueError("encoder_hidden_states: expected None without config.add_cross_attention")
            attended, _ = self.crossattention(
                self.ln_cross_attn(hidden_states),
                **attend,
                encoder_hidden_states=encoder_hidden_states,
                encoder_attention_mask=encoder_attention_mask,
            )
            hidden_states = hidden_states + attended
        mlp = self.mlp
        return ffn_step(
            hidden_states,
            mlp.c_fc.weight.T,
            mlp.c_fc.bias,
            mlp.c_proj.weight.T,
            mlp.c_proj.bias,
            **norm_arguments(self.ln_2),
            activation=activation_name(mlp.act),
            step=1.0,
            dropout=dropped(mlp.dropout, mlp.training),
            save=self.save,
        )


class _FusedGPT2Cache(_FusedGPT2):
    """Of transformers 5.24."""

    cache_name = "cache"


_LAYERS = Layers(
    __name__,
    "Block",
    {"GPT2Block": "gpt2.modeling_gpt2"},
    {"446afba98ca1": _FusedGPT2, "d869899c500d": _FusedGPT2Cache},
    {"ln_2": nn.LayerNorm, "mlp": "*MLP", "mlp.c_fc": "Conv1D", "mlp.c_proj": "Conv1D", "mlp.dropout": nn.Dropout},
    {"*MLP": ("cbf2237ad4f1",), "Conv1D": ("e1e1f161d4dd",)},
    activation="mlp.act",
)
__getattr__ = _LAYERS.attribute
FAMILY = _LAYERS.family("gpt2")
