"""Claim: a module never skips in silence what a call of one of its submodules would do: it refuses such a submodule."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from macaron_ops.nn import (
    AttendStep,
    FFNStep,
    LieTrotterDecoderLayer,
    LieTrotterEncoderLayer,
    MacaronDecoderLayer,
    MacaronEncoderLayer,
    SplitLayer,
)
from macaron_ops.nn.parts import require_part, why_not_part

D, H, F = 8, 2, 12
MODULES = {
    "FFNStep": lambda: FFNStep(D, F),
    "AttendStep": lambda: AttendStep(D, H),
    "AttendStep of a context": lambda: AttendStep(D, H, context_dim=D),
    "SplitLayer": lambda: SplitLayer(D, H, F, scheme="parallel"),
    "LieTrotterEncoderLayer": lambda: LieTrotterEncoderLayer(D, H, F),
    "LieTrotterDecoderLayer": lambda: LieTrotterDecoderLayer(D, H, F),
    "MacaronEncoderLayer": lambda: MacaronEncoderLayer(D, H, F),
    "MacaronDecoderLayer": lambda: MacaronDecoderLayer(D, H, F),
}


def call(module: nn.Module) -> torch.Tensor:
    x = torch.randn(2, 3, D)
    two = isinstance(module, (LieTrotterDecoderLayer, MacaronDecoderLayer)) or getattr(module, "context_dim", None)
    return module(x, x) if two else module(x)


def parts(build) -> list[str]:
    """The submodules that are read: all but lists, and the steps that a SplitLayer calls."""
    held = (nn.ModuleList, FFNStep, AttendStep)
    return [name for name, m in build().named_modules() if name and not isinstance(m, held)]


@pytest.mark.parametrize("build", MODULES.values(), ids=MODULES)
def test_hooks_of_every_submodule_are_refused(build):
    registrations = (
        lambda m: m.register_forward_hook(print),
        lambda m: m.register_forward_pre_hook(print),
        lambda m: m.register_full_backward_hook(print),
        lambda m: m.register_full_backward_pre_hook(print),
    )
    names = parts(build)
    assert len(names) >= 3
    for name in names:
        for register in registrations:
            module = build()
            handle = register(module.get_submodule(name))
            with pytest.raises(RuntimeError, match="has a hook, print, which would be skipped"):
                call(module)
            handle.remove()
            call(module)


@pytest.mark.parametrize("build", MODULES.values(), ids=MODULES)
def test_subclasses_and_patched_forwards_of_every_submodule_are_refused(build):
    for name in parts(build):
        module = build()
        part = module.get_submodule(name)
        part.forward = part.forward
        with pytest.raises(RuntimeError, match="has a forward of its own, which would be skipped"):
            call(module)
        del part.forward
        part.__class__ = type("Other", (type(part),), {"forward": lambda self, *args: args[0]})
        with pytest.raises(TypeError, match="expected torch.nn.*; got tests.nn.test_parts.Other"):
            call(module)


def test_reparametrisations():
    """What a hook computes is refused, what a read computes is used."""
    for reparametrise in (
        lambda m: prune.l1_unstructured(m, "weight", 0.5),
        lambda m: nn.utils.spectral_norm(m),
    ):
        layer = LieTrotterEncoderLayer(D, H, F)
        reparametrise(layer.linear1)
        with pytest.raises(RuntimeError, match="linear1 has a hook, (L1Unstructured|SpectralNorm),"):
            call(layer)
    prune.remove(prune.l1_unstructured(nn.Linear(2, 2), "weight", 0.5), "weight")
    layer = LieTrotterEncoderLayer(D, H, F)
    parametrizations.weight_norm(layer.linear1)
    call(layer).sum().backward()
    assert layer.linear1.parametrizations.weight.original0.grad is not None


def test_the_messages_tell_classes_of_one_name_apart():
    other = type("Linear", (nn.Linear,), {"__module__": "elsewhere"})(2, 2)
    with pytest.raises(TypeError, match="w: expected torch.nn.Linear; got elsewhere.Linear. A fused layer reads"):
        require_part("w", other, nn.Linear)
    assert why_not_part("w", other, nn.Linear) == "w is a elsewhere.Linear, not torch.nn.Linear itself"
    assert why_not_part("w", None, nn.Linear) == "w is a builtins.NoneType, not torch.nn.Linear itself"
    parametrizations.weight_norm(other)
    assert why_not_part("w", other, nn.Linear).startswith("w is a ")
    assert why_not_part("w", parametrizations.weight_norm(nn.Linear(2, 2)), nn.Linear) is None
