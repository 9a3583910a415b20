"""A call's signature: every fact that its checks, the choice of its backend and the kernels' launchers look at.

Two calls with the same signature differ in the numbers inside their tensors and in where these lie, and in nothing
else; what was decided for one holds for the other. A call that has something else among its arguments, or is made where
torch wants to see its operators one by one, has no signature and is decided anew.
"""

from collections.abc import Hashable
from types import FunctionType, NoneType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from .autocast import autocast_of
from .dispatch import asked_for

__all__ = ["Signed", "is_plain_eager", "sign"]

_SCALARS = frozenset((bool, int, float, str, NoneType))


class Signed(NamedTuple):
    """A call's signature, and its tensors in the order in which they stand there."""

    key: Hashable
    tensors: list[Tensor]


def is_plain_eager() -> bool:
    """Whether nothing looks on: no compiler, no tracer, no mode, no transform, no forward-mode differentiation."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._is_tracing()
        or forward_ad._current_level >= 0
    )


def sign(what: Hashable, *values: Any) -> Signed | None:
    """The signature of calling ``what`` with ``values``; None where a call has none.

    ``values`` may be tensors, numbers, names, None, operators, and lists, tuples and dicts of them. What has no memory
    of its own (fake, functional, meta and sparse tensors, views to be negated) and subclasses are not signed. To ask
    a copy-on-write tensor for its place copies it, once: to look for one first would cost every call 0.1 us a tensor.
    """
    if not is_plain_eager():
        return None
    key: list[Hashable] = [what]
    tensors: list[Tensor] = []
    waiting = list(values)
    try:
        for value in waiting:  # what stands in a container is appended, and so comes after what stands beside it
            kind = type(value)
            if kind is Tensor or kind is Parameter:
                address = value.data_ptr()
                if (address == 0 and value.numel() > 0) or value.is_neg():
                    return None
                key += (
                    value.shape,
                    value.dtype,
                    value.device,
                    value.requires_grad,
                    value.is_contiguous() or value.stride(),
                    address % 16,
                )
                tensors.append(value)
            elif kind in _SCALARS:
                key += (kind, value)  # the kind, because 1 == 1.0 == True
            elif kind is dict:
                key += (kind, len(value), *value)
                waiting += value.values()
            elif isinstance(value, (tuple, list)):
                key += (kind, len(value))
                waiting += value
            elif kind is FunctionType and hasattr(value, "bind"):
                key.append(value)
            else:
                return None
    except RuntimeError:  # a nested tensor has no shape, a sparse one no address
        return None
    if not tensors:
        return None
    identities = list(map(id, tensors))
    if len(set(identities)) < len(tensors):  # a tensor that stands in two places is one input
        key.append(tuple(map(identities.index, identities)))
    key += (torch.is_grad_enabled(), asked_for(), autocast_of(tensors[0].device.type))
    return Signed(tuple(key), tensors)
