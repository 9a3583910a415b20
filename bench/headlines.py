"""The most telling lines of a run, computed from its rows: what was gained or lost, in words, with the denominator.

Ratios over several presets are geometric means, with the range beside them. A slower result says slower.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable

from . import numbers
from .group import AFTER, EAGER, OURS, PRODUCTS
from .results import Row

FORMULA = (
    0.02  # that what a layer keeps may be off: the allocator rounds, and a core of attention keeps H numbers or 2 H
)


def headlines(document: dict[str, object], count: int = 5) -> list[str]:
    """At most `count` lines: what went wrong, the real model, our best layer, the operators, Strang, room left."""
    rows = document["rows"]
    ok = [row for row in rows if row["status"] == "ok"]
    found = [
        *_failures(rows),
        *_kept(ok),
        *_model(ok),
        *_layers(ok),
        *_operators(ok),
        *_strang(ok),
        *_room(ok),
    ]
    return found[:count]


def compared(ratio: float, low: float | None = None, high: float | None = None) -> str:
    """1.2 -> '1.20x the speed of'; below 1 the word is slower; noise from `low` to `high` around 1 is called so."""
    if low is not None and high is not None and low <= 1 <= high:
        return f"within noise, {ratio:.2f}x the speed of"
    if abs(ratio - 1) < 0.005:
        return "as fast as"
    return f"{ratio:.2f}x the speed of" if ratio > 1 else f"slower: {ratio:.2f}x the speed of"


def _told(speedup: dict[str, object]) -> str:
    return compared(speedup["median"], speedup["p20"], speedup["p80"])


def _failures(rows: list[Row]) -> Iterable[str]:
    bad = [row for row in rows if row["status"] in ("wrong", "failed")]
    if bad:
        names = ", ".join(dict.fromkeys(f"{row['variant']} ({row['subject']})" for row in bad))
        yield f"{len(bad)} of {len(rows)} measurements gave a wrong result or failed, and have no time: {names}."


def _kept(rows: list[Row]) -> Iterable[str]:
    """Where layers keep something else between their passes than ``activations`` says; nothing where they do not."""
    both = [(row, row["memory"].get("kept_by_formula")) for row in rows if (row["memory"] or {}).get("kept_bytes")]
    ratios = {(row["variant"], row["subject"]): row["memory"]["kept_bytes"] / said for row, said in both if said}
    off = {key: ratio for key, ratio in ratios.items() if abs(ratio - 1) > FORMULA}
    if off:
        told = ", ".join(f"{variant} ({subject}) {ratio:.2f}x" for (variant, subject), ratio in off.items())
        yield f"{len(off)} of {len(ratios)} layers keep another amount for the backward than by their formula: {told}."


def _model(rows: list[Row]) -> Iterable[str]:
    after = [row for row in rows if row["suite"] == "model" and row["variant"] == AFTER and row["speedup"]]
    for dtype in dict.fromkeys(row["dtype"] for row in after):
        mine = [row for row in after if row["dtype"] == dtype]
        speeds = "; ".join(
            f"batch {row['shape']['batch']}: {_told(row['speedup'])} transformers' own layers "
            f"({numbers.digits(row['tokens_per_s'])} tokens/s)"
            for row in mine
        )
        worst = max(row["check"]["to_original"] for row in mine)
        yield f"MiniLM-L6 on real sentences after {AFTER}, {dtype}, {speeds}; 1 - cosine <= {worst:.0e}."


def _layers(rows: list[Row]) -> Iterable[str]:
    """Our best layer against the eager Lie-Trotter layer, in training if that was measured, and the leanest."""
    ratios = _ratios(rows, "layers", lambda variant: variant.startswith(OURS))
    if ratios:
        dtype, direction = _main_setting(ratios)
        ours = {key[0]: found for key, found in ratios.items() if key[1:] == (dtype, direction)}
        best = max(ours, key=lambda variant: _mean(ours[variant].values()))
        what = f"{best} is {compared(_mean(ours[best].values()))} eager Lie-Trotter ({_range(ours[best])})"
        yield f"Best macaron_ops layer, {direction} in {dtype}: {what}."
        memory, kept = (_memory(rows, dtype, direction, name) for name in ("activation_bytes", "kept_bytes"))
        if memory and kept:
            leanest = min(kept, key=lambda variant: _mean(kept[variant].values()))
            yield (
                f"Leanest macaron_ops layer, {direction} in {dtype}: {leanest} keeps "
                f"{_mean(kept[leanest].values()):.2f}x as much for the backward as eager Lie-Trotter "
                f"({_range(kept[leanest])}) and takes {_mean(memory[leanest].values()):.2f}x the activation memory "
                f"({_range(memory[leanest])}); its speed is {_mean(ours[leanest].values()):.2f}x."
            )


def _strang(rows: list[Row]) -> Iterable[str]:
    """What the Strang splitting costs in eager PyTorch at equal parameters."""
    ratios = _ratios(rows, "layers", lambda variant: variant == "eager Strang")
    if ratios:
        dtype, direction = _main_setting(ratios)
        found = ratios["eager Strang", dtype, direction]
        what = f"eager Strang is {compared(_mean(found.values()))} eager Lie-Trotter ({_range(found)})"
        yield f"Strang at equal parameters, {direction} in {dtype}: {what}."


def _operators(rows: list[Row]) -> Iterable[str]:
    """Each operator on our best backend against its eager form: presets together, particles by their dimension."""
    ratios = _ratios(rows, "ops", lambda variant: variant.startswith(OURS))
    if ratios:
        dtype, direction = _main_setting(ratios)
        ours = {key[0]: found for key, found in ratios.items() if key[1:] == (dtype, direction)}
        best = max(ours, key=lambda variant: _mean(ours[variant].values()))
        kinds = defaultdict(list)
        for subject, ratio in ours[best].items():
            kinds[subject if "=" in subject else subject.split()[0]].append(ratio)
        told = (f"{kind} {_mean(found):.2f}x{' (slower)' if _mean(found) < 1 else ''}" for kind, found in kinds.items())
        yield f"Operators over their eager forms, {direction} in {dtype}, {best}: {', '.join(told)}."


def _room(rows: list[Row]) -> Iterable[str]:
    """How much a perfect fusion could still win: the bare products' speed over eager Lie-Trotter."""
    ratios = _ratios(rows, "layers", lambda variant: variant == PRODUCTS)
    if ratios:
        dtype, direction = _main_setting(ratios)
        found = ratios[PRODUCTS, dtype, direction]
        what = f"the bare matrix products are {compared(_mean(found.values()))} eager Lie-Trotter ({_range(found)})"
        yield f"Room for fusion, {direction} in {dtype}: {what}."


def _memory(rows: list[Row], dtype: str, direction: str, name: str) -> dict[str, dict[str, float]]:
    """{variant of ours: {preset: memory / eager Lie-Trotter's}}."""
    weighed = {
        (row["variant"], row["subject"]): row["memory"][name]
        for row in rows
        if (row["suite"], row["dtype"], row["pass"]) == ("layers", dtype, direction) and (row["memory"] or {}).get(name)
    }
    found = defaultdict(dict)
    for (variant, subject), taken in weighed.items():
        eager = weighed.get((f"{EAGER} Lie-Trotter", subject))
        if variant.startswith(OURS) and eager:
            found[variant][subject] = taken / eager
    return found


Ratios = dict[tuple[str, str, str], dict[str, float]]


def _ratios(rows: list[Row], suite: str, wanted) -> Ratios:
    """{(variant, dtype, pass): {subject: speed over the denominator}}."""
    found: Ratios = defaultdict(dict)
    for row in rows:
        if row["suite"] == suite and row["speedup"] and wanted(row["variant"]):
            found[row["variant"], row["dtype"], row["pass"]][row["subject"]] = row["speedup"]["median"]
    return found


def _main_setting(ratios: Ratios) -> tuple[str, str]:
    """The first dtype, forward+backward before forward."""
    return min(((dtype, direction) for _, dtype, direction in ratios), key=lambda setting: setting[1] == "forward")


def _mean(values: Iterable[float]) -> float:
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))


def _range(found: dict[str, float]) -> str:
    if len(found) == 1:
        return next(iter(found))
    low, high = min(found, key=found.get), max(found, key=found.get)
    return f"geometric mean of {len(found)} presets: {found[low]:.2f}x {low} to {found[high]:.2f}x {high}"
