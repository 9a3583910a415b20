"""The translation models of the Macaron paper's own code (github.com/zhuohan123/macaron-net) as ``MacaronTransformer``.

Its five architectures, and what its checkpoints call the parameters. Sizes are read from the checkpoint; the name of
the architecture gives what no tensor says: heads, dropouts and where the norms stand. Two particulars of that code:

* the decoder's first FFN has the ENCODER's width (``encoder_ffn_embed_dim``);
* positions are sines beside cosines, counted over the tokens that are not padding (``positions="fairseq"``).
"""

import argparse
import os
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .transformer import MacaronTransformer

__all__ = ["ARCHITECTURES", "from_fairseq", "to_fairseq"]  # and what .macaron_bert shares


class _Architecture(NamedTuple):
    heads: int
    dropout: float
    attention_dropout: float
    activation_dropout: float
    norm_first: bool


ARCHITECTURES = {
    "transformer_iwslt_de_en_macaron": _Architecture(4, 0.1, 0.0, 0.0, False),
    "transformer_iwslt_de_en_macaron_v2": _Architecture(4, 0.1, 0.1, 0.1, True),
    "transformer_wmt_en_de_macaron": _Architecture(8, 0.1, 0.0, 0.0, False),
    "transformer_wmt_en_de_macaron_v2": _Architecture(8, 0.1, 0.1, 0.1, True),
    "transformer_wmt_en_de_big_t2t_macaron": _Architecture(16, 0.3, 0.1, 0.1, True),
}

# Ours, theirs. In the order of the layer's steps.
_LAYER = {"macaron_linear1": "macaron_fc1", "macaron_linear2": "macaron_fc2", "linear1": "fc1", "linear2": "fc2"}
_ENCODER = {**_LAYER, "macaron_norm": "layer_norms.2", "norm1": "layer_norms.0", "norm2": "layer_norms.1"}
_DECODER = {
    **_LAYER,
    "macaron_norm": "macaron_layer_norm",
    "norm1": "self_attn_layer_norm",
    "multihead_attn": "encoder_attn",
    "norm2": "encoder_attn_layer_norm",
    "norm3": "final_layer_norm",
}
# Of checkpoints older than the names above, as fairseq upgrades them.
_OLD_DECODER = {
    "layer_norms.0.": "self_attn_layer_norm.",
    "layer_norms.1.": "encoder_attn_layer_norm.",
    "layer_norms.2.": "final_layer_norm.",
}
NO_PARAMETERS = ("version", "embed_positions._float_tensor", "embed_positions.weights")


def from_fairseq(
    checkpoint: str | os.PathLike | Mapping[str, Tensor],
    arch: str,
    *,
    padding_idx: int = 1,
    dropout: float | None = None,
    save: str = "fast",
) -> MacaronTransformer:
    """The model of a checkpoint, with the checkpoint's tensors.

    Args:
        checkpoint: a state dict, or a file: one of ``torch.save``, read with ``weights_only=True``, or safetensors.
        arch: a name of :data:`ARCHITECTURES`.
        padding_idx: fairseq's dictionaries have 1.
        dropout: None: the architecture's (their IWSLT14 run trained with 0.3).
        save: memory policy.

    Raises:
        ValueError: an unknown architecture, a tensor that is missing or that no part of the model has, or embeddings
            and stacks that these architectures do not have.
    """
    if arch not in ARCHITECTURES:
        raise ValueError(f"arch: expected one of {', '.join(map(repr, ARCHITECTURES))}; got {arch!r}")
    settings = ARCHITECTURES[arch]
    state = _upgraded(checkpoint if isinstance(checkpoint, Mapping) else read_checkpoint(checkpoint))
    counts = {stack: layer_count(state, stack) for stack in ("encoder", "decoder")}
    source, target = (need(state, f"{stack}.embed_tokens.weight") for stack in counts)
    for stack in counts:
        if (f"{stack}.layer_norm.weight" in state) != settings.norm_first:
            there = "has none" if settings.norm_first else "has one"
            raise ValueError(f"checkpoint: expected {arch!r} to end with a norm exactly if pre-norm; {stack} {there}")
    untied = "decoder.embed_out" in state
    one = source.shape == target.shape and (source is target or torch.equal(source, target)) and not untied
    model = MacaronTransformer(
        source.shape[0],
        target.shape[0],
        source.shape[1],
        settings.heads,
        counts["encoder"],
        counts["decoder"],
        2 * need(state, "decoder.layers.0.fc1.weight").shape[0],
        settings.dropout if dropout is None else dropout,
        norm_first=settings.norm_first,
        attention_dropout=settings.attention_dropout,
        activation_dropout=settings.activation_dropout,
        positions="fairseq",
        padding_idx=padding_idx,
        share_embeddings="all" if one else "none" if untied else "decoder",
        save=save,
        device="meta",
        dtype=source.dtype,
    )
    _set_widths(model, state)
    names = _names(model)
    unknown = sorted(state.keys() - set(names.values()))
    if unknown:
        raise ValueError(f"checkpoint: expected the tensors of {arch!r}; got also {', '.join(unknown[:5])}")
    loaded = {ours: need(state, theirs) for ours, theirs in names.items()}
    for ours, parameter in model.state_dict().items():
        if loaded[ours].shape != parameter.shape:
            raise ValueError(
                f"checkpoint: {names[ours]}: expected shape {tuple(parameter.shape)}; got {tuple(loaded[ours].shape)}"
            )
    return _filled(model, loaded)


def to_fairseq(model: MacaronTransformer) -> dict[str, Tensor]:
    """The model's tensors under the names of that code: what ``from_fairseq`` reads, and it too.

    Raises:
        TypeError: not a ``MacaronTransformer``.
        ValueError: one with other positions than that code has.
    """
    if not isinstance(model, MacaronTransformer):
        raise TypeError(f"model: expected a MacaronTransformer; got {type(model).__name__}")
    if model.src_embedding.kind != "fairseq":
        raise ValueError(f"model: expected positions 'fairseq'; got {model.src_embedding.kind!r}")
    state = model.state_dict()
    renamed = {theirs: state[ours] for ours, theirs in _names(model).items()}
    for stack in ("encoder", "decoder"):
        renamed[f"{stack}.version"] = torch.tensor([2.0])
        renamed[f"{stack}.embed_positions._float_tensor"] = torch.zeros(1)
    return renamed


def read_checkpoint(path: str | os.PathLike) -> Mapping[str, Tensor]:
    if os.fspath(path).endswith(".safetensors"):
        from safetensors.torch import load_file

        return load_file(path)
    with torch.serialization.safe_globals([argparse.Namespace]):  # fairseq keeps its arguments beside the model
        found = torch.load(path, map_location="cpu", weights_only=True)
    return found.get("model", found)


def _upgraded(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without what are no parameters; the decoder's norms under their newer names."""
    upgraded = {}
    for name, tensor in state.items():
        stack, _, rest = name.partition(".")
        if rest == "version" and tensor.item() < 2:
            raise ValueError(
                f"checkpoint: expected {name} 2 or later, with a norm after the stack; got {tensor.item()}"
            )
        if rest in NO_PARAMETERS:
            continue
        if stack == "decoder":
            for old, new in _OLD_DECODER.items():
                name = name.replace(old, new)
        upgraded[name] = tensor
    return upgraded


def layer_count(state: Mapping[str, Tensor], stack: str) -> int:
    numbers = {int(name.split(".")[2]) for name in state if name.startswith(f"{stack}.layers.")}
    if numbers != set(range(len(numbers))) or not numbers:
        raise ValueError(f"checkpoint: expected layers of the {stack} from 0 on; got {sorted(numbers)}")
    return len(numbers)


def need(state: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in state:
        raise ValueError(f"checkpoint: expected a tensor {name}; there is none")
    return state[name]


def _set_widths(model: MacaronTransformer, state: Mapping[str, Tensor]) -> None:
    """The encoder's FFNs, and the decoder's first ones, may be wider or narrower than the decoder's second ones."""
    hidden = need(state, "encoder.layers.0.fc1.weight").shape[0]
    pairs = [("macaron_linear1", "macaron_linear2")]
    for stack, names in ((model.encoder, [*pairs, ("linear1", "linear2")]), (model.decoder, pairs)):
        for layer in stack.layers:
            for first, second in names:
                width, like = getattr(layer, first).in_features, getattr(layer, first).weight
                factory = {"device": like.device, "dtype": like.dtype}
                setattr(layer, first, nn.Linear(width, hidden, **factory))
                setattr(layer, second, nn.Linear(hidden, width, **factory))


def _names(model: MacaronTransformer) -> dict[str, str]:
    """Their names of our tensors."""
    names = {}
    tied = model.head.weight is model.tgt_embedding.tokens.weight
    for ours in model.state_dict():
        stack, _, rest = ours.partition(".")
        if stack in ("encoder", "decoder"):
            names[ours] = f"{stack}.{_within(rest, _ENCODER if stack == 'encoder' else _DECODER)}"
        elif stack == "head":
            names[ours] = "decoder.embed_tokens.weight" if tied else "decoder.embed_out"
        else:
            names[ours] = f"{'encoder' if stack == 'src_embedding' else 'decoder'}.embed_tokens.weight"
    return names


def encoder_name(name: str) -> str:
    """Their name of a tensor of the encoder's layers."""
    return _within(name, _ENCODER)


def _within(name: str, layer_names: Mapping[str, str]) -> str:
    if not name.startswith("layers."):
        return name.replace("norm.", "layer_norm.")
    _, number, part, rest = name.split(".", 3)
    return f"layers.{number}.{layer_names.get(part, part)}.{rest}"


def _filled(model: MacaronTransformer, tensors: Mapping[str, Tensor]) -> MacaronTransformer:
    """``model``, made on the meta device, with these tensors; parameters that are one stay one."""
    one = model.src_embedding.tokens is model.tgt_embedding.tokens
    tied = model.head.weight is model.tgt_embedding.tokens.weight
    model.load_state_dict({name: tensor.detach().clone() for name, tensor in tensors.items()}, assign=True)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    if one:
        model.tgt_embedding.tokens = model.src_embedding.tokens
    if tied:
        model.head.weight = model.tgt_embedding.tokens.weight
    return model
