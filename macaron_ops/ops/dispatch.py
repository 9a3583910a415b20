"""Which backend runs a call: a table, what each backend says it cannot do, and the caller's own choice.

A backend provides an operator by a module with the operator's name and the functions ``forward`` and ``backward`` of
``macaron_ops.reference``'s module of that name. A module may add ``why_not(request) -> str | None``: the reason why it
cannot run that request. Adding a kernel is adding a file.
"""

import importlib
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import NamedTuple

import torch

__all__ = [
    "BACKENDS",
    "BackendError",
    "BackendStatus",
    "Choice",
    "Request",
    "backends",
    "choose",
    "provider",
    "use_backend",
]

OPERATORS = ("ffn_step", "attend_step", "normalize_step", "sphere_attend_step")


class BackendError(RuntimeError):
    """A backend was asked for by name and cannot do what is asked."""


class Backend(NamedTuple):
    name: str
    package: str  # holds one module per operator
    devices: tuple[str, ...] | None  # None: any
    reason: str  # why it stands where it stands in the table


# In order of preference: the first row that can run a request runs it.
BACKENDS = (
    Backend("cuda", "macaron_ops.native.cuda", ("cuda",), "hand-written CUDA C++, where it measures fastest"),
    Backend("triton", "macaron_ops.kernels", ("cuda",), "fused Triton kernels"),
    Backend("native", "macaron_ops.native.cpu", ("cpu",), "fused C++ for the CPU"),
    Backend("reference", "macaron_ops.reference", None, "plain PyTorch: the definition, runs everything"),
)
_BY_NAME = {backend.name: backend for backend in BACKENDS}


class Request(NamedTuple):
    """What a backend needs to know to accept or decline a call."""

    operator: str
    x: torch.Tensor
    tensors: tuple
    options: tuple


class Choice(NamedTuple):
    backend: str | None  # None: the backend that was asked for cannot
    rows: tuple[tuple[str, bool, str], ...]  # (backend, usable, reason)


class BackendStatus(NamedTuple):
    name: str
    usable: bool
    reason: str
    operators: tuple[str, ...]


def _brings(backend: Backend) -> tuple[str, ...]:
    def has(operator: str) -> bool:
        try:
            return importlib.util.find_spec(f"{backend.package}.{operator}") is not None
        except ModuleNotFoundError:  # the package itself is not there
            return False

    return tuple(operator for operator in OPERATORS if has(operator))


# Looked up once, and kept in plain dictionaries: torch.compile traces through this module.
OPERATORS_OF = {backend.name: _brings(backend) for backend in BACKENDS}
_MODULES: dict[tuple[str, str], ModuleType] = {}
_HAS_TRITON = importlib.util.find_spec("triton") is not None


def provider(backend: str, operator: str) -> ModuleType:
    """The backend's module of an operator, imported when it is first needed."""
    module = _MODULES.get((backend, operator))
    if module is None:
        module = importlib.import_module(f"{_BY_NAME[backend].package}.{operator}")
        _MODULES[backend, operator] = module
    return module


for _operator in OPERATORS_OF["reference"]:
    provider("reference", _operator)


def _missing(row: Backend) -> str | None:
    """Why a backend cannot run anything in this installation."""
    if not OPERATORS_OF[row.name]:
        return f"this installation has no operator for it (nothing in {row.package})"
    if row.name == "triton" and not _HAS_TRITON:
        return "triton is not installed"
    return None


def _why_not(row: Backend, request: Request) -> str | None:
    """Why a backend cannot run a request; None where it can."""
    reason = _missing(row)
    if reason is not None:
        return reason
    if request.operator not in OPERATORS_OF[row.name]:
        return f"it has no {request.operator}"
    if row.devices is not None and request.x.device.type not in row.devices:
        return f"it runs on {' or '.join(row.devices)}, x is on {request.x.device.type}"
    decline = getattr(provider(row.name, request.operator), "why_not", None)
    return None if decline is None else decline(request)


_asked_for: str | None = None


def asked_for() -> str | None:
    """The backend that the caller asked for by name."""
    name = _asked_for if _asked_for is not None else os.environ.get("MACARON_OPS_BACKEND") or None
    if name is not None and name not in _BY_NAME:
        raise BackendError(f"MACARON_OPS_BACKEND: expected one of {', '.join(_BY_NAME)}; got {name!r}")
    return name


def select(request: Request) -> str:
    """The backend that runs a request.

    Raises:
        BackendError: the backend that the caller asked for cannot.
    """
    name = asked_for()
    if name is None:
        row = next(row for row in BACKENDS if _why_not(row, request) is None)
        return row.name
    reason = _why_not(_BY_NAME[name], request)
    if reason is not None:
        raise BackendError(f"{request.operator}: backend {name!r} was asked for, but {reason}")
    return name


def require_reference(why: str) -> None:
    """Refuse where the caller asked for another backend than the reference."""
    name = asked_for()
    if name not in (None, "reference"):
        raise BackendError(f"backend {name!r} was asked for, but {why}")


def choose(request: Request) -> Choice:
    """What :func:`select` would do, with the reason for every row of the table."""
    forced, chosen, rows = asked_for(), None, []
    for row in BACKENDS:
        reason = _why_not(row, request)
        usable = reason is None
        if chosen is None and usable and forced in (None, row.name):
            chosen = row.name
        if usable and forced not in (None, row.name):
            reason = f"{forced!r} was asked for"
        rows.append((row.name, usable, row.reason if reason is None else reason))
    return Choice(chosen, tuple(rows))


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Ask for a backend by name: ``with macaron_ops.use_backend("triton"): ...``

    Inside, a call that the backend cannot run is a :class:`BackendError` that says why, never a silent change. The
    choice holds for the whole process (as ``MACARON_OPS_BACKEND`` does), and for backward passes it is that of their
    forward pass.

    Raises:
        ValueError: no backend has this name.
    """
    global _asked_for
    if name not in _BY_NAME:
        raise ValueError(f"name: expected one of {', '.join(map(repr, _BY_NAME))}; got {name!r}")
    before, _asked_for = _asked_for, name
    try:
        yield
    finally:
        _asked_for = before


def backends() -> dict[str, BackendStatus]:
    """Every backend with what it brings and, where it cannot be used here, why."""
    statuses = {}
    for row in BACKENDS:
        reason = _missing(row)
        if reason is None and row.devices == ("cuda",) and not torch.cuda.is_available():
            reason = "torch sees no CUDA device"
        statuses[row.name] = BackendStatus(row.name, reason is None, reason or row.reason, OPERATORS_OF[row.name])
    return statuses
