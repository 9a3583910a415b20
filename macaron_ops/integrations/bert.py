"""The BERT family of transformers: post-norm layers with biases everywhere, one fused Lie-Trotter step each.

    y = LN(x + drop(W_o MHA(x) + b_o)),    z = LN(y + drop(W_2 act(W_1 y + b_1) + b_2))

The fused classes (``FusedBertLayer``, ...) derive from classes of transformers. They are made when they are first asked
for, by ``replace_layers`` or by unpickling, so that importing this file does not import transformers.
"""

import importlib
import sys

import torch
from torch import Tensor, nn

from macaron_ops.nn.parts import class_name, why_not_part
from macaron_ops.ops import Substep, attend_step, ffn_step, split_layer, substep

from .family import Family, activation_name, why_not_activation

__all__ = ["FAMILY"]

# Their layer and all its parts are the same code as BertLayer's, but for the names.
_LAYERS = {
    name: f"transformers.models.{module}"
    for name, module in {
        "BertLayer": "bert.modeling_bert",
        "BertGenerationLayer": "bert_generation.modeling_bert_generation",
        "CamembertLayer": "camembert.modeling_camembert",
        "Data2VecTextLayer": "data2vec.modeling_data2vec_text",
        "ElectraLayer": "electra.modeling_electra",
        "ErnieLayer": "ernie.modeling_ernie",
        "RobertaLayer": "roberta.modeling_roberta",
        "RoCBertLayer": "roc_bert.modeling_roc_bert",
        "XLMRobertaLayer": "xlm_roberta.modeling_xlm_roberta",
    }.items()
}

# Before, layers returned tuples (4.x), or outputs were recorded by patching their forward (5.0, 5.1).
_OLDEST = (5, 2)

# A layer's parts and what they have to be; "*" stands for the layer's own prefix, such as "Bert".
_PARTS = {
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
}

# With these the mask that a layer gets is None, bool (True: attend) or added to the scores.
_ATTENTIONS = ("sdpa", "eager")

# Of a layer's keyword arguments, those by which the attention functions compute something else.
_UNSUPPORTED = ("past_key_values", "output_attentions", "is_causal", "position_bias", "softcap", "cache")


class _FusedBert:
    """The fused ``forward``, put before a layer class of transformers. ``forward`` looks again whether the layer can be
    fused: a later LoRA, hook or configuration must not be skipped in silence."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_values: object | None = None,
        **kwargs: object,
    ) -> Tensor:
        _check_call(self, attention_mask, past_key_values=past_key_values, **kwargs)
        return split_layer(hidden_states, self.substeps(attention_mask), save=self.save)

    def substeps(self, attention_mask: Tensor | None) -> list[Substep]:
        """A, B."""
        attention, own = self.attention, self.attention.self
        return [
            substep(
                attend_step,
                (own.query.weight, own.key.weight, own.value.weight),
                (own.query.bias, own.key.bias, own.value.bias),
                attention.output.dense.weight,
                attention.output.dense.bias,
                own.num_attention_heads,
                **_post_norm(attention.output),
                attn_mask=_blocked(attention_mask),
                scale=own.scaling,
                attention_dropout=own.dropout.p if own.training else 0.0,
            ),
            substep(
                ffn_step,
                self.intermediate.dense.weight,
                self.intermediate.dense.bias,
                self.output.dense.weight,
                self.output.dense.bias,
                **_post_norm(self.output),
                activation=activation_name(self.intermediate.intermediate_act_fn),
            ),
        ]


def _post_norm(output: nn.Module) -> dict[str, object]:
    """What an output block (Linear, dropout, residual, LayerNorm) says of a step, except the Linear."""
    norm, dropout = output.LayerNorm, output.dropout
    return {
        "placement": "post",
        "step": 1.0,
        "norm_weight": norm.weight,
        "norm_bias": norm.bias,
        "eps": norm.eps,
        "dropout": dropout.p if dropout.training else 0.0,
    }


def _blocked(mask: Tensor | None) -> Tensor | None:
    """transformers' bool masks say where to attend, the operators' where not to."""
    return ~mask if mask is not None and mask.dtype == torch.bool else mask


def _check_call(layer: nn.Module, mask: object, **kwargs: object) -> None:
    reason = _changed(layer, layer.parts)
    if reason is not None:
        raise RuntimeError(
            f"{type(layer).__name__}: {reason}. Since the layer was replaced it has changed: "
            "call macaron_ops.replace_layers(model) again, or macaron_ops.restore_layers(model)"
        )
    for name in _UNSUPPORTED:
        value = kwargs.get(name)
        if name == "output_attentions" and value is None:
            value = layer.attention.self.config.output_attentions
        if value is not None and value is not False:
            raise ValueError(
                f"{name}: expected None or False, for a fused layer keeps no attention weights and no cache; got "
                f"{value if isinstance(value, bool) else type(value).__name__}. "
                "macaron_ops.restore_layers(model) brings the layers back that do"
            )
    if mask is not None and not isinstance(mask, Tensor):
        raise TypeError(f"attention_mask: expected a tensor of 4 dimensions or None; got {type(mask).__name__}")


def _parts(original: type[nn.Module]) -> tuple[tuple[str, str, str, type[nn.Module]], ...]:
    """``(path, parent's path, name in the parent, class)`` of each part of a layer, parents first."""
    source, prefix = sys.modules[original.__module__], original.__name__.removesuffix("Layer")
    classes = (getattr(source, c.replace("*", prefix)) if isinstance(c, str) else c for c in _PARTS.values())
    return tuple((path, *path.rpartition(".")[::2], cls) for path, cls in zip(_PARTS, classes, strict=True))


def _why_not(layer: nn.Module) -> str | None:
    version = sys.modules["transformers"].__version__
    if tuple(map(int, version.split(".")[:2])) < _OLDEST:
        return f"transformers {version}: the layers of {'.'.join(map(str, _OLDEST))} and later are known"
    original = layer.__dict__.get("replaced_class", type(layer))
    return _changed(layer, _fused(original).parts)


def _changed(layer: nn.Module, parts: tuple[tuple[str, str, str, type[nn.Module]], ...]) -> str | None:
    """Why the layer cannot run fused, or None; called before each run."""
    if layer.is_decoder:
        return "config.is_decoder: causal attention with a cache is not fused"
    if layer.chunk_size_feed_forward:
        return f"chunk_size_feed_forward = {layer.chunk_size_feed_forward}: the fused layer runs its FFN whole"
    found = {"": layer}
    for path, parent, name, cls in parts:
        part = found[path] = found[parent]._modules[name]
        reason = why_not_part(path, part, cls)
        if reason is not None:
            return reason
    if found["attention.self"].is_causal:
        return "attention.self.is_causal: causal attention is not fused"
    attention = found["attention.self"].config._attn_implementation
    if attention is not None and attention not in _ATTENTIONS:
        return f"attn_implementation {attention!r}: the masks of {' and '.join(map(repr, _ATTENTIONS))} are known"
    return why_not_activation("activation", found["intermediate"].intermediate_act_fn)


def _fused(original: type[nn.Module]) -> type[nn.Module]:
    return getattr(importlib.import_module(__name__), f"Fused{original.__name__}")


def __getattr__(name: str) -> type[nn.Module]:
    source = _LAYERS.get(name.removeprefix("Fused")) if name.startswith("Fused") else None
    if source is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    original = getattr(importlib.import_module(source), name.removeprefix("Fused"))
    text = f"{class_name(original)} as one fused operator."
    fused = type(name, (_FusedBert, original), {"__module__": __name__, "__doc__": text, "parts": _parts(original)})
    return globals().setdefault(name, fused)


FAMILY = Family("bert", tuple(f"{source}.{name}" for name, source in _LAYERS.items()), _fused, _why_not)
