"""What a run shows in the terminal: a bar with the remaining time, a table as each group ends.

Without a TTY there is no bar: a line as each group ends.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from rich import box
from rich.console import Console as RichConsole
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from . import numbers, table
from .group import AFTER, OURS, Group
from .options import Options
from .results import Row
from .runner import Job

_PLAIN_WIDTH = 200
_SECONDS_BETWEEN_DRAWINGS = 0.25


class Console:
    """The runner's Progress. The remaining time is the jobs' estimate, scaled by how the estimates did so far."""

    def __init__(self, jobs: Sequence[Job], options: Options) -> None:
        plain = RichConsole()
        self.rich = plain if plain.is_terminal else RichConsole(width=_PLAIN_WIDTH, no_color=True)
        self._cost = [job.seconds(options) for job in jobs]
        self._done_cost = 0.0
        self._index = 0
        self._drawn = 0.0
        self._began = self._group_began = time.monotonic()
        self._bar = Progress(
            TextColumn("[progress.description]{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%  {task.fields[left]}"),
            console=self.rich,
            disable=not self.rich.is_terminal,
            transient=True,
            auto_refresh=False,  # a refreshing thread would take its time from what is being timed
        )
        self._task = self._bar.add_task("starting", total=sum(self._cost), left="")

    def __enter__(self) -> Console:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        self.rich.print(Text(text))

    def group(self, group: Group, names: Sequence[str]) -> None:
        self._title = f"{group.suite} {group.subject} {group.dtype} {group.direction}"
        self._group_began = time.monotonic()
        self._update("preparing", 0.0)

    def step(self, doing: str, share: float) -> None:
        self._update(doing, share)

    def done(self, group: Group, rows: list[Row]) -> None:
        self._done_cost += self._cost[self._index]
        self._index += 1
        self.rich.print(rich_table(rows))
        for row in rows:
            if row["status"] != "ok":
                self.rich.print(Text(f"  {row['variant']}: {table.reason(row)}", style="red"))
        if not self.rich.is_terminal:
            took = time.monotonic() - self._group_began
            self.say(f"[{self._index}/{len(self._cost)}] {self._title}: {took:.1f} s, {self._left(self._done_cost)}\n")

    def _update(self, doing: str, share: float) -> None:
        done = self._done_cost + share * self._cost[self._index]
        text = f"[{self._index + 1}/{len(self._cost)}] {self._title}: {doing}"
        self._bar.update(self._task, description=text, completed=done, left=self._left(done))
        if time.monotonic() - self._drawn > _SECONDS_BETWEEN_DRAWINGS or share == 0:
            self._bar.refresh()
            self._drawn = time.monotonic()

    def _left(self, done: float) -> str:
        total = sum(self._cost)
        # The first estimates stand until a tenth of the work is behind; then the run's own pace corrects them.
        pace = (time.monotonic() - self._began) / done if done > 0.1 * total else 1.0
        return f"about {numbers.clock_time((total - done) * pace)} left"


def rich_table(rows: Sequence[Row]) -> Table:
    """One group's rows; the denominator's row is dim, ours are bold, a row without a time is red."""
    view = Table(
        title=f"{table.title(rows[0])}  ({numbers.shape(rows[0])})",
        box=box.SIMPLE_HEAD,
        title_justify="left",
        title_style="bold",
    )
    for index, name in enumerate((*table.COLUMNS, table.speedup_column(rows))):
        view.add_column(name, justify="left" if index == 0 else "right", no_wrap=True)
    products = table.products_seconds(rows)
    for row in rows:
        if row["status"] != "ok":
            view.add_row(row["variant"], row["status"], style="red")
            continue
        style = "bold" if row["variant"].startswith((OURS, AFTER)) else None
        view.add_row(*table.cells(row, products), style=style)
    return view
