"""transformers' Conformers after NeMo's: Parakeet, Granite Speech 5, Nemotron streaming ASR, LASR.

    x = a x + c FFN'(LN x),   x = x + Attention(LN x),   x = a' x + c' Convolution(LN x),   x = LN(a x + c FFN(LN x))

with ``a = 1``, ``c = 1/2``; LASR has 1.5 and 0.5 as parts of its configuration. The FFN's steps are fused, attention
and convolution stay theirs.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from .family import activation_name, why_not_activation
from .foreign import FusedLayer, Layers, dropped

__all__ = ["FAMILY"]


class _FastConformer(FusedLayer):
    def _ffn(self, x: Tensor, norm: nn.LayerNorm, ffn: nn.Module, a: float = 1.0, c: float = 0.5) -> Tensor:
        return self.ffn_step(
            x,
            norm,
            ffn.linear1,
            ffn.linear2,
            activation_name(ffn.activation),
            step=c,
            residual_scale=a,
            activation_dropout=dropped(ffn.activation_dropout, ffn.training),
        )

    def _run(
        self,
        x: Tensor,
        attend: dict[str, object],
        convolve: dict[str, object],
        ffn_weights: Sequence[float] = (1.0, 0.5),
        convolution_weights: Sequence[float] | None = None,
    ) -> Tensor:
        self.require_unchanged()
        x = self._ffn(x, self.norm_feed_forward1, self.feed_forward1, *ffn_weights)
        x = x + self.self_attn(hidden_states=self.norm_self_att(x), **attend)[0]
        convolved = self.conv(self.norm_conv(x), **convolve)
        if convolution_weights is None:
            x = x + convolved
        else:
            x = convolution_weights[0] * x + convolution_weights[1] * convolved
        return self.norm_out(self._ffn(x, self.norm_feed_forward2, self.feed_forward2, *ffn_weights))


class _FusedParakeet(_FastConformer):
    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: Tensor | None = None,
        **kwargs: object,
    ) -> Tensor:
        attend = {"attention_mask": attention_mask, "position_embeddings": position_embeddings, **kwargs}
        return self._run(hidden_states, attend, {"attention_mask": attention_mask})


class _FusedNemotron(_FastConformer):
    """Streams: its attention has a cache, and its convolution another."""

    cache_name = "past_key_values"  # of the attention's argument

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        all_masked_rows: Tensor | None = None,
        position_embeddings: Tensor | None = None,
        cache: object | None = None,
        padding_cache: object | None = None,
        past_key_values: object | None = None,
        **kwargs: object,
    ) -> Tensor:
        attend = {"attention_mask": attention_mask, "position_embeddings": position_embeddings, **kwargs}
        attend[self.cache_name] = past_key_values if cache is None else cache
        return self._run(hidden_states, attend, {"all_masked_rows": all_masked_rows, "padding_cache": padding_cache})


class _FusedNemotronCache(_FusedNemotron):
    """Of transformers 5.24."""

    cache_name = "cache"


class _FusedLasr(_FastConformer):
    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: Tensor | None = None,
        **kwargs: object,
    ) -> Tensor:
        attend = {"attention_mask": attention_mask, "position_embeddings": position_embeddings, **kwargs}
        weights = self.feed_forward_residual_weights, self.conv_residual_weights
        return self._run(hidden_states, attend, {"attention_mask": attention_mask}, *weights)


def _why_not(layer: nn.Module, found: Mapping[str, nn.Module]) -> str | None:
    names = ("feed_forward1", "feed_forward2")
    return next(filter(None, (why_not_activation(f"{n}.activation", found[n].activation) for n in names)), None)


_FFN = {"": "*FeedForward", ".linear1": nn.Linear, ".linear2": nn.Linear}
_LAYERS = Layers(
    __name__,
    "Block",
    {
        "GraniteSpeech5EncoderBlock": "granite_speech5.modeling_granite_speech5",
        "LasrEncoderBlock": "lasr.modeling_lasr",
        "NemotronAsrStreamingEncoderBlock": "nemotron_asr_streaming.modeling_nemotron_asr_streaming",
        "ParakeetEncoderBlock": "parakeet.modeling_parakeet",
    },
    {
        "4a8c0cf86997": _FusedParakeet,
        "ac9adce9130c": _FusedNemotron,
        "347f3a64ab50": _FusedNemotronCache,
        "e129c1d02deb": _FusedLasr,
    },
    {
        "norm_feed_forward1": nn.LayerNorm,
        "norm_feed_forward2": nn.LayerNorm,
        **{ffn + path: kind for ffn in ("feed_forward1", "feed_forward2") for path, kind in _FFN.items()},
    },
    {"*FeedForward": ("6f335920dfb0",)},
    why_not=_why_not,
)
__getattr__ = _LAYERS.attribute
FAMILY = _LAYERS.family("fast_conformer")
