"""What a run of `tune` shows while it works: a bar over all problems on a terminal, if rich is there, else lines."""

from __future__ import annotations

import sys
from contextlib import nullcontext

from .work import Problem

__all__ = ["Bar"]


class Bar:
    """``problem`` and ``step`` move the bar, ``say`` prints a line above it."""

    def __init__(self, problems: int) -> None:
        self._problems = problems
        self._bar = _rich_bar() if sys.stdout.isatty() else None
        self._task = self._bar.add_task("starting", total=problems) if self._bar else None

    def __enter__(self) -> Bar:
        (self._bar or nullcontext()).__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        (self._bar or nullcontext()).__exit__(*exception)

    def problem(self, index: int, problem: Problem) -> None:
        self._index, self._title = index, f"[{index + 1}/{self._problems}] {problem}"
        self.step("preparing", 0.0)

    def step(self, doing: str, share: float) -> None:
        if self._bar:
            self._bar.update(self._task, description=f"{self._title}: {doing}", completed=self._index + share)
            self._bar.refresh()

    def say(self, line: str) -> None:
        print(line, flush=True) if self._bar is None else self._bar.console.print(line, highlight=False, markup=False)


def _rich_bar():
    try:
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
    except ModuleNotFoundError:
        return None
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
    # A refreshing thread would take its time from what is being timed.
    return Progress(*columns, TimeRemainingColumn(), transient=True, auto_refresh=False)
