"""A run that stands still: its state and the frames that it has, in a file, to be gone on with bit for bit."""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .trajectory import read_arrays, write_arrays

__all__ = ["Frame", "State", "read", "write"]


class State(NamedTuple):
    """All that the next step depends on."""

    taken: int  # steps
    t: float
    h: float  # the next step
    y: Tensor  # (..., n, d): of unit rows, but for laws that have radii
    drift: Tensor  # (...)


class Frame(NamedTuple):
    taken: int
    t: float
    y: Tensor | None
    observed: dict[str, Tensor]


def write(path: Path, state: State, frames: list[Frame], meta: dict) -> None:
    # A step of an adaptive run is a number that JSON could round; arrays hold it.
    arrays = {
        "y": state.y,
        "drift": state.drift,
        "clock": torch.tensor([state.t, state.h], dtype=torch.float64),
        "times": torch.tensor([frame.t for frame in frames], dtype=torch.float64),
        "taken": torch.tensor([frame.taken for frame in frames], dtype=torch.int64),
    }
    if frames and frames[0].y is not None:
        arrays["frames"] = torch.stack([frame.y for frame in frames])
    for name in frames[0].observed if frames else ():
        arrays[f"observed/{name}"] = torch.stack([frame.observed[name] for frame in frames])
    write_arrays(path, arrays, {"steps": state.taken, "settings": meta})


def read(path: Path, meta: dict, device: torch.device) -> tuple[State, list[Frame]]:
    arrays, found = read_arrays(path)
    if "clock" not in arrays:
        raise ValueError(f"checkpoint: {path} is a trajectory, not a checkpoint of a run")
    other = [name for name in meta if found["settings"].get(name) != meta[name]]
    if other:
        raise ValueError(f"checkpoint: {path} is of a run with another {', '.join(other)}; remove it or name another")
    arrays = {name: value.to(device) for name, value in arrays.items()}
    observed = {name.split("/", 1)[1]: value for name, value in arrays.items() if name.startswith("observed/")}
    frames = [
        Frame(
            int(taken),
            float(t),
            arrays["frames"][i] if "frames" in arrays else None,
            {o: observed[o][i] for o in observed},
        )
        for i, (taken, t) in enumerate(zip(arrays["taken"].tolist(), arrays["times"].tolist(), strict=True))
    ]
    t, h = arrays["clock"].tolist()
    return State(found["steps"], t, h, arrays["y"], arrays["drift"]), frames
