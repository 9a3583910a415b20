"""The submodules of a fused layer are read, not called.

A fused layer takes the parameters and the settings of a submodule, and its ``forward`` never runs. It may therefore
stand in only for submodules whose call is nothing but their class's forward. Refused are other classes (LoRA,
quantisation, adapters), a patched ``forward``, and hooks: observers, and the reparametrisations that are hooks
(``torch.nn.utils.prune``, the old ``weight_norm`` and ``spectral_norm``). ``torch.nn.utils.parametrize`` works: it
computes the parameter when it is read.
"""

from itertools import chain

from torch import nn
from torch.nn.utils.parametrize import is_parametrized, type_before_parametrizations

__all__ = ["class_name", "has_call_of_its_own", "require_part", "why_not_part"]

# transformers' hooks that record hidden states and attentions. They do nothing until a call asks for those.
_RECORDING = "transformers.utils.output_capturing"

_REMEDY = "A fused layer reads its submodules and does not call them; macaron_ops.restore_layers undoes a replacement"


def class_name(cls: type) -> str:
    """``"module.Class"``; torch's modules as they are imported, ``"torch.nn.Linear"``."""
    module = "torch.nn" if getattr(nn, cls.__name__, None) is cls else cls.__module__
    return f"{module}.{cls.__qualname__}"


def why_not_part(name: str, part: object, *kinds: type[nn.Module]) -> str | None:
    """Why the submodule ``part``, of one of these classes, has to be called, not read; or None."""
    if not _is_one_of(part, kinds):
        return f"{name} is a {class_name(type(part))}, not {_names(kinds)} itself"
    return _why_called(name, part)


def require_part(name: str, part: object, *kinds: type[nn.Module]) -> None:
    """Refuse a submodule that has to be called.

    Raises:
        TypeError: it has another class.
        RuntimeError: it has a hook or a ``forward`` of its own.
    """
    if not _is_one_of(part, kinds):
        raise TypeError(f"{name}: expected {_names(kinds)}; got {class_name(type(part))}. {_REMEDY}")
    reason = _why_called(name, part)
    if reason is not None:
        raise RuntimeError(f"{reason}. {_REMEDY}")


def has_call_of_its_own(part: nn.Module) -> bool:
    """Whether a call does more than the class's forward."""
    return _why_called("", part) is not None


def _why_called(name: str, part: nn.Module) -> str | None:
    if "forward" in part.__dict__:
        return f"{name} has a forward of its own, which would be skipped"
    if part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks:
        hooks = (part._forward_hooks, part._forward_pre_hooks, part._backward_hooks, part._backward_pre_hooks)
        for hook in chain.from_iterable(h.values() for h in hooks):
            if getattr(hook, "__module__", None) != _RECORDING:
                called = getattr(hook, "__qualname__", type(hook).__qualname__)
                return f"{name} has a hook, {called}, which would be skipped"
    return None


def _is_one_of(part: object, kinds: tuple[type[nn.Module], ...]) -> bool:
    """Exactly: a subclass may have another forward. ``parametrize`` derives a class that has not."""
    if type(part) in kinds:
        return True
    return isinstance(part, nn.Module) and is_parametrized(part) and type_before_parametrizations(part) in kinds


def _names(kinds: tuple[type[nn.Module], ...]) -> str:
    return " or ".join(map(class_name, kinds))
