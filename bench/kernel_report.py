"""`macaron-ops inspect-kernels`: what the compiled kernels use, and which of them break a rule. No GPU is needed."""

from __future__ import annotations

import concurrent.futures
import fnmatch
import functools
import json
import multiprocessing
import sys
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from macaron_ops.kernels.device import Launch
from macaron_ops.kernels.offline import Resources, cache_key, compile_for, faults, resources

from .kernel_calls import OPERATORS, Wanted

__all__ = ["Inspected", "as_json", "draw", "inspect", "launches", "source"]


class Inspected(NamedTuple):
    architecture: str
    operator: str
    kernel: str
    dtype: str
    constants: dict[str, object]  # those of the launch
    used: Resources | None  # None: it does not compile
    faults: list[str]


def launches(architecture: str, wanted: Wanted, pattern: str = "*") -> list[tuple[str, Launch, str]]:
    """``(operator, launch, dtype)`` of every distinct kernel whose name matches; the cache key tells them apart."""
    found: dict[str, tuple[str, Launch, str]] = {}
    for operator, calls in OPERATORS.items():
        for launch, dtype in calls(architecture, wanted):
            if fnmatch.fnmatch(launch.kernel.__name__, pattern):
                found.setdefault(cache_key(launch, architecture), (operator, launch, dtype))
    return list(found.values())


def inspect(architectures: Sequence[str], wanted: Wanted, pattern: str = "*", jobs: int = 1) -> list[Inspected]:
    """Compiles them, in so many processes, and tells on stderr how far it is."""
    numbers = [(a, i) for a in architectures for i in range(len(_launches(a, wanted, pattern)))]
    if jobs == 1:
        return [_one(wanted, pattern, *number) for number in _told(numbers)]
    with concurrent.futures.ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        # Each process makes its own list of launches, which are not to be pickled: in the same order.
        parts = [pool.submit(_one, wanted, pattern, *number) for number in numbers]
        return [part.result() for part in _told(parts)]


_launches = functools.cache(launches)


def _one(wanted: Wanted, pattern: str, architecture: str, index: int) -> Inspected:
    return _inspected(architecture, *_launches(architecture, wanted, pattern)[index])


def _told(things: Sequence, every: float = 60.0) -> Iterator:
    """The things, one after the other; on a terminal how many are done each time, in a file once a minute."""
    terminal, begin = sys.stderr.isatty(), time.monotonic()
    said = begin
    for i, thing in enumerate(things):
        now = time.monotonic()
        if i and (terminal or now - said >= every):
            left = (now - begin) / i * (len(things) - i)
            line = f"{i} of {len(things)} kernels, about {left / 60:.0f} minutes left"
            print(f"\r{line:<60}" if terminal else line, end="" if terminal else "\n", file=sys.stderr, flush=True)
            said = now
        yield thing
    if terminal:
        print("\r" + " " * 60, end="\r", file=sys.stderr)


def _inspected(architecture: str, operator: str, launch: Launch, dtype: str) -> Inspected:
    try:
        used = resources(compile_for(launch, architecture))
        broken = faults(used, launch, architecture)
    except Exception as error:  # the compiler's own kinds are many; the row says which
        used, broken = None, [f"does not compile: {type(error).__name__}: {str(error).strip().splitlines()[0]}"]
    return Inspected(architecture, operator, launch.kernel.__name__, dtype, dict(launch.constants), used, broken)


def source(architecture: str, wanted: Wanted, pattern: str, kind: str) -> Iterator[str]:
    """The code of each distinct kernel that matches: ``ttgir``, or ``ptx``, ``sass`` (AMD: ``amdgcn``)."""
    for _, launch, dtype in launches(architecture, wanted, pattern):
        title = f"// {launch.kernel.__name__} for {architecture}, {dtype}, {_said(launch.constants)}"
        yield f"{title}\n{compile_for(launch, architecture).asm[kind]}"


def as_json(rows: Sequence[Inspected]) -> str:
    return json.dumps([{**row._asdict(), "used": row.used and row.used._asdict()} for row in rows], indent=1)


def draw(rows: Sequence[Inspected]) -> None:
    """A table for each architecture, what breaks a rule in red, with the rule."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console() if sys.stdout.isatty() else Console(width=200, no_color=True)
    for architecture in dict.fromkeys(row.architecture for row in rows):
        these = [row for row in rows if row.architecture == architecture]
        view = Table(title=f"{architecture}: {len(these)} kernels", box=box.SIMPLE_HEAD, title_justify="left")
        for name in ("kernel", "dtype", "tile", "warps", "stages", "of"):
            view.add_column(name, no_wrap=name != "of")
        for name in ("registers", "stack", "shared, KiB", "wgmma", "mma", "TMA", "instructions"):
            view.add_column(name, justify="right")
        for row in these:
            view.add_row(*_cells(row), style="red" if row.faults else None)
        console.print(view)
    broken = [row for row in rows if row.faults]
    for row in broken:
        about = f"{row.architecture} {row.kernel} {row.dtype}, {_said(row.constants)}"
        console.print(Text(f"{about}: {'; '.join(row.faults)}", style="red"))
    console.print(f"{len(rows)} kernels, {len(broken) or 'none'} of them against a rule.", highlight=False)


_TILE = ("BM", "BN", "BK", "ROWS", "BLOCK")
_SHOWN = (*_TILE, "num_warps", "num_stages")
_UNSAID = (*_SHOWN, "GROUP", "SLICES", "PRECISION")


def _cells(row: Inspected) -> list[str]:
    c, used = row.constants, row.used
    tile = " x ".join(str(c[name]) for name in _TILE if name in c)
    of = ", ".join(f"{name}={value}" for name, value in c.items() if name not in _UNSAID and value not in (False, None))
    cells = [row.kernel, row.dtype, tile, str(c.get("num_warps", "")), str(c.get("num_stages", "")), of]
    if used is None:
        return cells
    shared = f"{used.shared / 1024:.1f}"
    counts = (used.registers, used.stack, shared, used.wgmma, used.mma, used.tma, used.instructions)
    return cells + ["-" if n is None else str(n) for n in counts]


def _said(constants: dict[str, object]) -> str:
    return ", ".join(f"{name}={value}" for name, value in constants.items())
