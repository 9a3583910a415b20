"""How numbers are written for people."""

from __future__ import annotations

from .results import Row


def seconds(value: float) -> str:
    """Three significant digits in the unit that suits."""
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if value * scale >= 1:
            return f"{digits(value * scale)} {unit}"
    return f"{digits(value * 1e9)} ns"


def digits(value: float) -> str:
    """Three significant digits without an exponent, thousands apart."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 1 else f"{value:.3f}"


def rate(flops_per_s: float | None) -> str:
    """TFLOP/s; the dash stands for an operator that no matrix product limits."""
    return digits(flops_per_s / 1e12) if flops_per_s else "-"


def share(value: float | None) -> str:
    return f"{100 * value:.0f}%" if value is not None else "-"


def mebibytes(value: float | None) -> str:
    return digits(value / 2**20) if value else "-"


def times(value: float) -> str:
    return f"{value:.2f}x"


def clock_time(value: float) -> str:
    """Minutes and seconds."""
    return f"{int(value) // 60}:{int(value) % 60:02d}"


def shape(row: Row) -> str:
    return ", ".join(f"{name} {value}" for name, value in row["shape"].items())


def spread(speedup: dict[str, object]) -> str:
    return f"{speedup['p20']:.2f} to {speedup['p80']:.2f}"
