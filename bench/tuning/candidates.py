"""Which tiles are tried for a product: what can fit the device, those most like the present tile first.

A field of ``Tile`` that has no choice keeps the present tile's value. The schedule (whether programs persist, how they
read) is changed apart from the sizes: of the present tile, and then of the best one. What compiling shows (spilled
registers, more shared memory than was reckoned) is asked later, of those that get that far.
"""

from __future__ import annotations

import itertools
import math

from macaron_ops.kernels.offline import SHARED_MEMORY
from macaron_ops.kernels.tiles import Tile

__all__ = ["candidates", "choices", "schedules"]

# Bytes of shared memory that a kernel takes beside its operands' stages, as far as those of the shipped tiles do.
_BESIDE = {"sm90": 12 << 10, "sm100": 12 << 10}
_ACCUMULATORS = (8, 192)  # float32 sums a thread: fewer leave the matrix units waiting, more spill

_WIDE = {"BM": (64, 128, 256), "BN": (64, 128, 256), "num_warps": (4, 8)}
_OF_16_BIT = {
    "sm80": {**_WIDE, "BK": (32, 64), "num_stages": (3, 4, 5)},
    "sm90": {**_WIDE, "BK": (64, 128), "num_stages": (3, 4)},
    "sm100": {**_WIDE, "BK": (64, 128), "num_stages": (3, 4)},
    "gfx942": {**_WIDE, "BK": (32, 64), "num_stages": (2,)},
    "emulated": {"BM": (32, 64), "BN": (64, 128), "BK": (128, 256)},
}
_OF_32_BIT = {"BM": (32, 64, 128), "BN": (32, 64, 128), "BK": (16, 32), "num_warps": (4, 8), "num_stages": (2, 3, 4)}
# How a tile's programs run: fields that are changed together.
_SCHEDULES: dict[str, tuple[dict[str, object], ...]] = {
    "sm80": ({}, {"PERSISTENT": True}),
    "gfx942": ({}, {"PERSISTENT": True}),
    **dict.fromkeys(
        ("sm90", "sm100"),
        tuple(
            {"PERSISTENT": p, "DESCRIPTORS": d, "MAXNREG": n}
            for p, d, n in ((False, False, 0), (False, True, 0), (True, True, 0), (True, True, 128))
        ),
    ),
    "emulated": ({},),
}
_NARROW = {"BM": (32, 64, 128), "BN": (32, 64, 128), "num_warps": (4, 8), "num_stages": (1, 2, 3)}


def choices(product: str, operand: str, architecture: str) -> dict[str, tuple[int, ...]]:
    """The values of each field that may be another than the present tile's."""
    if architecture == "emulated":
        return {name: _OF_16_BIT["emulated"][name] for name in (("BM", "BN") if "narrow" in product else ("BM", "BK"))}
    if product.startswith("narrow"):
        return _NARROW
    fields = _OF_16_BIT[architecture] if operand == "16-bit" else _OF_32_BIT
    return {name: fields[name] for name in fields if name != "BN" or not product.startswith("linear_norm")}


def schedules(product: str, architecture: str, tile: Tile) -> list[Tile]:
    """The tile with the other ways to run its programs; the one kernel of narrow rows has one."""
    if product.startswith("narrow"):
        return []
    plain = tile._replace(**{n: Tile._field_defaults[n] for s in _SCHEDULES[architecture] for n in s})
    found = [plain._replace(**schedule) for schedule in _SCHEDULES[architecture]]
    return [t for t in found if t != tile]


def candidates(product: str, operand: str, architecture: str, shape: tuple[int, int, int], present: Tile) -> list[Tile]:
    """Other sizes with the present schedule, and the present tile with other schedules."""
    fields = choices(product, operand, architecture)
    grid = (
        present._replace(**dict(zip(fields, values, strict=True))) for values in itertools.product(*fields.values())
    )
    size = 2 if operand == "16-bit" else 4
    least = {name: min(values) for name, values in fields.items()}
    found = [
        t
        for t in dict.fromkeys(grid)
        if t != present and _covers(t, shape, least) and _fits(t, product, size, architecture)
    ]
    found = sorted(found, key=lambda t: (_distance(t, present), t))
    return [*schedules(product, architecture, present), *found]


def _covers(tile: Tile, shape: tuple[int, int, int], least: dict[str, int]) -> bool:
    """No side is twice what the product needs, if a smaller one is a choice."""
    sides = zip(("BM", "BN", "BK"), shape, strict=True)
    return all(
        getattr(tile, name) < 2 * length or getattr(tile, name) <= least.get(name, math.inf) for name, length in sides
    )


def _fits(tile: Tile, product: str, size: int, architecture: str) -> bool:
    if architecture == "emulated":
        return True
    right = 2 if product == "gated" else 1
    sums = right * tile.BM * tile.BN / (32 * tile.num_warps)
    shared = tile.num_stages * (tile.BM + right * tile.BN) * tile.BK * size
    shared += _BESIDE.get(architecture, 0)
    return _ACCUMULATORS[0] <= sums <= _ACCUMULATORS[1] and shared <= SHARED_MEMORY[architecture]


def _distance(tile: Tile, present: Tile) -> float:
    """Doublings and halvings between two tiles."""
    return sum(abs(math.log2((a + 1) / (b + 1))) for a, b in zip(tile, present, strict=True))
