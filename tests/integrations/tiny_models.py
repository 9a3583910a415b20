"""A tiny random model of each family of transformers: how it is built and called."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["MODELS", "Tiny", "keep_float64", "randomise", "tiny"]

KEEP = [[1] * 9, [1] * 5 + [0] * 4]  # the second of the two sequences is padded


class Tiny(NamedTuple):
    """``layer``: the class to be replaced, ``count`` times. ``inputs``: of the call; ids and masks are integers."""

    layer: str
    config: str
    model: str
    settings: dict
    inputs: Callable[[], dict[str, Tensor]]
    count: int = 2
    attention: str = "sdpa"


def ids() -> dict[str, Tensor]:
    return {"input_ids": torch.randint(5, 50, (2, 9)), "attention_mask": torch.tensor(KEEP)}


def causal_ids() -> dict[str, Tensor]:
    return {**ids(), "use_cache": False}


def pixels(channels: int = 3) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2, channels, 8, 8)}


def wave() -> dict[str, Tensor]:
    return {
        "input_values": torch.randn(2, 36),
        "attention_mask": (torch.arange(36) < torch.tensor([[36], [20]])).long(),
    }


def frames() -> dict[str, Tensor]:
    return {"input_features": torch.randn(2, 9, 12), "attention_mask": torch.tensor(KEEP)}


def mel() -> dict[str, Tensor]:
    lengths = torch.tensor([[72], [40]])
    return {"input_features": torch.randn(2, 72, 16), "attention_mask": (torch.arange(72) < lengths).long()}


_TEXT = {"vocab_size": 50, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3}
_IMAGE = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "image_size": 8,
    "patch_size": 4,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
_LLAMA = {
    "vocab_size": 50,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 12,
    "intermediate_size": 40,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

_SPEECH = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "hidden_dropout": 0.0,
    "activation_dropout": 0.0,
    "attention_dropout": 0.0,
    "layerdrop": 0.0,
}
_WAVE = {
    "conv_dim": (8, 8),
    "conv_kernel": (3, 3),
    "conv_stride": (2, 2),
    "num_feat_extract_layers": 2,
    "feat_proj_dropout": 0.0,
    "feat_extract_norm": "layer",
    "conv_depthwise_kernel_size": 3,
    "conformer_conv_dropout": 0.0,
    "num_conv_pos_embedding_groups": 3,
    "num_conv_pos_embeddings": 4,
    "apply_spec_augment": False,
}
_SEAMLESS = {
    "hidden_size": 24,
    "feature_projection_input_dim": 12,
    "speech_encoder_layers": 2,
    "speech_encoder_attention_heads": 3,
    "speech_encoder_intermediate_size": 40,
    "speech_encoder_dropout": 0.0,
    "speech_encoder_layerdrop": 0.0,
    "speech_encoder_chunk_size": 4,
    "conv_depthwise_kernel_size": 3,
    "add_adapter": False,
}
_PARAKEET = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "conv_kernel_size": 3,
    "subsampling_conv_channels": 8,
    "num_mel_bins": 16,
    "dropout": 0.0,
    "activation_dropout": 0.0,
    "attention_dropout": 0.0,
    "layerdrop": 0.0,
    "max_position_embeddings": 40,
}

_GRANITE = {
    "input_dim": 12,
    "num_layers": 2,
    "hidden_dim": 24,
    "feedforward_mult": 2,
    "num_heads": 3,
    "dim_head": 8,
    "output_dim": 6,
    "context_size": 4,
    "max_pos_emb": 8,
    "dropout": 0.0,
    "conv_kernel_size": 3,
}

MODELS: dict[str, Tiny] = {
    "roberta": Tiny(
        "RobertaLayer",
        "RobertaConfig",
        "RobertaModel",
        {**_TEXT, "intermediate_size": 40, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
        ids,
    ),
    "distilbert": Tiny(
        "TransformerBlock",
        "DistilBertConfig",
        "DistilBertModel",
        {"vocab_size": 50, "dim": 24, "n_layers": 2, "n_heads": 3, "hidden_dim": 40, "dropout": 0.0}
        | {"attention_dropout": 0.0, "max_position_embeddings": 40},
        ids,
    ),
    "vit": Tiny("ViTLayer", "ViTConfig", "ViTModel", _IMAGE, pixels),
    "deit": Tiny("DeiTLayer", "DeiTConfig", "DeiTModel", _IMAGE, pixels),
    "vit_msn": Tiny("ViTMSNLayer", "ViTMSNConfig", "ViTMSNModel", _IMAGE, pixels),
    "ijepa": Tiny("IJepaLayer", "IJepaConfig", "IJepaModel", _IMAGE, pixels),
    "ast": Tiny(
        "ASTLayer",
        "ASTConfig",
        "ASTModel",
        {**_IMAGE, "max_length": 8, "num_mel_bins": 8, "frequency_stride": 4, "time_stride": 4},
        lambda: {"input_values": torch.randn(2, 8, 8)},
    ),
    "vivit": Tiny(
        "VivitLayer",
        "VivitConfig",
        "VivitModel",
        {**_IMAGE, "hidden_act": "gelu", "num_frames": 2, "tubelet_size": [2, 4, 4]},
        lambda: {"pixel_values": torch.randn(2, 2, 3, 8, 8)},
    ),
    "gpt2": Tiny(
        "GPT2Block",
        "GPT2Config",
        "GPT2Model",
        {"vocab_size": 50, "n_embd": 24, "n_layer": 2, "n_head": 3, "n_inner": 40, "n_positions": 40}
        | {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
        causal_ids,
    ),
    "whisper": Tiny(
        "WhisperEncoderLayer",
        "WhisperConfig",
        "WhisperEncoder",
        {"d_model": 24, "encoder_layers": 2, "encoder_attention_heads": 3, "encoder_ffn_dim": 40, "num_mel_bins": 8}
        | {"max_source_positions": 10, "dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0},
        lambda: {"input_features": torch.randn(2, 8, 20)},
    ),
    "llama": Tiny("LlamaDecoderLayer", "LlamaConfig", "LlamaModel", _LLAMA, causal_ids),
    "llama_bias": Tiny("LlamaDecoderLayer", "LlamaConfig", "LlamaModel", {**_LLAMA, "mlp_bias": True}, causal_ids),
    "mistral": Tiny("MistralDecoderLayer", "MistralConfig", "MistralModel", _LLAMA, causal_ids),
    "qwen2": Tiny("Qwen2DecoderLayer", "Qwen2Config", "Qwen2Model", _LLAMA, causal_ids),
    "qwen3": Tiny("Qwen3DecoderLayer", "Qwen3Config", "Qwen3Model", _LLAMA, causal_ids),
    "smollm3": Tiny("SmolLM3DecoderLayer", "SmolLM3Config", "SmolLM3Model", _LLAMA, causal_ids),
    "ministral": Tiny("MinistralDecoderLayer", "MinistralConfig", "MinistralModel", _LLAMA, causal_ids),
    "ministral3": Tiny("Ministral3DecoderLayer", "Ministral3Config", "Ministral3Model", _LLAMA, causal_ids),
    "cwm": Tiny("CwmDecoderLayer", "CwmConfig", "CwmModel", _LLAMA, causal_ids),
    "hunyuan": Tiny("HunYuanDenseV1DecoderLayer", "HunYuanDenseV1Config", "HunYuanDenseV1Model", _LLAMA, causal_ids),
    "audioflamingo3": Tiny(
        "AudioFlamingo3EncoderLayer",
        "AudioFlamingo3EncoderConfig",
        "AudioFlamingo3Encoder",
        {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40}
        | {"num_mel_bins": 8, "max_source_positions": 10}
        | {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0},
        lambda: {
            "input_features": torch.randn(2, 8, 20),
            "input_features_mask": (torch.arange(20) < torch.tensor([[20], [12]])).long(),
        },
    ),
    "wav2vec2_conformer": Tiny(
        "Wav2Vec2ConformerEncoderLayer",
        "Wav2Vec2ConformerConfig",
        "Wav2Vec2ConformerModel",
        {**_SPEECH, **_WAVE, "max_source_positions": 20},
        wave,
    ),
    "wav2vec2_conformer_rotary": Tiny(
        "Wav2Vec2ConformerEncoderLayer",
        "Wav2Vec2ConformerConfig",
        "Wav2Vec2ConformerModel",
        {**_SPEECH, **_WAVE, "position_embeddings_type": "rotary"},
        wave,
    ),
    "wav2vec2_bert": Tiny(
        "Wav2Vec2BertEncoderLayer",
        "Wav2Vec2BertConfig",
        "Wav2Vec2BertModel",
        {**_SPEECH, "feature_projection_input_dim": 12, "conv_depthwise_kernel_size": 3, "add_adapter": True}
        | {
            "use_intermediate_ffn_before_adapter": True,
            "conformer_conv_dropout": 0.0,
            "adapter_act": "relu",
            "apply_spec_augment": False,
        },
        frames,
    ),
    "seamless_m4t": Tiny(
        "SeamlessM4TConformerEncoderLayer",
        "SeamlessM4TConfig",
        "SeamlessM4TSpeechEncoder",
        _SEAMLESS,
        frames,
    ),
    "seamless_m4t_v2": Tiny(
        "SeamlessM4Tv2ConformerEncoderLayer",
        "SeamlessM4Tv2Config",
        "SeamlessM4Tv2SpeechEncoder",
        _SEAMLESS,
        frames,
    ),
    "parakeet": Tiny("ParakeetEncoderBlock", "ParakeetEncoderConfig", "ParakeetEncoder", _PARAKEET, mel),
    "parakeet_no_bias": Tiny(
        "ParakeetEncoderBlock",
        "ParakeetEncoderConfig",
        "ParakeetEncoder",
        {**_PARAKEET, "attention_bias": False},
        mel,
    ),
    "lasr": Tiny("LasrEncoderBlock", "LasrEncoderConfig", "LasrEncoder", _PARAKEET, mel),
    "nemotron": Tiny(
        "NemotronAsrStreamingEncoderBlock",
        "NemotronAsrStreamingEncoderConfig",
        "NemotronAsrStreamingEncoder",
        _PARAKEET,
        mel,
    ),
    "granite_speech5": Tiny(
        "GraniteSpeech5EncoderBlock",
        "GraniteSpeech5EncoderConfig",
        "GraniteSpeech5Encoder",
        {**_SPEECH, "num_mel_bins": 6, "context_size": 4, "conv_kernel_size": 3, "max_position_embeddings": 16}
        | {"subsample_layers": []},
        lambda: {"input_features": torch.randn(2, 16, 24)},
    ),
    "granite_speech": Tiny(
        "GraniteSpeechConformerBlock",
        "GraniteSpeechEncoderConfig",
        "GraniteSpeechCTCEncoder",
        _GRANITE,
        lambda: {"hidden_states": torch.randn(2, 9, 12)},
    ),
    "granite_speech_plus": Tiny(
        "GraniteSpeechPlusConformerBlock",
        "GraniteSpeechPlusEncoderConfig",
        "GraniteSpeechPlusCTCEncoder",
        _GRANITE,
        lambda: {"hidden_states": torch.randn(2, 9, 12)},
    ),
    "phi4_audio": Tiny(
        "Phi4MultimodalAudioConformerEncoderLayer",
        "Phi4MultimodalAudioConfig",
        "Phi4MultimodalAudioModel",
        {"hidden_size": 24, "intermediate_size": 40, "num_blocks": 2, "num_attention_heads": 3, "dropout_rate": 0.0}
        | {
            "ext_pw_out_channel": 24,
            "depthwise_separable_out_channel": 24,
            "nemo_conv_channels": 24,
            "nemo_final_size": 2,
            "input_size": 16,
        }
        | {"bias_max_distance": 20, "kernel_size": 3, "chunk_size": -1, "left_chunk": 4, "depthwise_multiplier": 1},
        lambda: {"hidden_states": torch.randn(2, 32, 16), "mask": None},
    ),
    "gemma3n_audio": Tiny(
        "Gemma3nAudioConformerFeedForward",
        "Gemma3nAudioConfig",
        "Gemma3nAudioEncoder",
        {"hidden_size": 24, "conf_num_hidden_layers": 2, "conf_num_attention_heads": 3, "input_feat_size": 16}
        | {"conf_attention_chunk_size": 4, "conf_attention_context_left": 3, "sscp_conv_channel_size": (4, 4)}
        | {"gradient_clipping": 4.0, "conf_reduction_factor": 1},
        lambda: {"audio_mel": torch.randn(2, 16, 16), "audio_mel_mask": torch.zeros(2, 16, dtype=torch.bool)},
        count=4,
    ),
    "gemma4_audio": Tiny(
        "Gemma4AudioFeedForward",
        "Gemma4AudioConfig",
        "Gemma4AudioModel",
        {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "subsampling_conv_channels": (16, 4)}
        | {"attention_chunk_size": 4, "attention_context_left": 4, "gradient_clipping": 4.0, "output_proj_dims": 20}
        | {"use_clipped_linears": False},
        lambda: {
            "input_features": torch.randn(2, 36, 16),
            "attention_mask": torch.arange(36) < torch.tensor([[36], [20]]),
        },
        count=4,
        attention="eager",
    ),
    "ernie4_5": Tiny("Ernie4_5DecoderLayer", "Ernie4_5Config", "Ernie4_5Model", _LLAMA, causal_ids),
}


def tiny(name: str, attention: str | None = None, **settings: object) -> nn.Module:
    """The model in float32, its norms and biases random too, and rounded to bfloat16: every dtype has the same."""
    import transformers

    spec = MODELS[name]
    config = getattr(transformers, spec.config)(**{**spec.settings, **settings})
    cls = getattr(transformers, spec.model, None) or _find(config, spec.model)
    return randomise(cls._from_config(config, attn_implementation=attention or spec.attention))


def keep_float64(monkeypatch) -> None:
    """``Tensor.float``, by which models widen 16 bits, leaves float64 as it is: some would mix the two."""
    widen = Tensor.float
    monkeypatch.setattr(Tensor, "float", lambda t: t if t.dtype == torch.float64 else widen(t))


def randomise(model: nn.Module) -> nn.Module:
    """Adds noise to all parameters; they and the buffers are numbers of bfloat16."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter)).copy_(parameter.bfloat16())
        for buffer in model.buffers():
            if buffer.is_floating_point():
                buffer.copy_(buffer.bfloat16())
    return model


def _find(config: object, name: str) -> type:
    import importlib

    module = type(config).__module__.replace("configuration_", "modeling_")
    return getattr(importlib.import_module(module), name)
