"""Calls of the operators as data: how each tensor is drawn and lies in memory, which are trained, in which dtypes.

``check(call)`` runs one on the native backend (or another), as its eager twin, and as the definition in float64, and
holds it to the tolerance rule. A call is printed as Python that makes it again.
"""

import contextlib
import zlib
from dataclasses import dataclass, field, fields

import torch
import torch.nn.functional as F
from torch import Tensor

import macaron_ops
from tests import twins
from tests.rule import assert_draws_by_rule

__all__ = ["DTYPES", "LAYOUTS", "Call", "Drawn", "check", "lay", "run", "values"]

LAYOUTS = ("contiguous", "transposed", "swapped", "every other", "inside", "expanded")
# The dtypes of (x, the operands of products, the parameters that multiply or are added).
DTYPES = {
    "float32": (torch.float32, torch.float32, torch.float32),
    "bfloat16": (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    "bfloat16, float32 scales": (torch.bfloat16, torch.bfloat16, torch.float32),
    "autocast": (torch.float32, torch.float32, torch.float32),
    "autocast, bfloat16 operands": (torch.float32, torch.bfloat16, torch.float32),
}
ROLES = ("x", "operand", "scale")
CONSTANTS = ("cos", "sin")  # the operators refuse them where they require a gradient


class _Short:
    def __repr__(self):
        """Without what is as by default."""
        said = [(f.name, getattr(self, f.name)) for f in fields(self) if getattr(self, f.name) != f.default]
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in said)})"

    def _repr_pretty_(self, printer, cycle):
        """As hypothesis prints it."""
        printer.text(repr(self))


@dataclass(frozen=True, repr=False)
class Drawn(_Short):
    """A tensor: ``kind`` is the distribution of its elements, ``role`` says which of ``DTYPES`` it has."""

    shape: tuple[int, ...]
    # fan: normal / sqrt(columns); unit: rows of length 1; cap: these around the first axis, so that no mean of them is
    # short; positive; bias: normal and -inf; blocked
    kind: str = "normal"
    role: str = "operand"
    layout: str = "contiguous"
    trained: bool = True
    scale: float = 1.0
    shift: float = 0.0


@dataclass(frozen=True, repr=False)
class Call(_Short):
    """An operator's call: ``tensors`` by the reference's names (packed: ``w_qkv``), ``options`` by keyword."""

    operator: str
    tensors: dict[str, Drawn]
    options: dict = field(default_factory=dict)
    dtypes: str = "float32"
    save: str = "fast"
    grad: str = "contiguous"  # the layout of the incoming gradient
    tails: bool = True  # normal numbers; else uniform ones of the same variance


# -- tensors ---------------------------------------------------------------------------------------------------------


def values(call: Call, seed: int) -> dict[str, Tensor]:
    """The elements of all tensors, and of the incoming gradient as ``grad``: float64, exact in the call's dtypes."""
    narrow = call.dtypes != "float32"
    drawn = {**call.tensors, "grad": Drawn(call.tensors["x"].shape, role="x", layout=call.grad)}
    found = {}
    for name, t in drawn.items():
        # A stream for each name: leaving out one tensor leaves the others as they are.
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + 1_000_003 * seed)
        if call.tails or t.kind in ("unit", "cap"):
            v = torch.randn(t.shape, dtype=torch.float64, generator=generator)
        else:
            v = (2 * torch.rand(t.shape, dtype=torch.float64, generator=generator) - 1) * 3**0.5
        hidden = torch.rand(t.shape, generator=generator) < 0.3
        if t.kind == "fan":
            v = v / max(t.shape[-1], 1) ** 0.5
        elif t.kind == "unit":
            v = F.normalize(v, dim=-1)
        elif t.kind == "cap":
            v[..., 0] += 4.0
            v = F.normalize(v, dim=-1)
        elif t.kind == "positive":
            v = v.abs() + 0.1
        elif t.kind == "bias":
            v = v.masked_fill(hidden, -torch.inf)
        elif t.kind == "blocked":
            v = hidden
        if t.layout == "expanded" and v.dim() > 0:
            v = v[:1].expand(v.shape)
        if v.dtype != torch.bool:
            wide = t.role != "operand" if call.dtypes.startswith("autocast") else not narrow
            v = (v * t.scale + t.shift).to(torch.float32 if wide else torch.bfloat16).double()
        found[name] = v
    return found


def lay(value: Tensor, layout: str) -> Tensor:
    """``value`` in other strides; what lies between its elements is NaN (True of a boolean mask)."""
    if value.dim() == 0 or layout == "contiguous":
        return value.contiguous()
    other = torch.nan if value.is_floating_point() else 1
    if layout == "transposed" and value.dim() > 1:  # as W.T of a Conv1D's weight
        return value.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "swapped" and value.dim() > 1:  # the first dimensions, as of tokens before batch
        return value.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "every other":
        view = value.new_full((*value.shape[:-1], 2 * value.shape[-1]), other)[..., ::2]
        return view.copy_(value)
    if layout == "inside":  # rows of a wider matrix, no pointer aligned
        view = value.new_full((*value.shape[:-1], value.shape[-1] + 4), other)[..., 1:-3]
        return view.copy_(value)
    if layout == "expanded" and value.shape[0] > 0:
        return value[:1].clone().expand(value.shape)
    return value.contiguous()


def _place(call: Call, found: dict[str, Tensor], dtypes, layouts: bool, device) -> dict[str, Tensor]:
    placed = {}
    for name, value in found.items():
        t = call.tensors.get(name, Drawn((), role="x", layout=call.grad, trained=False))
        if value.is_floating_point():
            value = value.to(dtypes[ROLES.index(t.role)])
        value = value.to(device)
        value = lay(value, t.layout) if layouts else value.clone()
        if t.trained and value.is_floating_point() and name not in CONSTANTS:
            value = value.detach().requires_grad_()
        placed[name] = value
    return placed


# -- calls -----------------------------------------------------------------------------------------------------------


def _arguments(call: Call, t: dict[str, Tensor]) -> tuple[tuple, dict]:
    def triple(stem):
        given = [t.get(f"{stem}_{i}") for i in "qkv"]
        return None if given == [None] * 3 else tuple(given)

    kwargs = dict(call.options)
    args = [t["x"]]
    if call.operator == "ffn_step":
        args += [t["w_in"], t.get("b_in"), t["w_out"], t.get("b_out")]
        names = ("norm_weight", "norm_bias")
    elif call.operator == "attend_step":
        packed = "w_qkv" in t
        args += [t["w_qkv"] if packed else triple("w"), t.get("b_qkv") if packed else triple("b")]
        args += [t["w_out"], t.get("b_out"), kwargs.pop("num_heads")]
        names = ("norm_weight", "norm_bias", "context", "attn_mask", "key_padding_mask", "qk_scale")
        if "cos" in t:
            kwargs["rotary"] = t["cos"], t["sin"]
        if "cu_seqlens" in kwargs:
            kwargs["cu_seqlens"] = torch.tensor(kwargs["cu_seqlens"], dtype=torch.int32, device=t["x"].device)
    elif call.operator == "normalize_step":
        args += [t["u"], t.get("step", kwargs.pop("step", None))]
        names = ()
    else:
        args += [t.get("step", kwargs.pop("step", None)), t.get("beta", kwargs.pop("beta", None))]
        names = ("query", "key", "value")
    return tuple(args), {**kwargs, **{name: t[name] for name in names if name in t}}


def _eager(call: Call, args: tuple, kwargs: dict) -> Tensor:
    """The twin; that of attention knows one dimension of sequences."""
    x, *others = args
    if call.operator == "attend_step":
        x = x.reshape(-1 if x.numel() else x.shape[:-2].numel(), *x.shape[-2:])
        shape = len(x), others[-1], x.shape[1], kwargs["context"].shape[-2] if "context" in kwargs else x.shape[1]
        rows = {
            "context": lambda c: c.reshape(len(x), *c.shape[-2:]),
            "key_padding_mask": lambda m: m.reshape(len(x), m.shape[-1]),
        }
        rows["attn_mask"] = lambda m: m.reshape(shape) if m.dim() == 3 else m
        kwargs = {name: rows[name](value) if name in rows else value for name, value in kwargs.items()}
    return getattr(twins, call.operator)(x, *others, **kwargs).reshape(args[0].shape)


def run(call: Call, found: dict[str, Tensor], backend: str, device="cpu") -> dict[str, Tensor]:
    """The output ``y`` and the gradients of what is trained, of a backend by its name, of the definition in float64
    (``exact``) or the twin in the call's dtypes (``eager``).

    The twin gets tensors without gaps: oneDNN's bf16 products on AMX (torch 2.13) read one element past a row of odd
    length, and times 0 the NaN that lies there is NaN."""
    dtypes = (torch.float64,) * 3 if backend == "exact" else DTYPES[call.dtypes]
    if backend == "eager" and call.dtypes == "bfloat16, float32 scales":
        dtypes = DTYPES["bfloat16"]  # eager products refuse mixed dtypes
    t = _place(call, found, dtypes, layouts=backend not in ("eager", "exact"), device=device)
    args, kwargs = _arguments(call, t)
    autocast = call.dtypes.startswith("autocast") and backend != "exact"
    with contextlib.ExitStack() as stack:
        if autocast:
            stack.enter_context(torch.autocast(t["x"].device.type, dtype=torch.bfloat16))
        if backend == "eager":
            y = _eager(call, args, kwargs)
        else:
            stack.enter_context(macaron_ops.use_backend("reference" if backend == "exact" else backend))
            policy = {"save": call.save} if call.operator in ("ffn_step", "attend_step") else {}
            y = getattr(macaron_ops, call.operator)(*args, **kwargs, **policy)
    leaves = {name: value for name, value in t.items() if value.requires_grad}
    grads = torch.autograd.grad(y, list(leaves.values()), t["grad"], allow_unused=True) if leaves else ()
    filled = (g if g is not None else torch.zeros_like(leaf) for g, leaf in zip(grads, leaves.values(), strict=True))
    if backend not in ("eager", "exact"):
        assert y.dtype == t["x"].dtype and y.shape == t["x"].shape
        for (name, leaf), g in zip(leaves.items(), grads, strict=True):
            assert g is not None and g.dtype == leaf.dtype and g.shape == leaf.shape, name
    return {"y": y.detach(), **{f"gradient of {name}": g for name, g in zip(leaves, filled, strict=True)}}


def check(call: Call, backend: str = "native", device="cpu") -> None:
    """The tolerance rule for the output and every gradient."""

    def draw(seed: int) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        found = values(call, seed)
        results = [run(call, found, name, device) for name in (backend, "eager", "exact")]
        return {name: tuple(result[name] for result in results) for name in results[0]}

    try:
        assert_draws_by_rule(draw)
    except AssertionError as error:
        raise AssertionError(f"{error}\n{call}") from None
