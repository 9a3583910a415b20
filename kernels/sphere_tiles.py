"""Tiles of ``sphere_attend_step``: BM points are owned by a program, BN others are met at a time.

A list is tried from its largest tile on, as in ``tiles.py``. Those of 64 channels in 16 bits on sm_90 are the fastest
of up to twenty measured on an H200 with 65,536 points: four warps, so that several programs share a processor and the
exponentials of one overlap the products of another. So are those of queries and keys of up to 4 channels, with 262,144.
The others are chosen by compilation: on sm_90 none spills, but that of float32 queries of more than 128 channels: two
registers.
"""

import functools

import torch

from .device import Target, target
from .product import precision
from .tiles import Tile

__all__ = ["TILES", "channels_of", "sphere_tile"]

# Channels up to which float32 is summed in registers, by the precision of its products: docs/triton_kernels.md counts.
NARROW = {"ieee": 8, "tf32": 4}

_PASSES = ("forward", "queries", "keys", "points")
_LANES = (Tile(256, 16, 0, 4, 1), Tile(128, 16, 0, 4, 1), Tile(32, 16, 0, 1, 1))
_PAIR_LANES = (Tile(512, 8, 0, 4, 1), *_LANES)
_FEW_LANES = (Tile(256, 8, 0, 4, 1), Tile(128, 8, 0, 4, 1), Tile(32, 8, 0, 1, 1))
# channels, at most -> pass -> tiles
_NARROW = {
    4: {"forward": _LANES, "queries": _PAIR_LANES, "keys": _PAIR_LANES},
    8: {"forward": _FEW_LANES, "queries": _FEW_LANES, "keys": _FEW_LANES[1:]},
}
_SMALL = Tile(64, 64, 0, 4, 3)
TILES: dict[tuple[str, int], dict[int, dict[str, tuple[Tile, ...]]]] = {
    ("sm90", 2): {
        64: {
            "forward": (Tile(64, 128, 0, 4, 3),),
            "queries": (_SMALL,),
            "keys": (_SMALL,),
            "points": (_SMALL,),
        },
        128: {
            "forward": (Tile(128, 64, 0, 8, 3), Tile(64, 64, 0, 4, 2)),
            "queries": (Tile(128, 64, 0, 8, 2),),
            "keys": (Tile(128, 64, 0, 8, 2),),
            "points": (Tile(64, 64, 0, 4, 2),),
        },
        256: {
            "forward": (Tile(64, 64, 0, 8, 2),),
            "queries": (Tile(64, 32, 0, 8, 2),),
            "keys": (Tile(64, 32, 0, 8, 2),),
        },
    },
    ("sm80", 2): {
        64: {
            "forward": (Tile(128, 64, 0, 8, 3), Tile(64, 64, 0, 4, 3)),
            "queries": (Tile(64, 64, 0, 4, 2),),
            "keys": (Tile(64, 32, 0, 4, 2),),
            "points": (Tile(64, 32, 0, 4, 2),),
        },
        128: {
            "forward": (Tile(128, 32, 0, 8, 3), Tile(64, 32, 0, 4, 2)),
            "queries": (Tile(64, 32, 0, 4, 2),),
            "keys": (Tile(64, 32, 0, 4, 2),),
            "points": (Tile(64, 32, 0, 8, 2),),
        },
        256: {
            "forward": (Tile(64, 32, 0, 8, 2),),
            "queries": (Tile(32, 16, 0, 4, 2),),
            "keys": (Tile(32, 16, 0, 4, 2),),
        },
    },
    ("gfx942", 2): {
        128: dict.fromkeys(_PASSES, (Tile(64, 32, 0, 4, 1),)),
        256: dict.fromkeys(_PASSES, (Tile(32, 16, 0, 4, 1),)),
    },
    # Without tensor cores, unless tf32 is allowed: operands are in registers too.
    ("sm80", 4): {
        32: {
            "forward": (Tile(64, 64, 0, 8, 1),),
            "queries": (Tile(64, 32, 0, 4, 1),),
            "keys": (Tile(32, 32, 0, 4, 1),),
        },
        64: {
            "forward": (Tile(32, 32, 0, 4, 1),),
            "queries": (Tile(32, 32, 0, 4, 1),),
            "keys": (Tile(32, 16, 0, 4, 1),),
        },
        128: dict.fromkeys(_PASSES, (Tile(32, 16, 0, 8, 1),)),
        256: {
            "forward": (Tile(16, 16, 0, 4, 1),),
            "queries": (Tile(16, 32, 0, 8, 1),),
            "keys": (Tile(16, 16, 0, 4, 1),),
        },
    },
}
for _bytes in (2, 4):  # the interpreter on the CPU: a program costs milliseconds, its arithmetic little
    TILES["emulated", _bytes] = {256: dict.fromkeys(_PASSES, (Tile(128, 128, 0, 4, 1),))}
TILES["sm100", 2] = TILES["sm90", 2]
TILES["sm90", 4] = TILES["sm100", 4] = TILES["gfx942", 4] = TILES["sm80", 4]


def channels_of(width: int, channels: int, dtype: torch.dtype) -> tuple[bool, int]:
    """``(whether the narrow kernels run it, the row of the table)``; ``width`` of a value, ``channels`` of a query."""
    most = max(width, channels)
    return dtype == torch.float32 and channels > 0 and most <= NARROW[precision(dtype)], most


def sphere_tile(
    name: str, narrow: bool, channels: int, dtype: torch.dtype, device: torch.device, batch: int, owners: int
) -> Tile:
    """The tile of a pass: "forward", "queries" or "keys"."""
    return _sphere_tile(name, narrow, channels, dtype.itemsize, target(device), batch, owners)


@functools.lru_cache(4096)
def _sphere_tile(name: str, narrow: bool, channels: int, itemsize: int, on: Target, batch: int, owners: int) -> Tile:
    table = _NARROW if narrow and on.architecture != "emulated" else TILES[on.architecture, itemsize]
    tiles = next(row for most, row in table.items() if channels <= most)[name]
    return next((t for t in tiles if batch * t.count(owners, 1) >= on.processors), tiles[-1])
