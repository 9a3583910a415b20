"""FFN modules that people describe themselves: ``register_ffn``."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from macaron_ops.nn.norm import norm_arguments
from macaron_ops.nn.parts import class_name, why_not_part
from macaron_ops.ops import ffn_step
from macaron_ops.ops.checks import choice, number

from .family import Family, activation_name, why_not_activation

__all__ = ["FAMILY", "REGISTERED", "register_ffn"]

_NORMS = (nn.LayerNorm, nn.RMSNorm)


class _Description(NamedTuple):
    """Where a module has the parts of an FFN step."""

    linear1: str
    activation: str
    linear2: str
    norm: str | None
    activation_dropout: str | None
    dropout: str | None
    step: float | str
    residual_scale: float | str
    placement: str

    def parts(self) -> Mapping[str, tuple[type[nn.Module], ...]]:
        dropouts = {path: (nn.Dropout,) for path in (self.activation_dropout, self.dropout) if path is not None}
        norm = {} if self.norm is None else {self.norm: _NORMS}
        return {self.linear1: (nn.Linear,), self.linear2: (nn.Linear,), **norm, **dropouts}


REGISTERED: dict[type[nn.Module], _Description] = {}


def register_ffn(
    cls: type[nn.Module],
    *,
    linear1: str,
    activation: str,
    linear2: str,
    norm: str | None = None,
    activation_dropout: str | None = None,
    dropout: str | None = None,
    step: float | str = 1.0,
    residual_scale: float | str = 1.0,
    placement: str = "pre",
) -> None:
    """Tells :func:`replace_layers` that modules of ``cls`` compute an FFN step of one tensor::

        pre    a x + c dropout(linear2(activation_dropout(activation(linear1(norm(x))))))
        post   norm(a x + c dropout(linear2(activation_dropout(activation(linear1(x))))))

    The description is not taken on trust: a module is replaced when all its parts are plain modules of torch and its
    own forward and the fused one agree on random parameters and inputs. Otherwise it is left, with the reason.

    Example::

        macaron_ops.register_ffn(
            HalfStep, norm="norm", linear1="up", activation="act", linear2="down", dropout="drop", step=0.5
        )
        print(macaron_ops.replace_layers(model))

    Args:
        cls: exactly this class, not those derived from it.
        linear1, linear2: paths of the ``nn.Linear`` in the module, such as ``"net.0"``.
        activation: path of a module or function in it.
        norm: path of its ``nn.LayerNorm`` or ``nn.RMSNorm``; None: it has none.
        activation_dropout, dropout: paths of its ``nn.Dropout``; one module may be both; None: it has none.
        step: c, or the name of the module's attribute that holds it.
        residual_scale: a, likewise. 0 where the module returns the update alone and its caller adds the residual.
        placement: of the norm, ``"pre"`` or ``"post"``.

    Raises:
        TypeError: ``cls`` is not a class of modules, or a path is not a string.
        ValueError: an unknown ``placement``, or a post-norm without a norm.
    """
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise TypeError(f"cls: expected a class of modules; got {cls!r}")
    required = {"linear1": linear1, "activation": activation, "linear2": linear2}
    optional = {"norm": norm, "activation_dropout": activation_dropout, "dropout": dropout}
    for name, path in {**required, **optional}.items():
        if not (isinstance(path, str) or (path is None and name in optional)):
            raise TypeError(f"{name}: expected the path of a submodule; got {path!r}")
    for name, value in {"step": step, "residual_scale": residual_scale}.items():
        if not isinstance(value, str):
            number(name, value)
    choice("placement", placement, ("pre", "post"))
    if placement == "post" and norm is None:
        raise ValueError("placement: expected 'pre' where norm is None; got 'post'")
    REGISTERED[cls] = _Description(
        linear1, activation, linear2, norm, activation_dropout, dropout, step, residual_scale, placement
    )
    globals().pop(_name(cls), None)


class _FusedFFN:
    def forward(self, x: Tensor) -> Tensor:
        reason = _changed(self)
        if reason is not None:
            raise RuntimeError(
                f"{type(self).__name__}: {reason}. Since the module was replaced it has changed: "
                "call macaron_ops.replace_layers(model) again, or macaron_ops.restore_layers(model)"
            )
        d = self.description
        linear1, linear2 = _get(self, d.linear1), _get(self, d.linear2)
        return ffn_step(
            x,
            linear1.weight,
            linear1.bias,
            linear2.weight,
            linear2.bias,
            **({"norm": None} if d.norm is None else norm_arguments(_get(self, d.norm), d.norm)),
            activation=activation_name(_get(self, d.activation)),
            step=_number(self, d.step),
            residual_scale=_number(self, d.residual_scale),
            placement=d.placement,
            dropout=_dropped(self, d.dropout),
            activation_dropout=_dropped(self, d.activation_dropout),
            save=self.save,
        )


def _get(module: nn.Module, path: str) -> object:
    """The submodule or attribute at ``path``; None where there is none."""
    for name in path.split("."):
        module = getattr(module, name, None)
    return module


def _number(module: nn.Module, value: float | str) -> float:
    return float(_get(module, value)) if isinstance(value, str) else value


def _dropped(module: nn.Module, path: str | None) -> float:
    dropout = None if path is None else _get(module, path)
    return dropout.p if dropout is not None and dropout.training else 0.0


def _changed(layer: nn.Module) -> str | None:
    """Why a module is not what its description says, or None; asked before each run."""
    description = REGISTERED[type(layer).registered if isinstance(layer, _FusedFFN) else type(layer)]
    for path, kinds in description.parts().items():
        reason = why_not_part(path, _get(layer, path), *kinds)
        if reason is not None:
            return reason
    return why_not_activation(description.activation, _get(layer, description.activation))


def _why_not(layer: nn.Module) -> str | None:
    reason = _changed(layer)
    if reason is not None:
        return reason
    original = layer.__dict__.get("replaced_class", type(layer))
    described = {path for path in REGISTERED[original].parts()}
    for path, module in layer.named_modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) and path not in described:
            return f"{path} is a {type(module).__name__} that its description does not name"
    return None if type(layer) is not original else _try(layer, original)


def _try(layer: nn.Module, original: type[nn.Module]) -> str | None:
    """Why the fused module does not compute what the original one computes, or None; on random numbers, without
    dropout."""
    width = _get(layer, REGISTERED[original].linear1).in_features
    device = next(layer.parameters()).device
    if device.type == "meta":
        return "its parameters are on the meta device, where a description cannot be tried"
    generator = torch.Generator().manual_seed(0)
    numbers = {
        name: (torch.randn(t.shape, generator=generator) / math.sqrt(max(t.shape[-1:], default=1))).to(device)
        for name, t in layer.named_parameters()
    }
    x = torch.randn(2, 3, width, generator=generator).to(device)
    training = [module for module in layer.modules() if module.training]
    layer.eval()
    results = []
    try:
        for cls in (original, fused(original)):
            layer.__class__ = cls
            layer.__dict__["save"] = "fast"
            with torch.no_grad(), torch.autocast(device.type, enabled=False):
                results.append(functional_call(layer, numbers, (x,)))
    except Exception as error:
        return f"its forward cannot be tried on a tensor of shape {tuple(x.shape)}: {type(error).__name__}: {error}"
    finally:
        layer.__class__ = original
        layer.__dict__.pop("save", None)
        for module in training:
            module.training = True
    expected, actual = results
    if not isinstance(expected, Tensor) or expected.shape != actual.shape:
        return f"its forward does not return a tensor of shape {tuple(actual.shape)}"
    error = ((actual - expected).abs().max() / expected.abs().max()).item()
    if not error <= torch.finfo(torch.float32).eps ** 0.5:
        return f"its forward computes something else than its description: they differ by {error:.1g} of the largest"
    return None


def fused(original: type[nn.Module]) -> type[nn.Module]:
    """The class that takes the place of a registered one."""
    name = _name(original)
    if getattr(globals().get(name), "registered", None) is not original:
        body = {
            "__module__": __name__,
            "__doc__": f"{class_name(original)} as one fused operator.",
            "description": REGISTERED[original],
            "registered": original,
        }
        globals()[name] = type(name, (_FusedFFN, original), body)
    return globals()[name]


def _name(cls: type) -> str:
    """In this module, where pickling finds the fused class of a class that is registered."""
    return f"Fused_{class_name(cls)}".replace(".", "_").replace("<locals>", "")


def __getattr__(name: str) -> type[nn.Module]:
    for cls in REGISTERED:
        if _name(cls) == name:
            return fused(cls)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


FAMILY = Family("registered", (), fused, _why_not)
