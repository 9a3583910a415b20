"""What ``replace_layers`` and ``restore_layers`` did, layer by layer."""

import re
from dataclasses import dataclass, field
from html import escape
from typing import NamedTuple

__all__ = ["Left", "Replaced", "Report"]


class Replaced(NamedTuple):
    """A layer that has another class now."""

    name: str  # in model.named_modules(); "" is the model itself
    before: str
    after: str


class Left(NamedTuple):
    """A layer that stays as it was."""

    name: str
    cls: str
    reason: str


@dataclass
class Report:
    """``str()`` is a table; layers that differ only by their number share a line.

    Attributes:
        action: ``"replaced"`` or ``"restored"``.
        replaced: the layers whose class changed.
        left: the layers that look like one of a known family and stay as they are, with the reason.
    """

    action: str
    replaced: list[Replaced] = field(default_factory=list)
    left: list[Left] = field(default_factory=list)

    def __str__(self) -> str:
        if not self.replaced and not self.left:
            missing = "no layer of a known family" if self.action == "replaced" else "no layer that was replaced"
            return f"nothing {self.action}: the model has {missing}"
        lines = [f"{self.action} {_count(self.replaced)}, left {_count(self.left)}"]
        lines += _table([(_label(r.name), f"{r.before} -> {r.after}") for r in self.replaced])
        if self.left:
            lines.append("left as they are:")
            lines += _table([(_label(entry.name), entry.cls, entry.reason) for entry in self.left])
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return f"<pre>{escape(str(self))}</pre>"


def _count(entries: list) -> str:
    return f"{len(entries)} layer{'' if len(entries) == 1 else 's'}"


def _label(name: str) -> str:
    return name or "(the model itself)"


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    """Aligned lines. Rows that are equal up to the last number of their name are one line: ``layer.{0..5}``."""
    groups: dict[tuple, list[str]] = {}
    for name, *rest in rows:
        numbers = re.findall(r"\d+", name)
        stem = re.sub(r"\d+(?=\D*$)", "*", name)
        groups.setdefault((stem, *rest), []).extend(numbers[-1:])
    merged = [(stem.replace("*", _numbers(numbers)), *rest) for (stem, *rest), numbers in groups.items()]
    widths = [max(len(cell) for cell in column) for column in zip(*merged, strict=True)]
    return [("  " + "  ".join(map(str.ljust, row, widths))).rstrip() for row in merged]


def _numbers(numbers: list[str]) -> str:
    """``"3"``, ``"{0..5}"``, ``"{0,2,4}"``."""
    if len(numbers) < 2:
        return "".join(numbers)
    values = sorted(map(int, numbers))
    if values == list(range(values[0], values[-1] + 1)):
        return f"{{{values[0]}..{values[-1]}}}"
    return f"{{{','.join(map(str, values))}}}"
