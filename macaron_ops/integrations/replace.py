"""``replace_layers`` and ``restore_layers``: a layer becomes a fused one by changing its class.

``layer.__class__ = Fused``, where ``Fused`` is a subclass of the layer's own class with another ``forward``. The
module object stays, and with it its parameters, their names and their order, hooks, optimisers, checkpoints,
``isinstance``, ``copy.deepcopy`` and pickling.
"""

import sys
from collections.abc import Iterable

from torch import nn

from macaron_ops.nn.parts import class_name
from macaron_ops.ops.checks import choice
from macaron_ops.ops.run import SAVE

from . import (
    bert,
    conformer,
    distilbert,
    espnet_conformer,
    fast_conformer,
    gemma_audio,
    gpt2,
    llama,
    lucidrains_conformer,
    nemo_conformer,
    registered,
    speech_conformer,
    speechbrain_conformer,
    torch_transformer,
    torchaudio_conformer,
    unfused,
    vit,
    whisper,
    x_transformers_ffn,
)
from .family import Family, why_not_weights
from .report import Left, Replaced, Report

__all__ = ["FAMILIES", "known_layers", "replace_layers", "restore_layers"]

FAMILIES: tuple[Family, ...] = (
    torch_transformer.FAMILY,
    bert.FAMILY,
    distilbert.FAMILY,
    vit.FAMILY,
    whisper.FAMILY,
    gpt2.FAMILY,
    llama.FAMILY,
    conformer.FAMILY,
    fast_conformer.FAMILY,
    *speech_conformer.FAMILIES,
    *gemma_audio.FAMILIES,
    torchaudio_conformer.FAMILY,
    speechbrain_conformer.FAMILY,
    espnet_conformer.FAMILY,
    nemo_conformer.FAMILY,
    lucidrains_conformer.FAMILY,
    x_transformers_ffn.FAMILY,
    registered.FAMILY,
    unfused.FAMILY,
)
_FAMILY_OF = {layer: family for family in FAMILIES for layer in family.layers}

# What a replaced layer remembers, in its __dict__.
_ORIGINAL, _SAVE = "replaced_class", "save"

_ALREADY = "replaced already"
_OWN_FORWARD = "it has a forward of its own, which a change of class does not reach"


def replace_layers(
    model: nn.Module, *, save: str = "fast", families: Iterable[str] | str | None = None, strict: bool = False
) -> Report:
    """Replaces each layer of a known family in ``model`` by one that runs as one fused operator.

    The function that the model computes stays the same, and so do its parameter objects, its ``state_dict`` and its
    modes. A layer is replaced only when its class is exactly a known one and all that it does is known; every other
    layer of a known family stays, with the reason in the report. Calling twice is harmless.

    Example::

        model = transformers.AutoModel.from_pretrained(...)
        print(macaron_ops.replace_layers(model))

    Args:
        model: changed in place; it may itself be a layer.
        save: memory policy between forward and backward, as in :func:`macaron_ops.split_layer`.
        families: names of those to replace (``"torch"``, ``"bert"``, ...: the names in :data:`FAMILIES`); None: all.
        strict: where no layer is replaced, or one of a known family is left, the model is put back as it was and the
            report is an error.

    Returns:
        What was replaced, what was left and why; ``str()`` is a table.

    Raises:
        TypeError: ``model`` is not a module, or ``families`` not names.
        ValueError: an unknown ``save`` or family; with ``strict`` as said there.
    """
    _check_module(model)
    choice("save", save, SAVE)
    chosen = _choose(families)
    report = Report("replaced")
    for name, layer in model.named_modules():
        found = _find(layer, chosen)
        if found is None:
            continue
        family, original = found
        cls, reason = type(layer), _why_not(layer, family, original)
        if reason is not None:
            _restore(layer)
            report.left.append(Left(name, cls.__name__, reason))
        elif _ORIGINAL in layer.__dict__:
            layer.save = save
            report.left.append(Left(name, cls.__name__, _ALREADY))
        else:
            layer.__class__ = family.fused(cls)
            layer.__dict__.update({_ORIGINAL: cls, _SAVE: save})
            report.replaced.append(Replaced(name, cls.__name__, type(layer).__name__))
    if strict:
        _require_all(model, report)
    return report


def _require_all(model: nn.Module, report: Report) -> None:
    """What ``strict`` asks: everything that is known is fused now, and there is something."""
    already = [left for left in report.left if left.reason == _ALREADY]
    if len(report.left) > len(already) or not (report.replaced or already):
        for entry in report.replaced:
            _restore(model.get_submodule(entry.name))
        raise ValueError(f"strict: expected a model whose layers of known families are all replaced; {report}")


def restore_layers(model: nn.Module) -> Report:
    """Undoes :func:`replace_layers`: each replaced layer gets its own class back.

    Returns:
        What was restored; a replaced layer that was wrapped once more since is left, with the reason.

    Raises:
        TypeError: ``model`` is not a module.
    """
    _check_module(model)
    report = Report("restored")
    for name, layer in model.named_modules():
        if _ORIGINAL not in layer.__dict__:
            continue
        cls = type(layer)
        if _restore(layer):
            report.replaced.append(Replaced(name, cls.__name__, type(layer).__name__))
        else:
            reason = _OWN_FORWARD if "forward" in layer.__dict__ else "its class was changed since it was replaced"
            report.left.append(Left(name, cls.__name__, reason))
    return report


def known_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The layers of known families, by name, in the model's order: what :func:`replace_layers` looks at, replaced,
    replaceable or not; of nested ones the outermost.

    Raises:
        TypeError: ``model`` is not a module.
    """
    _check_module(model)
    chosen, found = _choose(None), {}
    for name, layer in model.named_modules():
        inside = any(outer == "" or name.startswith(f"{outer}.") for outer in found)
        if not inside and _find(layer, chosen) is not None:
            found[name] = layer
    return list(found.items())


def _check_module(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module; got {type(model).__name__}")


def _choose(families: Iterable[str] | str | None) -> dict[str | type, Family]:
    """The chosen families by the classes that they replace: by name, or the registered class itself."""
    known = {**_FAMILY_OF, **dict.fromkeys(registered.REGISTERED, registered.FAMILY)}
    if families is None:
        return known
    if not isinstance(families, Iterable):
        raise TypeError(f"families: expected names, a name or None; got {families!r}")
    names = [families] if isinstance(families, str) else list(families)
    there = [family.name for family in FAMILIES]
    for name in (name for name in names if name not in there):
        raise ValueError(f"families: expected names among {', '.join(map(repr, there))}; got {name!r}")
    return {layer: family for layer, family in known.items() if family.name in names}


def _find(layer: nn.Module, chosen: dict[str | type, Family]) -> tuple[Family, type[nn.Module]] | None:
    """The family of a layer and the class of that family which the layer has or is derived from."""
    for cls in type(layer).__mro__:
        if cls in chosen:
            return chosen[cls], cls
        family = chosen.get(class_name(cls))
        if family is not None and getattr(sys.modules.get(cls.__module__), cls.__name__, None) is cls:
            return family, cls
    return None


def _why_not(layer: nn.Module, family: Family, original: type[nn.Module]) -> str | None:
    cls = type(layer)
    if cls is not original:
        if cls is not family.fused(original):
            return f"a subclass of {original.__name__}, which may do something else"
        if _ORIGINAL not in layer.__dict__:
            return "fused already: it was built so"
    if "forward" in layer.__dict__:
        return _OWN_FORWARD
    return why_not_weights(layer) or family.why_not(layer)


def _restore(layer: nn.Module) -> bool:
    """Whether ``layer`` was a replaced one, and now is not."""
    original = layer.__dict__.get(_ORIGINAL)
    if original is None or "forward" in layer.__dict__:
        return False
    family = registered.FAMILY if original in registered.REGISTERED else _FAMILY_OF[class_name(original)]
    if type(layer) is not family.fused(original):
        return False
    layer.__class__ = original
    del layer.__dict__[_ORIGINAL], layer.__dict__[_SAVE]
    return True
