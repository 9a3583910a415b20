"""What a run prints where there is no terminal, or no rich: a table and a line as each group ends."""

from __future__ import annotations

import time
from collections.abc import Sequence

from . import numbers, table
from .group import Group
from .options import Options
from .results import Row
from .runner import Job


class Lines:
    """The runner's Progress. The remaining time is the jobs' estimate, scaled by how the estimates did so far."""

    def __init__(self, jobs: Sequence[Job], options: Options) -> None:
        self._cost = [job.seconds(options) for job in jobs]
        self._done_cost = 0.0
        self._index = 0
        self._began = self._group_began = time.monotonic()

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *exception: object) -> None: ...

    def say(self, text: str) -> None:
        print(text, flush=True)

    def group(self, group: Group, names: Sequence[str]) -> None:
        self._title = group.name
        self._group_began = time.monotonic()

    def step(self, doing: str, share: float) -> None: ...

    def done(self, group: Group, rows: list[Row]) -> None:
        self._count()
        self.say(text(rows))
        took = time.monotonic() - self._group_began
        self.say(f"[{self._index}/{len(self._cost)}] {self._title}: {took:.1f} s, {self._left(self._done_cost)}\n")

    def _count(self) -> None:
        self._done_cost += self._cost[self._index]
        self._index += 1

    def _left(self, done: float) -> str:
        total = sum(self._cost)
        # The first estimates stand until a tenth of the work is behind; then the run's own pace corrects them.
        pace = (time.monotonic() - self._began) / done if done > 0.1 * total else 1.0
        return f"about {numbers.clock_time((total - done) * pace)} left"


def text(rows: Sequence[Row]) -> str:
    """One group's rows as a table, what failed with its reason below."""
    products = table.products_seconds(rows)
    cells = [(*table.COLUMNS, table.speedup_column(rows))]
    cells += [table.cells(row, products) for row in rows if row["status"] == "ok"]
    failed = [f"  {row['variant']}: {table.reason(row)}" for row in rows if row["status"] != "ok"]
    return "\n".join([f"{table.title(rows[0])}  ({numbers.shape(rows[0])})", *aligned(cells), *failed])


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns as wide as their widest cell, the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        ).rstrip()
        for row in rows
    ]
