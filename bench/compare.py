"""This run against an older one: what became slower or faster past the noise of both.

A row is a regression when its 20th percentile lies above the old row's 80th: the two samples' middle parts do not
touch, so neither run's noise explains it. An improvement is the mirror image. Rows are matched by suite, subject,
shape, dtype, pass and variant; times of different machines are set side by side with a warning.
"""

from __future__ import annotations

from dataclasses import dataclass

from .results import Row, describe, key

REGRESSION, IMPROVEMENT, SAME = "regression", "improvement", "within noise"

# Environment entries that make two times incomparable when they differ.
_MACHINE = ("device_type", "threads", "matmul_precision")


@dataclass(frozen=True)
class Change:
    """One row in both runs; `ratio` is new median / old median."""

    row: Row
    old: Row
    verdict: str

    @property
    def ratio(self) -> float:
        return self.row["time"]["median"] / self.old["time"]["median"]

    def __str__(self) -> str:
        new, old = self.row["time"], self.old["time"]
        return (
            f"{self.verdict}: {describe(self.row)}: {1e3 * new['median']:.4g} ms "
            f"({1e3 * new['p20']:.4g} to {1e3 * new['p80']:.4g}), was {1e3 * old['median']:.4g} ms "
            f"({1e3 * old['p20']:.4g} to {1e3 * old['p80']:.4g}), {self.ratio:.2f}x the time"
        )


@dataclass(frozen=True)
class Comparison:
    """Changes of the rows in both runs, slowest first; rows of one run only; why the machines may not compare."""

    changes: tuple[Change, ...]
    only_new: tuple[Row, ...]
    only_old: tuple[Row, ...]
    warnings: tuple[str, ...]

    def of(self, verdict: str) -> list[Change]:
        return [change for change in self.changes if change.verdict == verdict]

    @property
    def regressions(self) -> list[Change]:
        return self.of(REGRESSION)

    def summary(self) -> str:
        counts = ", ".join(f"{len(self.of(verdict))} {verdict}" for verdict in (REGRESSION, IMPROVEMENT, SAME))
        return f"{len(self.changes)} measurements in both runs: {counts}."


def compare(new: dict[str, object], old: dict[str, object]) -> Comparison:
    """Compares two results documents."""
    news = {key(row): row for row in new["rows"] if row["status"] == "ok"}
    olds = {key(row): row for row in old["rows"] if row["status"] == "ok"}
    changes = [Change(row, olds[k], verdict(row, olds[k])) for k, row in news.items() if k in olds]
    return Comparison(
        tuple(sorted(changes, key=lambda change: -change.ratio)),
        tuple(row for k, row in news.items() if k not in olds),
        tuple(row for k, row in olds.items() if k not in news),
        tuple(_warnings(new["environment"], old["environment"])),
    )


def verdict(row: Row, old: Row) -> str:
    """Whether the times of one row moved past the noise of both runs."""
    if row["time"]["p20"] > old["time"]["p80"]:
        return REGRESSION
    if row["time"]["p80"] < old["time"]["p20"]:
        return IMPROVEMENT
    return SAME


def _warnings(new: dict[str, object], old: dict[str, object]) -> list[str]:
    pairs = [(name, new.get(name), old.get(name)) for name in _MACHINE]
    pairs.append(("device", new.get("device", {}).get("name"), old.get("device", {}).get("name")))
    pairs += [
        (name, value, old.get("versions", {}).get(name))
        for name, value in new.get("versions", {}).items()
        if name in ("torch", "triton")
    ]
    return [f"{name} was {was}, is {now}" for name, now, was in pairs if now != was]
