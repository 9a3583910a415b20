"""What a run shows in a terminal: a bar with the remaining time, a table as each group ends."""

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
from .lines import Lines
from .options import Options
from .results import Row
from .runner import Job

_SECONDS_BETWEEN_DRAWINGS = 0.25


class Console(Lines):
    """The same with a bar and colours."""

    def __init__(self, jobs: Sequence[Job], options: Options) -> None:
        super().__init__(jobs, options)
        self.rich = RichConsole()
        self._drawn = 0.0
        self._bar = Progress(
            TextColumn("[progress.description]{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%  {task.fields[left]}"),
            console=self.rich,
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
        super().group(group, names)
        self._update("preparing", 0.0)

    def step(self, doing: str, share: float) -> None:
        self._update(doing, share)

    def done(self, group: Group, rows: list[Row]) -> None:
        self._count()
        self.rich.print(rich_table(rows))
        for row in rows:
            if row["status"] != "ok":
                self.rich.print(Text(f"  {row['variant']}: {table.reason(row)}", style="red"))

    def _update(self, doing: str, share: float) -> None:
        done = self._done_cost + share * self._cost[self._index]
        text = f"[{self._index + 1}/{len(self._cost)}] {self._title}: {doing}"
        self._bar.update(self._task, description=text, completed=done, left=self._left(done))
        if time.monotonic() - self._drawn > _SECONDS_BETWEEN_DRAWINGS or share == 0:
            self._bar.refresh()
            self._drawn = time.monotonic()


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
