"""Layers of other packages: found by name, known by their code, fused by classes that are made when first asked for.

Importing a family imports none of these packages. transformers copies a layer's code into many models under other
names: a family names the layers (``BertLayer``), the parts that a fused one reads, and the digests (:mod:`.source`) of
all this code. ``"*"`` in the name of a part's class is what the layer's own name starts with: the ``"*Attention"`` of
``RobertaLayer`` is ``RobertaAttention``.
"""

import functools
import importlib
import sys
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from macaron_ops.nn.norm import norm_arguments
from macaron_ops.nn.parts import class_name, why_not_part
from macaron_ops.ops import Substep, attend_step, ffn_step, substep

from .family import Family, why_not_activation
from .source import digest

__all__ = ["FusedLayer", "Layers", "attend_substep", "dropped", "ffn_substep", "refuse", "why_not_attention"]

# Before, layers returned tuples (4.x), or outputs were recorded by patching their forward (5.0, 5.1).
_OLDEST = (5, 2)

# With these the mask that a layer gets is None, bool (True: attend) or added to the scores.
_ATTENTIONS = ("sdpa", "eager")

# Keyword arguments of a layer by which the attention functions compute something else.
_UNSUPPORTED = ("past_key_values", "output_attentions", "is_causal", "position_bias", "softcap", "cache")


class _Part(NamedTuple):
    path: str
    parent: str
    name: str
    cls: type[nn.Module]


class FusedLayer:
    """Put before a layer class: what fused layers share. ``layers``: the family's."""

    layers: "Layers"
    parts: tuple[_Part, ...]
    save: str

    def require_unchanged(self) -> None:
        """Looks again whether the layer can be fused: a later LoRA, hook or configuration must not be skipped in
        silence.

        Raises:
            RuntimeError: it has changed since it was replaced.
        """
        reason = self.layers.changed(self, self.parts)
        if reason is not None:
            raise RuntimeError(
                f"{type(self).__name__}: {reason}. Since the layer was replaced it has changed: "
                "call macaron_ops.replace_layers(model) again, or macaron_ops.restore_layers(model)"
            )

    def ffn_step(
        self, x: Tensor, norm: nn.LayerNorm, linear1: nn.Linear, linear2: nn.Linear, activation: str, **options: object
    ) -> Tensor:
        """``a x + c drop(linear2(drop_h(act(linear1(norm(x))))))``, c = 1/2 unless ``step`` says otherwise."""
        return ffn_step(
            x,
            linear1.weight,
            linear1.bias,
            linear2.weight,
            linear2.bias,
            **norm_arguments(norm),
            activation=activation,
            save=self.save,
            **options,
        )


class Layers:
    """A family of layers of another package.

    Args:
        home: the module that holds the family; its ``__getattr__`` has to be this object's ``attribute``.
        suffix: the end of the layers' names; what stands before it is ``"*"``.
        layers: the names of the layers, and the modules (below ``within``) that hold them.
        forwards: the known digests of the layers, and for each the class with the fused ``forward`` that is put before
            a layer with this code.
        parts: the submodules that the fused layer reads, parents first, and what they have to be: a class, or the name
            of one in the layer's module or, with dots, in another.
        code: the known digests of each class of ``parts`` that is named.
        activation: path of the activation, or None. gated: it is that of a gate.
        why_not: what else a layer may have that cannot be fused: a function of the layer and its parts by path.
    """

    def __init__(
        self,
        home: str,
        suffix: str,
        layers: Mapping[str, str],
        forwards: Mapping[str, type[FusedLayer]],
        parts: Mapping[str, str | type[nn.Module]],
        code: Mapping[str, tuple[str, ...]],
        *,
        activation: str | None = None,
        gated: bool = False,
        why_not: Callable[[nn.Module, Mapping[str, nn.Module]], str | None] = lambda layer, found: None,
        within: str = "transformers.models",
    ):
        self.home, self.suffix, self.forwards, self.parts, self.code = home, suffix, forwards, parts, code
        self.modules = {name: f"{within}.{module}".lstrip(".") for name, module in layers.items()}
        self.package = next(iter(self.modules.values())).partition(".")[0]
        self.activation_parent, _, self.activation_name = (activation or "").rpartition(".")
        self.gated, self.why_not = gated, why_not

    def family(self, name: str) -> Family:
        """What ``replace_layers`` asks."""
        layers = tuple(f"{module}.{cls}" for cls, module in self.modules.items())
        return Family(name, layers, self.fused, self.why_not_layer)

    def fused(self, original: type[nn.Module]) -> type[nn.Module] | None:
        """The class that takes the place of ``original``; None where its code is not known."""
        if digest(original) not in self.forwards:
            return None
        return getattr(importlib.import_module(self.home), f"Fused{original.__name__}")

    def attribute(self, name: str) -> type[nn.Module]:
        """The fused class of this name, made now; pickling asks for it, too.

        Raises:
            AttributeError: there is none, or the code of the class below it is not known.
        """
        source = self.modules.get(name.removeprefix("Fused")) if name.startswith("Fused") else None
        if source is None:
            raise AttributeError(f"module {self.home!r} has no attribute {name!r}")
        original = getattr(importlib.import_module(source), name.removeprefix("Fused"))
        mixin = self.forwards.get(digest(original))
        if mixin is None:
            raise AttributeError(f"{self.home}.{name}: {self._why_unknown(original)}")
        body = {
            "__module__": self.home,
            "__doc__": f"{class_name(original)} with fused substeps.",
            "layers": self,
            "parts": self._parts(original),
        }
        return vars(sys.modules[self.home]).setdefault(name, type(name, (mixin, original), body))

    def why_not_layer(self, layer: nn.Module) -> str | None:
        """Why a layer cannot be replaced, or None: its code, its parts' code, then what they are now."""
        if self.package == "transformers" and _version("transformers") < _OLDEST:
            oldest = ".".join(map(str, _OLDEST))
            return f"transformers {sys.modules['transformers'].__version__}: the layers of {oldest} and later are known"
        original = layer.__dict__.get("replaced_class", type(layer))
        if digest(original) not in self.forwards:
            return self._why_unknown(original)
        for name, digests in self.code.items():
            cls = _named(original, self.suffix, name)
            if cls is None:
                return f"{original.__module__} has no {name.replace('*', _prefix(original, self.suffix))}"
            if digest(cls) not in digests:
                return self._why_unknown(cls)
        return self.changed(layer, self.fused(original).parts)

    def changed(self, layer: nn.Module, parts: tuple[_Part, ...]) -> str | None:
        """Why the layer as it is now cannot run fused, or None; asked before each run."""
        found = {"": layer}
        for path, parent, name, cls in parts:
            part = found[path] = found[parent]._modules.get(name)
            reason = why_not_part(path, part, cls)
            if reason is not None:
                return reason
        reason = self.why_not(layer, found)
        if reason is None and self.activation_name:
            activation = getattr(found[self.activation_parent], self.activation_name)
            reason = why_not_activation("activation", activation, gated=self.gated)
        return reason

    def _why_unknown(self, cls: type) -> str:
        version = getattr(sys.modules.get(self.package), "__version__", "(of unknown version)")
        return f"the code of {cls.__name__} in {self.package} {version} is not one that is known"

    def _parts(self, original: type[nn.Module]) -> tuple[_Part, ...]:
        classes = (c if isinstance(c, type) else _named(original, self.suffix, c) for c in self.parts.values())
        return tuple(_Part(path, *path.rpartition(".")[::2], c) for path, c in zip(self.parts, classes, strict=True))


def _version(package: str) -> tuple[int, int]:
    return tuple(map(int, sys.modules[package].__version__.split(".")[:2]))


def why_not_attention(config: object) -> str | None:
    """Why the masks of an attention are not known, or None."""
    attention = config._attn_implementation
    if attention is not None and attention not in _ATTENTIONS:
        return f"attn_implementation {attention!r}: the masks of {' and '.join(map(repr, _ATTENTIONS))} are known"
    return None


def refuse(mask: object, output_attentions: bool | None, **kwargs: object) -> None:
    """Refuse a call of a layer with fused attention that asks for more. ``output_attentions``: the configuration's.

    Raises:
        ValueError: attention weights, a cache, or another attention.
        TypeError: a mask that is no tensor.
    """
    for name in _UNSUPPORTED:
        value = kwargs.get(name)
        if name == "output_attentions" and value is None:
            value = output_attentions
        if value is not None and value is not False:
            raise ValueError(
                f"{name}: expected None or False, for a fused layer keeps no attention weights and no cache; got "
                f"{value if isinstance(value, bool) else type(value).__name__}. "
                "macaron_ops.restore_layers(model) brings the layers back that do"
            )
    if mask is not None and not isinstance(mask, Tensor):
        raise TypeError(f"attention_mask: expected a tensor of 4 dimensions or None; got {type(mask).__name__}")


def attend_substep(
    q: nn.Linear, k: nn.Linear, v: nn.Linear, out: nn.Linear, num_heads: int, mask: Tensor | None, **options: object
) -> Substep:
    """The attention step on these parameters. A bool mask of transformers says where to attend, the operator's where
    not to."""
    return substep(
        attend_step,
        (q.weight, k.weight, v.weight),
        (q.bias, k.bias, v.bias),
        out.weight,
        out.bias,
        num_heads,
        attn_mask=~mask if mask is not None and mask.dtype == torch.bool else mask,
        **options,
    )


def ffn_substep(
    linear1: nn.Linear, linear2: nn.Linear, activation: str, *, step: float = 1.0, **options: object
) -> Substep:
    """The FFN step on these parameters."""
    linears = (linear1.weight, linear1.bias, linear2.weight, linear2.bias)
    return substep(ffn_step, *linears, activation=activation, step=step, **options)


def dropped(dropout: nn.Dropout | float, training: bool) -> float:
    """The probability with which a dropout, a module or a number of a module in this mode, drops now."""
    if isinstance(dropout, nn.Module):
        return dropout.p if dropout.training else 0.0
    return float(dropout) if training else 0.0


def _prefix(original: type, suffix: str) -> str:
    return original.__name__.removesuffix(suffix)


@functools.cache
def _named(original: type, suffix: str, name: str) -> type | None:
    """The class of this name beside ``original``; with dots, that of this module."""
    module, _, name = name.replace("*", _prefix(original, suffix)).rpartition(".")
    try:
        return getattr(importlib.import_module(module or original.__module__), name, None)
    except ImportError:
        return None
