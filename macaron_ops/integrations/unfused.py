"""Layers of transformers that look like those of the known families and are none: left, with the reason.

Without them a model of such layers would be one "with no layer of a known family", which hides why.
"""

from torch import nn

from .family import Family

__all__ = ["FAMILY"]

_EXPERTS = "its FFN is a mixture of experts, chosen for each token: the operator has one FFN for all"
_CONVOLUTION = "its FFN is two convolutions over neighbouring frames, no products of one token"
_REASONS = {
    "deepseek_v3.modeling_deepseek_v3.DeepseekV3DecoderLayer": _EXPERTS,
    "ernie4_5_moe.modeling_ernie4_5_moe.Ernie4_5_MoeDecoderLayer": _EXPERTS,
    "fastspeech2_conformer.modeling_fastspeech2_conformer.FastSpeech2ConformerEncoderLayer": _CONVOLUTION,
    "glm4_moe.modeling_glm4_moe.Glm4MoeDecoderLayer": _EXPERTS,
    "gpt_oss.modeling_gpt_oss.GptOssDecoderLayer": _EXPERTS,
    "granitemoe.modeling_granitemoe.GraniteMoeDecoderLayer": _EXPERTS,
    "hunyuan_v1_moe.modeling_hunyuan_v1_moe.HunYuanMoEV1DecoderLayer": _EXPERTS,
    "mixtral.modeling_mixtral.MixtralDecoderLayer": _EXPERTS,
    "olmoe.modeling_olmoe.OlmoeDecoderLayer": _EXPERTS,
    "phimoe.modeling_phimoe.PhimoeDecoderLayer": _EXPERTS,
    "qwen2_moe.modeling_qwen2_moe.Qwen2MoeDecoderLayer": _EXPERTS,
    "qwen3_moe.modeling_qwen3_moe.Qwen3MoeDecoderLayer": _EXPERTS,
}
_REASON_OF = {f"transformers.models.{name}": reason for name, reason in _REASONS.items()}


def _why_not(layer: nn.Module) -> str:
    return _REASON_OF[f"{type(layer).__module__}.{type(layer).__name__}"]


FAMILY = Family("unfused", tuple(_REASON_OF), lambda cls: None, _why_not)
