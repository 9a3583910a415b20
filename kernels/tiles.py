"""Tile sizes as data: which tile a product takes on which device, with which operands, in which shape.

The tables are the JSON files of ``tuned/``. A device's holds what ``macaron-ops tune`` measured there: an entry a
shape, with its time and the environment. A shape takes the nearest entry of its device, else of the device of its
architecture that is nearest in processors; an entry more than ``REACH`` octaves away in M, N or K is not near. Where
none is, the architecture's file has a row of tiles, the largest first: the first that gives nearly every processor one
is taken, else the last. A large tile reads least, a small one keeps the device busy. Where even the tile of "few" gives
too few processors work, the sum over k is cut in parts. ``MACARON_OPS_TILES`` names one more device's file; where the
package has that device too, the file's entries come before the package's.

The rows are chosen by compilation, not timed: on sm_90 the 16-bit products use wgmma without spilling a register, and
two programs share a processor where an epilogue computes much, so that one multiplies while the other is in its
epilogue. ``sm80`` has the tiles that also fit consumer GPUs with 100 KiB of shared memory.
"""

import functools
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from .device import Target, ceil_div, processors, target

__all__ = [
    "FOLDER",
    "MOST_PARTS",
    "PRODUCTS",
    "Table",
    "Tile",
    "cut",
    "in_use",
    "nearest",
    "operand",
    "precision",
    "read",
    "tables",
    "tile",
    "using",
]

FOLDER = Path(__file__).with_name("tuned")
PRODUCTS = (
    "hidden",
    "gated",
    "hidden_backward",
    "linear",
    "linear_norm",
    "linear_norm_dropout",
    "weight",
    "few",
    "narrow",
    "narrow_dropout",
)
REACH = 2.0  # octaves
MOST_PARTS = 32
_MULTIPLIED = {"16-bit": 2048, "tf32": 1024, "float32": 128}  # products of numbers a clock and processor
REGISTERS = 65536  # of a processor, 32 bits each


class Tile(NamedTuple):
    BM: int
    BN: int
    BK: int
    num_warps: int
    num_stages: int
    GROUP: int = 8  # rows of tiles that are walked together
    PERSISTENT: bool = False  # as many programs as the device holds, each walking over its share of the tiles
    DESCRIPTORS: bool = False  # operands come by tensor descriptors (TMA) where they can
    STORES: bool = False  # and results leave by them
    SLICES: int = 0  # of the tile, one after another in the epilogue; 0: by `slices`
    PARTS: int = 0  # of the sum over k, in "few" and "weight"; 0: by `_parts`
    MAXNREG: int = 0  # NVIDIA: registers of a thread at most, if the epilogue does with them; 0: as many as it wants

    def count(self, M: int, N: int) -> int:
        return ceil_div(M, self.BM) * ceil_div(N, self.BN)

    def programs(self, M: int, N: int, device: torch.device) -> int:
        """Of a product with an (M, N) result. Of a persistent one a processor gets as many as its bound on registers
        leaves room for: the epilogue of one overlaps the products of the other."""
        if not self.PERSISTENT:
            return self.count(M, N)
        together = max(REGISTERS // (32 * self.num_warps * self.MAXNREG), 1) if self.MAXNREG else 1
        return min(self.count(M, N), together * processors(device))

    def constants(self) -> dict[str, int]:
        """The arguments of a kernel with a main loop over k."""
        return _constants(self)

    @property
    def slices(self) -> int:
        """16 elements a thread, 8 where registers are few."""
        return self.SLICES or self.slices_of(8 if self.MAXNREG else 16)

    def slices_of(self, elements: int) -> int:
        """How many leave a thread so many elements at once; 8 at most."""
        return max(1, min(self.BM * self.BN // (32 * elements * self.num_warps), 8))


@functools.cache
def _constants(tile: Tile) -> dict[str, int]:
    names = ("BM", "BN", "BK", "num_warps", "num_stages", "GROUP", "PERSISTENT")
    bound = {"maxnreg": tile.MAXNREG} if tile.MAXNREG else {}
    return {**{name: getattr(tile, name) for name in names}, "SLICES": tile.slices, **bound}


class Table(NamedTuple):
    """One file of ``tuned/``, by operand and product."""

    architecture: str
    device: str | None  # None: the rows of an architecture, not measured
    processors: int
    rows: dict[tuple[str, str], tuple[Tile, ...]]
    entries: dict[tuple[str, str], tuple[tuple[tuple[int, int, int], Tile], ...]]


def precision(dtype: torch.dtype) -> str:
    """How float32 operands are multiplied: as torch's own products of this process."""
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 else "ieee"


def operand(dtype: torch.dtype) -> str:
    """What a table distinguishes of a product's operands: 16-bit, tf32 or float32."""
    return "16-bit" if dtype.itemsize == 2 else "tf32" if precision(dtype) == "tf32" else "float32"


def tile(product: str, dtype: torch.dtype, device: torch.device, M: int, N: int, K: int) -> Tile:
    """The tile of a product with an (M, N) result, a sum over K and operands of ``dtype``."""
    return _using.get(product) or _tile(product, operand(dtype), target(device), M, N, K)


_using: dict[str, Tile] = {}


def in_use() -> tuple[tuple[str, Tile], ...]:
    """What :func:`using` says at the moment."""
    return tuple(_using.items())


@contextmanager
def using(product: str, tile: Tile) -> Iterator[None]:
    """Inside, the product takes that tile whatever the tables say."""
    _using[product] = tile
    try:
        yield
    finally:
        del _using[product]


@functools.lru_cache(1 << 14)
def _tile(product: str, operand: str, on: Target, M: int, N: int, K: int) -> Tile:
    tiles = _row(product, operand, on, (M, N, K))
    return next((t for t in tiles if _enough(t.count(M, N), on.processors)), tiles[-1])


def _row(product: str, operand: str, on: Target, shape: tuple[int, int, int]) -> tuple[Tile, ...]:
    """The one tile that was measured, or those of the architecture."""
    entry = nearest(product, operand, on, shape)
    if entry is not None:
        return (entry,)
    return next(t for t in tables() if t.device is None and t.architecture == on.architecture).rows[operand, product]


def _enough(programs: int, processors: int) -> bool:
    """For nearly every processor: where 128 large tiles meet 132 processors, small ones would be no gain."""
    return 8 * programs >= 7 * processors


def cut(product: str, dtype: torch.dtype, device: torch.device, M: int, N: int, K: int) -> tuple[Tile, int, int]:
    """The tile of a product, into how many parts its sum over k is cut, and the length of one, a multiple of BK."""
    return _cut(_using.get(product), product, operand(dtype), target(device), M, N, K)


@functools.lru_cache(1 << 14)
def _cut(tried: Tile | None, product: str, operand: str, on: Target, M: int, N: int, K: int) -> tuple[Tile, int, int]:
    tiles = (tried,) if tried else _row(product, operand, on, (M, N, K))
    if product == "weight":
        plans = [(t, n) for t in tiles for n in ((t.PARTS,) if t.PARTS else range(1, min(MOST_PARTS, K // 512) + 1))]
        plans = plans or [(tiles[-1], 1)]
        t, parts = min(plans, key=lambda plan: _clocks(*plan, operand, M, N, K, on.processors))
    else:
        plans = [(t, t.PARTS or _parts(t, M, N, K, on.processors)) for t in tiles]
        t, parts = next(((t, n) for t, n in plans if _enough(n * t.count(M, N), on.processors)), plans[-1])
    part = max(ceil_div(ceil_div(K, parts), t.BK), 1) * t.BK
    return t, max(ceil_div(K, part), 1), part


def _clocks(t: Tile, parts: int, operand: str, M: int, N: int, K: int, processors: int) -> float:
    """About how many clocks a gradient of a weight takes: tiles in waves, each as long as its products or as its
    operands take to come from L2; the parts, written and read in float32, and the launch that adds them. The numbers
    are a Hopper's; what they weigh against each other is much the same elsewhere."""
    term = max(t.BM * t.BN / _MULTIPLIED[operand], (t.BM + t.BN) * (2 if operand == "16-bit" else 4) / 48)
    clocks = ceil_div(parts * t.count(M, N), processors) * (K / parts * term + 2000)
    return clocks if parts == 1 else clocks + parts * M * N * 8 / (18 * processors) + 4000


def _parts(t: Tile, M: int, N: int, K: int, processors: int) -> int:
    """Enough to give every processor one, each long beside the writing and reading of its tile; none where a processor
    is spared less than 1024 terms, about the time of the pass that adds the parts."""
    parts = max(1, min(processors // max(t.count(M, N), 1), K // max(512, t.BM * t.BN // 8)))
    return parts if K - K // parts >= 1024 else 1


def nearest(product: str, operand: str, on: Target, shape: tuple[int, int, int]) -> Tile | None:
    """The tile of the nearest measured entry, if there is one within reach."""

    def octaves(entry) -> tuple[float, ...]:
        return tuple(abs(math.log2(max(n, 1) / m)) for n, m in zip(shape, entry[0], strict=True))

    measured = [t for t in tables() if t.device is not None and t.architecture == on.architecture]
    if not measured:
        return None
    device = min(measured, key=lambda t: (t.device != on.name, abs(t.processors - on.processors))).device
    entries = (e for t in measured if t.device == device for e in t.entries.get((operand, product), ()))
    near = [e for e in entries if max(octaves(e)) <= REACH]
    return min(near, key=lambda e: sum(octaves(e)))[1] if near else None


@functools.cache
def tables() -> tuple[Table, ...]:
    """Those of the package, after the one that ``MACARON_OPS_TILES`` names, which must be a device's: the rows of an
    architecture would hide the package's. Raises a ValueError that names the file if it is not."""
    shipped = tuple(map(read, sorted(FOLDER.glob("*.json"))))
    path = os.environ.get("MACARON_OPS_TILES")
    if not path:
        return shipped
    named = read(Path(path))
    if named.device is None:
        raise ValueError(f"MACARON_OPS_TILES={path}: names no device, as the tables of `macaron-ops tune` do")
    return named, *shipped


def read(path: Path) -> Table:
    """Raises a ValueError that names the file if it is no table."""
    try:
        document = json.loads(path.read_text())
        rows = {
            (kind, product): tuple(Tile(**tile) for tile in tiles)
            for kind, products in document.get("rows", {}).items()
            for product, tiles in products.items()
        }
        entries: dict[tuple[str, str], list] = {}
        for e in document.get("entries", []):
            shape = (e["M"], e["N"], e["K"])
            entries.setdefault((e["operand"], e["product"]), []).append((shape, Tile(**e["tile"])))
        head = (document["architecture"], document.get("device"), document.get("processors", 0))
        return Table(*head, rows, {key: tuple(found) for key, found in entries.items()})
    except (OSError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no table of tiles: {error!r}") from error
