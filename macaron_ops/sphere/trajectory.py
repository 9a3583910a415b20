"""A simulation's record, and its file: one npz whose entry ``meta`` is JSON."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from macaron_ops.splitting import Scheme

from .fields import Field
from .primitives import Activation

__all__ = ["Trajectory", "describe", "read_arrays", "write_arrays"]

FORMAT = 1


@dataclass
class Trajectory:
    """What :func:`simulate` returns.

    Attributes:
        times: ``(frames,)``, float64.
        points: ``(frames, ..., n, d)``, unit rows; with ``keep_points=False`` the last frame alone.
        radii: ``(frames, ..., n)`` under a law whose radii change, else None; kept as points are.
        observed: for each observer ``(frames, ...)``.
        steps: steps that were taken. stopped: why it ended, ``"time"`` or ``"drift"``.
        meta: the settings, as JSON has them.
    """

    times: Tensor
    points: Tensor
    radii: Tensor | None
    observed: dict[str, Tensor]
    steps: int
    stopped: str
    meta: dict[str, object] = field(default_factory=dict)

    @property
    def final(self) -> Tensor:
        """The last points, ``(..., n, d)``."""
        return self.points[-1]

    def save(self, path: str | Path) -> Path:
        """Writes the file, whole or not at all.

        Returns:
            Its path, which ends in ``.npz``.
        """
        arrays = {"times": self.times, "points": self.points}
        arrays |= {"radii": self.radii} if self.radii is not None else {}
        arrays |= {f"observed/{name}": value for name, value in self.observed.items()}
        return write_arrays(path, arrays, {"steps": self.steps, "stopped": self.stopped, "settings": self.meta})

    @classmethod
    def load(cls, path: str | Path) -> Trajectory:
        """Reads what :meth:`save` wrote, in the dtypes that it had.

        Raises:
            ValueError: it is no such file.
        """
        arrays, meta = read_arrays(path)
        if "points" not in arrays:
            raise ValueError(f"{path} is a checkpoint of a run, not a trajectory; simulate goes on with it")
        observed = {name.split("/", 1)[1]: arrays[name] for name in arrays if name.startswith("observed/")}
        return cls(
            arrays["times"],
            arrays["points"],
            arrays.get("radii"),
            observed,
            meta["steps"],
            meta["stopped"],
            meta["settings"],
        )


def write_arrays(path: str | Path, arrays: Mapping[str, Tensor], meta: Mapping[str, object]) -> Path:
    """An npz beside its place, then moved there: who is interrupted leaves the old file. bfloat16, which numpy has not,
    is written as float32, which holds it."""
    path = Path(path)
    path = path if path.suffix == ".npz" else path.with_name(f"{path.name}.npz")
    dtypes = {name: str(value.dtype).removeprefix("torch.") for name, value in arrays.items()}
    plain = {name: _numpy(value) for name, value in arrays.items()}
    text = json.dumps({"format": FORMAT, "dtypes": dtypes, **meta})
    beside = path.with_name(f"{path.name}.part")
    with open(beside, "wb") as file:
        np.savez_compressed(file, meta=np.array(text), **plain)
    os.replace(beside, path)
    return path


def read_arrays(path: str | Path) -> tuple[dict[str, Tensor], dict[str, object]]:
    """What :func:`write_arrays` wrote."""
    try:
        with np.load(path, allow_pickle=False) as file:
            meta = json.loads(str(file["meta"]))
            arrays = {name: torch.from_numpy(file[name]) for name in file.files if name != "meta"}
        dtypes = meta["dtypes"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: expected an npz that macaron_ops.sphere wrote ({error})") from None
    if meta.get("format") != FORMAT:
        raise ValueError(f"{path}: expected format {FORMAT}; got {meta.get('format')}")
    return {name: value.to(getattr(torch, dtypes[name])) for name, value in arrays.items()}, meta


def _numpy(value: Tensor) -> np.ndarray:
    value = value.detach().cpu()
    return (value.float() if value.dtype == torch.bfloat16 else value).numpy()


def describe(value: object) -> object:
    """A setting as JSON, in which two settings are equal if and only if they are: tensors by a digest of their bytes,
    fields by their arguments, functions by their names."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor):
        plain = value.detach().cpu().contiguous()
        digest = hashlib.sha256(plain.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()[:16]
        return {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch."), "sha256": digest}
    if isinstance(value, Activation):
        return value.name
    if isinstance(value, Scheme):
        return {"name": value.name, "stages": describe(list(value.weighted))}
    if isinstance(value, Field):
        return {"field": type(value).__name__, **{name: describe(v) for name, v in vars(value).items()}}
    if isinstance(value, Mapping):
        return {str(name): describe(v) for name, v in value.items()}
    if isinstance(value, (tuple, list)):
        return [describe(v) for v in value]
    if isinstance(value, complex):
        return [value.real, value.imag]
    return getattr(value, "__qualname__", None) or repr(value)
