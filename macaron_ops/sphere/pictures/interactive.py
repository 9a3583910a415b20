"""Pages to be turned and pointed at: particles on S^2, the phase diagram. One file each, which needs no network."""

from __future__ import annotations

import html
import json
import math
from pathlib import Path

import torch

from macaron_ops.sphere.fields import Field
from macaron_ops.sphere.phase_diagram import PhaseDiagram
from macaron_ops.sphere.trajectory import Trajectory

from .motion import perceptron_of

__all__ = ["phase_page", "sphere_page"]

_HERE = Path(__file__).parent
_FRAMES, _PARTICLES, _PATCHES, _TIMES = 240, 1000, 2500, 150


def sphere_page(path: Trajectory, field: Field, to: Path | str) -> Path:
    """Writes a page with particles on S^2 that is turned by dragging, a slider for the time, the potential behind.

    Args:
        path: with its points kept, ``(frames, n, 3)``; at most 240 frames of 1000 particles are in the page.

    Raises:
        ValueError: other points.
    """
    points = path.points
    if points.dim() != 3 or points.shape[-1] != 3 or len(points) != len(path.times):
        raise ValueError(f"path: expected all frames of one cloud on S^2, (frames, n, 3); got {tuple(points.shape)}")
    frames = torch.linspace(0, len(points) - 1, min(_FRAMES, len(points))).round().long()
    data = {"times": path.times[frames].tolist(), "points": _rounded(points[frames, :_PARTICLES])}
    perceptron = perceptron_of(field)
    if perceptron is not None:
        patches = _even(_PATCHES)
        v = perceptron.potential(patches.to(perceptron.a)).detach().cpu()
        data["potential"] = list(zip(_rounded(patches), _rounded((v - v.min()) / (v.max() - v.min())), strict=True))
    about = f"{points.shape[-2]} particles of {field!r}. Drag to turn; faint ones are behind."
    return _page(to, "Particles on the sphere", about, 1000, "sphere.js", data)


def phase_page(diagram: PhaseDiagram, to: Path | str) -> Path:
    """Writes a page with the phase diagram: the pointer reads it, a click draws the curve of one beta."""
    end = diagram.meta["t"]
    times = (torch.arange(_TIMES, dtype=torch.float64) + 0.5) * (end / _TIMES)
    data = {
        "betas": diagram.betas.tolist(),
        "times": times.tolist(),
        "end": end,
        "share": (100 * diagram.share(times)).round(decimals=1).tolist(),
        "median": [None if math.isinf(t) else t for t in diagram.median().tolist()],
        "exact": diagram.orthonormal().tolist(),
    }
    n, d, batch = (diagram.meta[name] for name in ("n", "d", "batch"))
    about = (
        f"The share of {batch:,} uniform starts of {n} particles (d = {d}) that have become one cluster. Dotted: half "
        "of them. Orange: the exact time from an orthonormal start, which random points of high dimension nearly are."
    )
    return _page(to, "Phase diagram of clustering", about, 760, "phase.js", data)


def _page(to: Path | str, title: str, about: str, height: int, script: str, data: dict[str, object]) -> Path:
    text = (_HERE / "page.html").read_text()
    filled = {
        "TITLE": html.escape(title),
        "ABOUT": html.escape(about),
        "HEIGHT": str(height),
        "SCRIPT": (_HERE / script).read_text(),
        "DATA": json.dumps(data, separators=(",", ":"), allow_nan=False),
    }
    for name, value in filled.items():
        text = text.replace(name, value)
    to = Path(to)
    to.parent.mkdir(parents=True, exist_ok=True)
    to.write_text(text)
    return to


def _rounded(values: torch.Tensor) -> list:
    return values.double().mul(1e4).round().div(1e4).tolist()


def _even(count: int) -> torch.Tensor:
    """Points spread evenly over S^2: a spiral that turns by the golden angle."""
    i = torch.arange(count, dtype=torch.float64) + 0.5
    z, around = 1 - 2 * i / count, i * (math.pi * (3 - math.sqrt(5)))
    r = (1 - z.square()).sqrt()
    return torch.stack([r * around.cos(), r * around.sin(), z], dim=-1)
