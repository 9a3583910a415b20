"""The columns of the table, in the terminal and in the report alike."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from . import numbers
from .group import PRODUCTS
from .results import Row

COLUMNS = (
    "variant",
    "time",
    "p20 to p80",
    "tokens/s",
    "TFLOP/s",
    "of ceiling",
    "of products",
    "peak MiB",
    "activ. MiB",
    "kept MiB",
)


def group_key(row: Row) -> tuple[str, ...]:
    """What the variants of one group have in common."""
    return (row["suite"], row["subject"], numbers.shape(row), row["dtype"], row["pass"])


def sections(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows of one group each, in order."""
    return [list(rows) for _, rows in groupby(rows, group_key)]


def products_seconds(rows: Sequence[Row]) -> float | None:
    """What the bare products of a group take."""
    return next((row["time"]["median"] for row in rows if row["variant"] == PRODUCTS and row["status"] == "ok"), None)


def title(row: Row) -> str:
    return f"{row['suite']}: {row['subject']}, {row['dtype']}, {row['pass']}"


def speedup_column(rows: Sequence[Row]) -> str:
    """The header of the ratio column, which names its denominator."""
    over = next((row["speedup"]["over"] for row in rows if row["status"] == "ok" and row["speedup"]), None)
    return f"speed over {over}" if over else "speed"


def reason(row: Row) -> str:
    """Why a row was not timed."""
    return f"{row['status']}: {row['reason']}"


def cells(row: Row, products: float | None) -> tuple[str, ...]:
    """One timed row as text, the ratio last; `products` are the seconds of its group's bare products."""
    time, memory, ratio = row["time"], row["memory"] or {}, row["speedup"]
    return (
        row["variant"],
        numbers.seconds(time["median"]),
        f"{numbers.seconds(time['p20'])} to {numbers.seconds(time['p80'])}",
        numbers.digits(row["tokens_per_s"]),
        numbers.rate(row["flops_per_s"]),
        numbers.share(row["share_of_gemm"] or row["extra"].get("share_of_copy")),
        numbers.share(products / time["median"] if products else None),
        numbers.mebibytes(memory.get("peak_bytes")),
        numbers.mebibytes(memory.get("activation_bytes")),
        numbers.mebibytes(memory.get("kept_bytes")),
        f"{numbers.times(ratio['median'])} ({numbers.spread(ratio)})" if ratio else "-",
    )
