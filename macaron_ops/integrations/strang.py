"""``to_strang``: a standard model's FFNs cut in two, one half before the attention and one after it.

    Lie-Trotter    x = x + A(N x),   x = x + B(N x)
    Strang         x = x + 1/2 B'(N x),   x = x + A(N x),   x = x + 1/2 B''(N x)

with ``B = (B' + B'') / 2``: half of the hidden units each, the second matrix doubled, the whole bias in both. All
numbers come from the model. The result is another function, close to the first where the sublayers' updates are small
(the two differ in second order of them): a start for fine-tuning, not a drop-in.
"""

import torch
from torch import nn

from macaron_ops.nn import LieTrotterDecoderLayer, LieTrotterEncoderLayer, MacaronDecoderLayer, MacaronEncoderLayer
from macaron_ops.ops.checks import choice

from .report import Left, Replaced, Report
from .torch_transformer import FAMILY

__all__ = ["to_strang"]

_MACARON = {
    nn.TransformerEncoderLayer: MacaronEncoderLayer,
    LieTrotterEncoderLayer: MacaronEncoderLayer,
    nn.TransformerDecoderLayer: MacaronDecoderLayer,
    LieTrotterDecoderLayer: MacaronDecoderLayer,
}


def to_strang(model: nn.Module, split: str = "half", *, save: str = "fast") -> Report:
    """Puts a Macaron layer in the place of each ``nn.TransformerEncoderLayer`` and ``nn.TransformerDecoderLayer``.

    This changes the function, the modules, the parameters' names and their number (each layer has one norm and one bias
    more). Attention, norms and hidden units are the model's own: the first half of an FFN's units goes before the
    attention, with a copy of the FFN's norm. Make the optimiser afterwards.

    Args:
        model: changed in place; not itself a layer.
        split: ``"half"``: of the hidden units, each to one FFN.
        save: memory policy of the layers.

    Returns:
        What was replaced, what was left and why.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: an unknown ``split``, or a model that is itself a layer.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module; got {type(model).__name__}")
    choice("split", split, ("half",))
    if type(model) in _MACARON:
        raise ValueError("model: expected one that holds layers; got a layer, which has no place to be replaced in")
    report = Report("split")
    for name, layer in list(model.named_modules()):
        if type(layer) not in _MACARON:
            continue
        cls, hidden = type(layer).__name__, layer.linear1.out_features
        reason = FAMILY.why_not(layer) or (f"{hidden} hidden units cannot be halved" if hidden % 2 else None)
        if reason is not None:
            report.left.append(Left(name, cls, reason))
            continue
        parent, _, attribute = name.rpartition(".")
        macaron = _split(layer, save)
        setattr(model.get_submodule(parent), attribute, macaron)
        report.replaced.append(Replaced(name, cls, type(macaron).__name__))
    return report


def _split(layer: nn.Module, save: str) -> nn.Module:
    attention, weight = layer.self_attn, layer.linear1.weight
    macaron = _MACARON[type(layer)](
        attention.embed_dim,
        attention.num_heads,
        layer.linear1.out_features,
        layer.dropout1.p,
        layer.activation,
        layer.norm1.eps,
        attention.batch_first,
        layer.norm_first,
        layer.linear1.bias is not None,
        device=weight.device,
        dtype=weight.dtype,
        attention_dropout=attention.dropout,
        activation_dropout=layer.dropout.p,
        save=save,
    )
    norms = ["norm1", "norm2", *(["norm3"] if macaron.has_context else [])]
    for name in ("self_attn", *norms, *(["multihead_attn"] if macaron.has_context else [])):
        setattr(macaron, name, getattr(layer, name))
    macaron.macaron_norm.load_state_dict(getattr(layer, norms[-1]).state_dict())
    with torch.no_grad():
        halves = zip(layer.linear1.weight.chunk(2), layer.linear2.weight.chunk(2, dim=1), strict=True)
        for (w_in, w_out), prefix in zip(halves, ("macaron_", ""), strict=True):
            getattr(macaron, f"{prefix}linear1").weight.copy_(w_in)
            getattr(macaron, f"{prefix}linear2").weight.copy_(2 * w_out)
        if layer.linear1.bias is not None:
            for b_in, prefix in zip(layer.linear1.bias.chunk(2), ("macaron_", ""), strict=True):
                getattr(macaron, f"{prefix}linear1").bias.copy_(b_in)
                getattr(macaron, f"{prefix}linear2").bias.copy_(layer.linear2.bias)
    return macaron.train(layer.training)
