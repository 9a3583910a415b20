"""Which backend runs a call: a table, what each backend says it cannot do, and the caller's own choice.

A backend is a package with one module per operator, found by the operator's name when macaron_ops is imported. A
module has the functions ``forward`` and ``backward`` of ``macaron_ops.reference``'s module of that name, and may have

    Saved, saved_shapes              what its forward keeps for its backward; else the reference's
    why_not(request) -> str | None   the reason why it cannot run a request
    slower(request) -> str | None    the reason why the next row of the table runs it faster; heard only where the
                                     caller asked for no backend by name
    detail(request) -> str           how it would run a request, where ``explain`` should say so
    Ahead, Behind, begins, ends,     what it hands to a neighbour of the same backend in a list of substeps, and asks of
    ahead_shape, behind_shapes       it: see :mod:`macaron_ops.ops.borders`

The package itself may have

    why_unusable() -> str | None     why nothing of it can run in this process
    forward, backward                of a whole list of substeps, as :mod:`macaron_ops.ops.run` makes them: a function
                                     of their tensors, in one call
    recorded(function)               the raw forward operator's function, prepared for calls with one signature

Adding a kernel is adding a file. ``torch.compile`` traces through this module, through ``why_not`` and through
``slower``: they look at shapes, dtypes, options and constants, and at nothing that has to be asked of a driver.
"""

import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator
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
    "asked_for",
    "backends",
    "choose",
    "provider",
    "require_reference",
    "select",
    "use_backend",
]

OPERATORS = ("ffn_step", "attend_step", "normalize_step", "sphere_attend_step")


class BackendError(RuntimeError):
    """A backend was asked for by name and cannot do what is asked."""


class Backend(NamedTuple):
    name: str
    package: str  # holds one module per operator
    devices: tuple[str, ...] | None  # None: any
    emulator: str | None  # the environment variable with which it runs on the CPU, if it is asked for by name
    reason: str  # why it stands where it stands in the table


# In order of preference: the first row that can run a request, and calls itself no slower, runs it.
BACKENDS = (
    Backend(
        "cuda", "macaron_ops.native.cuda", ("cuda",), "MACARON_OPS_CUDA_ON_HOST", "hand-written CUDA C++, where it wins"
    ),
    Backend("triton", "macaron_ops.kernels", ("cuda",), "TRITON_INTERPRET", "fused Triton kernels"),
    Backend("native", "macaron_ops.native.cpu", ("cpu",), None, "fused C++ for the CPU"),
    Backend("reference", "macaron_ops.reference", None, None, "plain PyTorch: the definition, runs everything"),
)
_BY_NAME = {backend.name: backend for backend in BACKENDS}


class Request(NamedTuple):
    """What a backend needs to know to accept or decline a call."""

    operator: str
    x: torch.Tensor
    tensors: tuple
    options: tuple
    save: str  # "none": without a gradient to come


class Choice(NamedTuple):
    backend: str | None  # None: the backend that was asked for cannot
    rows: tuple[tuple[str, bool, str], ...]  # (backend, usable, reason)


class BackendStatus(NamedTuple):
    name: str
    usable: bool
    reason: str
    operators: tuple[str, ...]


def _load(row: Backend) -> tuple[tuple[str, ...], dict[tuple[str, str], ModuleType], str | None]:
    """The operators that a backend brings, their modules, and why none of them can be used."""
    operators: tuple[str, ...] = ()
    try:
        package = importlib.import_module(row.package)
        operators = tuple(o for o in OPERATORS if importlib.util.find_spec(f"{row.package}.{o}") is not None)
        reason = package.why_unusable() if operators and hasattr(package, "why_unusable") else None
        if operators and reason is None:
            return operators, {(row.name, o): importlib.import_module(f"{row.package}.{o}") for o in operators}, None
    except ModuleNotFoundError as error:
        missing = error.name or str(error)
        reason = None if row.package.startswith(missing) else f"{row.package} needs {missing}, which is not installed"
    except Exception as error:  # a library of another torch or machine: the other backends work all the same
        reason = f"{row.package} does not load: {error}"
    return operators, {}, reason or f"this installation has no operator for it (nothing in {row.package})"


# Filled once, when macaron_ops is imported: no import happens inside a compiled function.
OPERATORS_OF: dict[str, tuple[str, ...]] = {}
UNUSABLE: dict[str, str | None] = {}
MODULES: dict[tuple[str, str], ModuleType] = {}
WHOLE: dict[str, ModuleType] = {}  # the packages that run lists of substeps
RECORDED: dict[str, Callable[[Callable], Callable]] = {}
for _row in BACKENDS:
    OPERATORS_OF[_row.name], _modules, UNUSABLE[_row.name] = _load(_row)
    MODULES.update(_modules)
    if _modules:
        _package = importlib.import_module(_row.package)
        if hasattr(_package, "forward"):
            WHOLE[_row.name] = _package
        if hasattr(_package, "recorded"):
            RECORDED[_row.name] = _package.recorded


def provider(backend: str, operator: str) -> ModuleType:
    """The backend's module of an operator."""
    return MODULES[backend, operator]


def _why_not(row: Backend, request: Request, by_name: bool) -> str | None:
    """Why a backend cannot run a request; None where it can."""
    if UNUSABLE[row.name] is not None:
        return UNUSABLE[row.name]
    if request.operator not in OPERATORS_OF[row.name]:
        return f"it has no {request.operator}"
    device = request.x.device.type
    emulated = by_name and device == "cpu" and row.emulator is not None and os.environ.get(row.emulator) == "1"
    if row.devices is not None and device not in row.devices and not emulated:
        return f"it runs on {' or '.join(row.devices)}, x is on {device}"
    return _ask(row, request, "why_not")


def _ask(row: Backend, request: Request, question: str) -> str | None:
    answer = getattr(MODULES[row.name, request.operator], question, None)
    return None if answer is None else answer(request)


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
        for row in BACKENDS:
            if _why_not(row, request, False) is None and _ask(row, request, "slower") is None:
                return row.name
        raise BackendError(f"{request.operator}: no backend can run it")
    reason = _why_not(_BY_NAME[name], request, True)
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
        reason = _why_not(row, request, forced == row.name)
        usable = reason is None
        if usable and forced is None:
            reason = _ask(row, request, "slower")
        elif usable and forced != row.name:
            reason = f"{forced!r} was asked for"
        if chosen is None and usable and reason is None:
            chosen = row.name
        detail = _ask(row, request, "detail") if usable else None
        rows.append((row.name, usable, "; ".join(filter(None, (reason or row.reason, detail)))))
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
    return {
        row.name: BackendStatus(
            row.name, UNUSABLE[row.name] is None, UNUSABLE[row.name] or row.reason, OPERATORS_OF[row.name]
        )
        for row in BACKENDS
    }
