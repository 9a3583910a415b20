"""When random particles have become one cluster, against time and temperature: the phase diagram of attention.

Batches of independent uniform starts move by the normalised Euler step of softmax attention, each beta its own run from
the same starts. What is asked of every start is the first time at which all its inner products are above ``close``.
After that it is left alone: with softmax weights and a step of at most 1 the new particles lie in the cone that the old
ones span, so that a cluster never grows again. Setting of ``PUBLISHED``: Geshkovski, Letrouit, Polyanskiy, Rigollet
2023, arXiv 2312.10794, Figure 3 and its code (borjanG/2023-transformers-rotf).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from macaron_ops.ops import sphere_attend_step
from macaron_ops.ops.checks import number, positive_int

from .checks import positive
from .exact import time_to_product
from .measures import uniform
from .observers import smallest_product
from .progress import bar
from .trajectory import read_arrays, write_arrays

__all__ = ["PUBLISHED", "PhaseDiagram", "phase_diagram", "times_to_cluster"]

PUBLISHED = {
    "betas": tuple(round(0.1 * i, 1) for i in range(1, 91)),
    "n": 32,
    "d": 2,
    "batch": 2048,
    "t": 30.0,
    "step": 0.1,
    "close": 0.999,
}
_WORTH = 0.1  # of the starts that are left: how many must have clustered for the others to be moved together


@dataclass
class PhaseDiagram:
    """What :func:`phase_diagram` returns.

    Attributes:
        betas: ``(b,)``, float64.
        arrivals: ``(b, batch)``, float64: when each start had clustered, inf where it has not.
        meta: the settings, as JSON has them.
    """

    betas: Tensor
    arrivals: Tensor
    meta: dict[str, object]

    def share(self, times: Sequence[float] | Tensor) -> Tensor:
        """``(b, times)``: the share of the starts that have clustered by each time."""
        times = torch.as_tensor(times, dtype=torch.float64)
        return (self.arrivals[:, None, :] <= times[None, :, None] * (1 + 1e-9)).double().mean(-1)

    def median(self) -> Tensor:
        """``(b,)``: when half of the starts had clustered, inf where fewer have."""
        return self.arrivals.quantile(0.5, dim=-1, interpolation="higher")

    def orthonormal(self) -> Tensor:
        """``(b,)``: when n particles that begin orthonormal (n <= d) come to ``close``, exactly: where random particles
        of high dimension gather."""
        n, close = self.meta["n"], self.meta["close"]
        return torch.tensor([time_to_product(close, n, beta) for beta in self.betas.tolist()], dtype=torch.float64)

    def save(self, path: str | Path) -> Path:
        """Writes the file, whole or not at all, and returns its path, which ends in ``.npz``."""
        return write_arrays(path, {"betas": self.betas, "arrivals": self.arrivals}, {"phase diagram": self.meta})

    @classmethod
    def load(cls, path: str | Path) -> PhaseDiagram:
        """Reads what :meth:`save` wrote.

        Raises:
            ValueError: it is no such file.
        """
        arrays, meta = read_arrays(path)
        if "phase diagram" not in meta:
            raise ValueError(f"{path}: expected a phase diagram; got another npz of macaron_ops.sphere")
        return cls(arrays["betas"], arrays["arrivals"], meta["phase diagram"])


def phase_diagram(
    betas: Sequence[float] = PUBLISHED["betas"],
    *,
    n: int = 32,
    d: int = 2,
    batch: int = 2048,
    t: float = 30.0,
    step: float = 0.1,
    every: int = 1,
    close: float = 0.999,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    progress: bool = False,
    checkpoint: str | Path | None = None,
) -> PhaseDiagram:
    """When ``batch`` random starts of n particles have clustered, for each beta.

    Args:
        betas: inverse temperatures, one row each. n, d: particles and their coordinates.
        t: until when. step: h, at most 1. every: steps from one look at the products to the next.
        close: the inner product above which all pairs have to be.
        seed: of the starts, which all betas share.
        progress: a bar (needs rich).
        checkpoint: a file to which each beta's row is written when it is done. If it is there, with the same settings,
            its rows are not done again.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
    """
    betas = [number("betas", beta) for beta in betas]
    if not betas:
        raise ValueError("betas: expected at least one; got none")
    settings = {
        "n": positive_int("n", n),
        "d": positive_int("d", d),
        "batch": positive_int("batch", batch),
        "t": positive("t", t),
        "step": _step(step),
        "every": positive_int("every", every),
        "close": _close(close),
        "seed": seed,
        "dtype": str(dtype).removeprefix("torch."),
    }
    x0 = uniform(n, d, batch=(batch,), dtype=dtype, generator=torch.Generator().manual_seed(seed)).to(device)
    rows = {} if checkpoint is None else _rows_in(Path(checkpoint), settings)
    with bar(len(betas), "beta", progress) as show:
        for i, beta in enumerate(betas):
            if beta not in rows:
                rows[beta] = times_to_cluster(x0, beta, t, step, every=every, close=close)
                if checkpoint is not None:
                    _diagram(sorted(rows), rows, settings).save(checkpoint)
            show(i + 1, f"beta {beta:g}: {rows[beta].isfinite().double().mean():.0%} clustered")
    return _diagram(betas, rows, settings)


@torch.no_grad()
def times_to_cluster(x0: Tensor, beta: float, t: float, step: float, *, every: int = 1, close: float = 0.999) -> Tensor:
    """``(batch,)``, float64: the first time at which all products of a start are above ``close``; inf where there is
    none by ``t``.

    Args:
        x0: ``(batch, n, d)``, unit rows.
    """
    step, close = _step(step), _close(close)
    arrivals = torch.full((len(x0),), torch.inf, dtype=torch.float64, device=x0.device)
    places = torch.arange(len(x0), device=x0.device)  # of those that move, in x0
    x, left, steps = x0, torch.ones_like(places, dtype=torch.bool), round(t / step)
    for taken in range(steps + 1):
        if taken % every == 0 or taken == steps:
            arrived = _clustered(x, close) & left
            if arrived.any():
                arrivals[places[arrived]] = taken * step
                left &= ~arrived
                if not left.any():
                    break
                if (~left).double().mean() > _WORTH:
                    x, places, left = x[left], places[left], left[left]
        if taken < steps:
            x = sphere_attend_step(x, step, beta)
    return arrivals


def _clustered(x: Tensor, close: float) -> Tensor:
    """``(batch,)``: all products are above ``close``. Most starts are told by one product, and those that are left by
    the products with the first particle."""
    found = (x[:, -1] * x[:, 0]).sum(-1) > close
    for smallest in (lambda x: (x @ x[:, 0, :, None]).amin((-1, -2)), smallest_product):
        near = found.nonzero().squeeze(-1)
        if len(near):
            found[near] = smallest(x[near]) > close
    return found


def _step(step: float) -> float:
    if positive("step", step) > 1.0:
        raise ValueError(f"step: expected at most 1, up to which a cluster cannot grow again; got {step}")
    return float(step)


def _close(close: float) -> float:
    if not 0.0 < number("close", close) < 1.0:
        raise ValueError(f"close: expected a number between 0 and 1; got {close}")
    return float(close)


def _diagram(betas: Sequence[float], rows: dict[float, Tensor], settings: dict[str, object]) -> PhaseDiagram:
    return PhaseDiagram(
        torch.tensor(list(betas), dtype=torch.float64), torch.stack([rows[beta].cpu() for beta in betas]), settings
    )


def _rows_in(path: Path, settings: dict[str, object]) -> dict[float, Tensor]:
    path = path if path.suffix == ".npz" else path.with_name(f"{path.name}.npz")
    if not path.exists():
        return {}
    there = PhaseDiagram.load(path)
    other = [name for name in settings if there.meta.get(name) != settings[name]]
    if other:
        raise ValueError(
            f"checkpoint: {path} is of a diagram with another {', '.join(other)}; remove it or name another"
        )
    return dict(zip(there.betas.tolist(), there.arrivals, strict=True))
