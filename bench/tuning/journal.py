"""The table that a run writes, whole and valid at every moment: rewritten after every problem, through a rename.

A run that finds its file goes on with it: a problem that has an entry of all candidates, by this Triton, is not tuned
again. An entry is the tile, its time, the present tile's in the same look, and which of ``environments`` it was.
"""

from __future__ import annotations

import datetime
import json
import os
import re
import tempfile
from pathlib import Path

import torch

from macaron_ops.kernels.device import target
from macaron_ops.kernels.tiles import FOLDER, Tile, read

from .. import environment
from ..timing import Clock
from .search import Outcome
from .work import Problem

__all__ = ["Journal", "Unusable", "default_path"]


class Unusable(ValueError):
    """The file cannot be written, or is not this device's table."""


def default_path(device: torch.device) -> Path:
    """Where the package looks for this device's table."""
    return FOLDER / f"{re.sub('[^a-z0-9]+', '-', target(device).name.lower()).strip('-')}.json"


class Journal:
    def __init__(self, path: Path, device: torch.device, clock: Clock) -> None:
        self.path = path
        self._environment = environment.record(device) | {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "clock": type(clock).__name__ + (", CUDA graphs" if device.type == "cuda" else ""),
        }
        on = target(device)
        self._document = {
            "architecture": on.architecture,
            "device": on.name,
            "processors": on.processors,
            "environments": [],
            "entries": [],
        }
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=path.parent):
                pass
        except OSError as error:
            raise Unusable(f"--out {path}: cannot be written ({error.strerror or error})") from None
        if path.exists():
            self._continue()

    def _continue(self) -> None:
        try:
            device = read(self.path).device
        except ValueError as error:
            raise Unusable(f"--out {error}") from None
        if device != self._document["device"]:
            raise Unusable(f"--out {self.path}: holds the tiles of {device or 'an architecture'}; choose another file")
        self._document = json.loads(self.path.read_text())

    @property
    def entries(self) -> list[dict]:
        return self._document["entries"]

    def has(self, problem: Problem) -> bool:
        """Whether the problem was tuned to its end by this version of Triton."""
        entry = next((e for e in self.entries if _key(e) == (problem.product, problem.operand, *problem.shape)), None)
        if entry is None or entry["tried"] < entry["candidates"]:
            return False
        then = self._document["environments"][entry["environment"]]
        return then["versions"]["triton"] == self._environment["versions"]["triton"]

    def add(self, outcome: Outcome) -> None:
        """Writes the outcome in the place of an older one, and the file."""
        problem = outcome.problem
        environments = self._document["environments"]
        if self._environment not in environments:
            environments.append(self._environment)
        entry = {
            "product": problem.product,
            "operand": problem.operand,
            **dict(zip("MNK", problem.shape, strict=True)),
            "dtype": problem.dtype,
            "tile": _as_json(outcome.tile),
            "time": outcome.timings[outcome.tile].as_json(),
            "present": {"tile": _as_json(outcome.present), "time": outcome.timings[outcome.present].as_json()},
            "candidates": outcome.of,
            "tried": outcome.tried,
            "out": outcome.out,
            "environment": environments.index(self._environment),
        }
        kept = [e for e in self.entries if _key(e) != _key(entry)]
        self._document["entries"] = sorted([*kept, entry], key=_key)
        partial = self.path.with_suffix(".json.partial")
        partial.write_text(_dumps(self._document))
        os.replace(partial, self.path)


def _key(entry: dict) -> tuple:
    return (entry["product"], entry["operand"], entry["M"], entry["N"], entry["K"])


def _as_json(tile: Tile) -> dict[str, object]:
    """What differs from the defaults."""
    return {name: value for name, value in tile._asdict().items() if value != Tile._field_defaults.get(name)}


def _dumps(document: dict) -> str:
    """JSON with the innermost objects on one line."""
    text = json.dumps(document, indent=1, allow_nan=False)
    return re.sub(r"\{[^{}\[\]]*\}", lambda found: f"{{{' '.join(found[0][1:-1].split())}}}", text) + "\n"
