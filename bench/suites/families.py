"""Models of the families that `replace_layers` knows, random weights, before and after: `bench model --model NAME`.

Configurations are those of small published models, cut to a few layers; a quick run takes narrow ones. Agreement is
that of the output and of the vector of all gradients, by their lengths: one number of thousands that is off by luck
does not fail a run, a layer that is off does.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial

import torch
from torch import Tensor, nn

from .. import flops
from ..correctness import WrongResult
from ..group import AFTER, BEFORE, COMPILED, Group, Ready, Variant, backend_names, on_backend
from ..options import DTYPES, Options

RULE = "|found - float64| <= 2 |original - float64| + eps |float64|, of output and gradients"


@dataclass(frozen=True)
class Spec:
    """`widths` are the configuration's numbers at full width; a quick run divides them by 4. `layers` and `length` are
    its names of the number of layers and, where it fixes that, of the number of frames; `model`: a class that
    `AutoModel` does not find."""

    config: str
    widths: dict[str, int]
    inputs: Callable[[int, int], dict[str, Tensor]]
    settings: dict[str, object] = field(default_factory=dict)
    layers: str = "num_hidden_layers"
    length: str | None = None
    model: str | None = None


def _ids(batch: int, length: int) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(5, 100, (batch, length))}


def _causal_ids(batch: int, length: int) -> dict[str, Tensor]:
    return {**_ids(batch, length), "use_cache": False}


def _pixels(batch: int, length: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(batch, 3, 64, 64)}


def _frames(width: int, per_token: int = 1, name: str = "input_features", **others) -> Callable[..., dict[str, Tensor]]:
    return lambda batch, length: {name: torch.randn(batch, per_token * length, width), **others}


def _mel(batch: int, length: int) -> dict[str, Tensor]:
    return {"input_features": torch.randn(batch, 80, 2 * length)}


def _wave(batch: int, length: int) -> dict[str, Tensor]:
    return {"input_values": torch.randn(batch, 320 * length + 80)}


def _gemma(batch: int, length: int) -> dict[str, Tensor]:
    mask = torch.zeros(batch, 4 * length, dtype=torch.bool)
    return {"audio_mel": torch.randn(batch, 4 * length, 128), "audio_mel_mask": mask}


_WIDTHS = {"hidden_size": 512, "intermediate_size": 2048}
_TEXT = {"vocab_size": 100, "num_attention_heads": 8}
_SPEECH = {"num_attention_heads": 8, "layerdrop": 0.0, "activation_dropout": 0.0, "attention_dropout": 0.0}

SPECS = {
    "roberta": Spec("RobertaConfig", _WIDTHS, _ids, _TEXT),
    "distilbert": Spec(
        "DistilBertConfig", {"dim": 512, "hidden_dim": 2048}, _ids, {"vocab_size": 100, "n_heads": 8}, "n_layers"
    ),
    "vit": Spec("ViTConfig", _WIDTHS, _pixels, {"num_attention_heads": 8, "image_size": 64, "patch_size": 8}),
    "gpt2": Spec("GPT2Config", {"n_embd": 512}, _causal_ids, {"vocab_size": 100, "n_head": 8}, "n_layer"),
    "llama": Spec("LlamaConfig", _WIDTHS, _causal_ids, {**_TEXT, "num_key_value_heads": 4}),
    "qwen3": Spec("Qwen3Config", _WIDTHS, _causal_ids, {**_TEXT, "num_key_value_heads": 4, "head_dim": 32}),
    "whisper": Spec(
        "WhisperConfig",
        {"d_model": 512, "encoder_ffn_dim": 2048},
        _mel,
        {"encoder_attention_heads": 8},
        layers="encoder_layers",
        length="max_source_positions",
        model="WhisperEncoder",
    ),
    "wav2vec2_conformer": Spec(
        "Wav2Vec2ConformerConfig",
        _WIDTHS,
        _wave,
        {**_SPEECH, "apply_spec_augment": False, "conv_dim": (128,) * 7},
    ),
    "wav2vec2_bert": Spec(
        "Wav2Vec2BertConfig",
        _WIDTHS,
        _frames(32),
        {**_SPEECH, "feature_projection_input_dim": 32, "apply_spec_augment": False},
    ),
    "seamless_m4t_v2": Spec(
        "SeamlessM4Tv2Config",
        {"hidden_size": 512, "speech_encoder_intermediate_size": 2048},
        _frames(160),
        {"speech_encoder_attention_heads": 8, "speech_encoder_layerdrop": 0.0, "add_adapter": False},
        layers="speech_encoder_layers",
        model="SeamlessM4Tv2SpeechEncoder",
    ),
    "parakeet": Spec("ParakeetEncoderConfig", _WIDTHS, _frames(80, 8), _SPEECH),
    "nemotron": Spec("NemotronAsrStreamingEncoderConfig", _WIDTHS, _frames(128, 8), {**_SPEECH, "num_mel_bins": 128}),
    "lasr": Spec("LasrEncoderConfig", _WIDTHS, _frames(80, 4), {**_SPEECH, "num_mel_bins": 80}),
    "granite_speech": Spec(
        "GraniteSpeechEncoderConfig",
        {"hidden_dim": 512, "dim_head": 64},
        _frames(160, name="hidden_states"),
        {"num_heads": 8, "context_size": 32, "max_pos_emb": 64},
        layers="num_layers",
        model="GraniteSpeechCTCEncoder",
    ),
    "phi4_audio": Spec(
        "Phi4MultimodalAudioConfig",
        {**_WIDTHS, "ext_pw_out_channel": 512, "depthwise_separable_out_channel": 512, "nemo_conv_channels": 512},
        _frames(80, 8, name="hidden_states", mask=None),
        {"num_attention_heads": 8},
        layers="num_blocks",
        model="Phi4MultimodalAudioModel",
    ),
    "gemma3n_audio": Spec(
        "Gemma3nAudioConfig",
        {"hidden_size": 512},
        _gemma,
        {"conf_num_attention_heads": 8, "conf_reduction_factor": 1},
        layers="conf_num_hidden_layers",
        model="Gemma3nAudioEncoder",
    ),
}


def groups(options: Options) -> list[Group]:
    return [
        _group(name, dtype, direction, options)
        for name in options.models
        for dtype in options.dtypes
        for direction in flops.PASSES
    ]


def _group(name: str, dtype: str, direction: str, options: Options) -> Group:
    batch, length = _size(options)
    compiled = (f"{COMPILED} {BEFORE}",) if options.compile and options.effort != "quick" else ()
    return Group(
        suite="model",
        subject=name,
        shape={"batch": batch, "length": length, "layers": _layers(options)},
        dtype=dtype,
        direction=direction,
        tokens=batch * length,
        flops=None,
        denominator=BEFORE,
        names=(BEFORE, *compiled, *(f"{AFTER} {backend}" for backend in backend_names(options))),
        build=partial(_build, name, (batch, length), DTYPES[dtype], direction, options),
    )


def _size(options: Options) -> tuple[int, int]:
    return {"quick": (2, 64), "normal": (4, 128), "full": (8, 256)}[options.effort]


def _layers(options: Options) -> int:
    return 2 if options.effort == "quick" else 6


def model_of(name: str, options: Options) -> nn.Module:
    """The model with random weights, in float32 and in eval mode: without dropout."""
    from .model import _transformers

    transformers, spec = _transformers(), SPECS[name]
    divisor = 4 if options.effort == "quick" else 1
    widths = {key: value // divisor for key, value in spec.widths.items()}
    torch.manual_seed(options.seed)
    sizes = {spec.layers: _layers(options), **({spec.length: _size(options)[1]} if spec.length else {})}
    config = getattr(transformers, spec.config)(**spec.settings, **widths, **sizes)
    if spec.model is None:
        return transformers.AutoModel.from_config(config).eval()
    module = importlib.import_module(type(config).__module__.replace("configuration_", "modeling_"))
    return getattr(module, spec.model)._from_config(config).eval()


def _build(
    name: str, size: tuple[int, int], dtype: torch.dtype, direction: str, options: Options, names: Sequence[str]
) -> Iterable[Variant]:
    import macaron_ops

    before = model_of(name, options).to(options.device, dtype)
    inputs = {key: value.to(options.device) if torch.is_tensor(value) else value for key, value in _inputs(name, size)}

    @cache
    def truth_and_original() -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        wide = copy.deepcopy(before).double()
        return tuple(_ready(m, partial(_last, m, inputs), direction).call() for m in (wide, before))

    def check(found: Sequence[Tensor]) -> dict[str, object]:
        truths, originals = truth_and_original()
        eps, worst = torch.finfo(dtype).eps, {}
        for what, f, o, t in zip(("output", "gradients"), found, originals, truths, strict=False):
            distance, allowed = _length(f - t), 2 * _length(o - t) + eps * _length(t)
            if not distance <= allowed:
                raise WrongResult(f"{what}: {distance:.1e} from float64, allowed {allowed:.1e} ({RULE})")
            if not worst or distance * worst["allowed"] > worst["error"] * allowed:
                worst = {"rule": RULE, "tensor": what, "error": distance, "allowed": allowed}
        return worst

    def prepare(variant: str) -> Ready:
        model, call = copy.deepcopy(before), None
        if variant.startswith(AFTER):
            macaron_ops.replace_layers(model, strict=True)
            call = on_backend(variant.removeprefix(AFTER).strip(), partial(_last, model, inputs))
        elif variant != BEFORE:
            compiled = torch.compile(model)
            call = partial(_last, compiled, inputs)
        return _ready(model, call or partial(_last, model, inputs), direction)

    for variant in names:
        yield Variant(variant, partial(prepare, variant), check if variant.startswith(AFTER) else None)


def _inputs(name: str, size: tuple[int, int]) -> list[tuple[str, object]]:
    torch.manual_seed(1)
    return list(SPECS[name].inputs(*size).items())


def _last(model: nn.Module, inputs: dict[str, object]) -> Tensor:
    parameter = next(model.parameters())
    moved = {
        key: value.to(parameter.dtype) if torch.is_tensor(value) and value.is_floating_point() else value
        for key, value in inputs.items()
    }
    y = model(**moved)
    return y if isinstance(y, Tensor) else y[0]


def _ready(model: nn.Module, forward: Callable[[], Tensor], direction: str) -> Ready:
    """The output alone, or with the gradients of its mean square as one vector."""

    def call() -> tuple[Tensor, ...]:
        if direction == "forward":
            with torch.no_grad():
                return (forward(),)
        y = forward()
        wrt = [p for p in model.parameters() if p.requires_grad]
        grads = torch.autograd.grad(y.float().square().mean(), wrt, allow_unused=True)
        return y.detach(), torch.cat([g.flatten() for g in grads if g is not None])

    return Ready(call, None if direction == "forward" else forward)


def _length(x: Tensor) -> float:
    return torch.linalg.vector_norm(x.double()).item()
