"""Tile sizes as data: which tile a product takes on which device, with which operands, in which shape.

The tables are the JSON files of ``tuned/``. A device's holds what ``macaron-ops tune`` measured there: an entry a
shape, with its time and the environment. A shape takes the nearest entry of its device, else of the device of its
architecture that is nearest in processors; an entry more than ``REACH`` octaves away in M, N or K is not near. Where
none is, the architecture's file has a row of tiles, the largest first: the first that gives every processor at least
one is taken, else the last. A large tile reads least, a small one keeps the device busy. Those rows are chosen by
compilation, not timed. ``MACARON_OPS_TILES`` names another device's file to be read beside them.
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

from .device import Seen, ceil_div, processors, seen
from .product import precision

__all__ = ["FOLDER", "PRODUCTS", "Table", "Tile", "nearest", "operand", "read", "splits", "tables", "tile", "using"]

FOLDER = Path(__file__).with_name("tuned")
PRODUCTS = ("hidden", "gated", "hidden_backward", "linear", "weight", "narrow", "narrow_dropout")
REACH = 2.0  # octaves


class Tile(NamedTuple):
    BM: int
    BN: int
    BK: int
    num_warps: int
    num_stages: int
    GROUP: int = 8  # rows of tiles that are walked together

    def count(self, M: int, N: int) -> int:
        return ceil_div(M, self.BM) * ceil_div(N, self.BN)

    def constants(self) -> dict[str, int]:
        """The arguments of a kernel with a main loop over k."""
        return _constants(self)[0]

    def with_slices(self) -> dict[str, int]:
        """The same for one whose epilogue works slice by slice: 16 elements a thread."""
        return _constants(self)[1]


@functools.cache
def _constants(tile: Tile) -> tuple[dict[str, int], dict[str, int]]:
    slices = max(1, min(tile.BM * tile.BN // (512 * tile.num_warps), 8))
    return tile._asdict(), {**tile._asdict(), "SLICES": slices}


class Table(NamedTuple):
    """One file of ``tuned/``, by operand and product."""

    architecture: str
    device: str | None  # None: the rows of an architecture, not measured
    processors: int
    rows: dict[tuple[str, str], tuple[Tile, ...]]
    entries: dict[tuple[str, str], tuple[tuple[tuple[int, int, int], Tile], ...]]


def operand(dtype: torch.dtype) -> str:
    """What a table distinguishes of a product's operands: 16-bit, tf32 or float32."""
    return "16-bit" if dtype.itemsize == 2 else "tf32" if precision(dtype) == "tf32" else "float32"


def tile(product: str, dtype: torch.dtype, device: torch.device, M: int, N: int, K: int) -> Tile:
    """The tile of a product with an (M, N) result, a sum over K and operands of ``dtype``."""
    return _using.get(product) or _tile(product, operand(dtype), seen(device), M, N, K)


_using: dict[str, Tile] = {}


@contextmanager
def using(product: str, tile: Tile) -> Iterator[None]:
    """Inside, the product takes that tile whatever the tables say."""
    _using[product] = tile
    try:
        yield
    finally:
        del _using[product]


@functools.lru_cache(1 << 14)
def _tile(product: str, operand: str, on: Seen, M: int, N: int, K: int) -> Tile:
    entry = nearest(product, operand, on, (M, N, K))
    if entry is not None:
        return entry
    tiles = next(t for t in tables() if t.device is None and t.architecture == on.architecture).rows[operand, product]
    return next((t for t in tiles if t.count(M, N) >= on.processors), tiles[-1])


def nearest(product: str, operand: str, on: Seen, shape: tuple[int, int, int]) -> Tile | None:
    """The tile of the nearest measured entry, if there is one within reach."""

    def octaves(entry) -> tuple[float, ...]:
        return tuple(abs(math.log2(max(n, 1) / m)) for n, m in zip(shape, entry[0], strict=True))

    measured = [t for t in tables() if t.device is not None and t.architecture == on.architecture]
    if not measured:
        return None
    table = min(measured, key=lambda t: (t.device != on.name, abs(t.processors - on.processors)))
    near = [e for e in table.entries.get((operand, product), ()) if max(octaves(e)) <= REACH]
    return min(near, key=lambda e: sum(octaves(e)))[1] if near else None


@functools.cache
def tables() -> tuple[Table, ...]:
    """Those of the package, after the one that ``MACARON_OPS_TILES`` names."""
    named = os.environ.get("MACARON_OPS_TILES")
    return tuple(map(read, ([Path(named)] if named else []) + sorted(FOLDER.glob("*.json"))))


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


def splits(tiles: int, length: int, device: torch.device) -> int:
    """Into how many parts the sum of a product with few tiles is cut: enough to give every processor one, each part
    at least 512 long."""
    return max(1, min(processors(device) // max(tiles, 1), length // 512))
