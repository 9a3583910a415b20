"""``simulate``: particles along a field, measured on the way, to be interrupted and gone on with."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from macaron_ops.ops.checks import choice, positive_int
from macaron_ops.splitting import Scheme, to_sphere

from . import checkpoint as file
from .checkpoint import Frame, State
from .checks import points_on_sphere, positive
from .fields import Field
from .flows import Stepper, stepper
from .normalization import Normalization
from .observers import OBSERVERS, Observer, Snapshot
from .progress import bar
from .trajectory import Trajectory, describe

__all__ = ["simulate"]

_CLOSE = 1e-9  # of a step: a remainder of the time that is none
_SMALLEST = 1e-12  # of the time: a step that an adaptive run gives up at


def simulate(
    field: Field,
    x0: Tensor,
    t: float,
    step: float,
    scheme: str | Scheme = "euler",
    *,
    ascent: bool = True,
    substep: str | Mapping[str, str] = "rk4",
    normalization: str | Normalization = "post",
    direction: str = "tangent",
    tolerance: float | None = None,
    stop_drift: float | None = None,
    observers: Iterable[str] | Mapping[str, Observer] = (),
    every: int = 1,
    keep_points: bool = True,
    progress: bool = False,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 1000,
) -> Trajectory:
    """Moves particles on the unit sphere along a field until the time ``t``::

        field = SelfAttention(beta=4.0)
        path = simulate(field, to_sphere(torch.randn(64, 3)), t=15.0, step=0.1, observers=("energy", "clusters"))
        path.times, path.points, path.observed["energy"]

    Args:
        field: the right-hand side.
        x0: ``(..., n, d)``, unit rows; leading dimensions are a batch.
        t: when to end. step: h, with ``tolerance`` the first one.
        scheme: ``"euler"``, the normalised step ``S(x + h v)`` (for attention of one head one call of an operator);
            ``"midpoint"``, ``"heun"`` or ``"rk4"`` on the tangent field; or a splitting scheme, by name or itself, with
            attention as A and perceptrons as B.
        ascent: along the field; False is against it.
        substep: of a splitting scheme: a Runge-Kutta method, or one for each, ``{"A": "heun", "B": "rk4"}``.
        normalization: the law of speed; a splitting scheme has it in each of its substeps, as sublayers have a
            normalisation each.
        direction: ``"ambient"`` leaves the projection out of the Euler step.
        tolerance: adapts the step. Each is done as one and as two halves; their largest difference over ``2^p - 1``
            must be at most this, and the halves are kept.
        stop_drift: ends when no particle moved faster in a step: the largest way over h is at most this.
        observers: names of ``OBSERVERS``, or functions ``(field, snapshot) -> tensor`` by name. They see the field
            itself, also where ``ascent`` is False.
        every: steps from a frame to the next; the last state is always one.
        keep_points: keep the points of every frame, or of the last alone.
        progress: a bar (needs rich).
        checkpoint: an npz that holds the run, written every ``checkpoint_every`` steps, when it ends and when it is
            interrupted. If it is there when the run begins, the run goes on with it, bit for bit as if it had never
            stopped (with as many threads, on the same machine). It must be of the same settings.

    Returns:
        The trajectory. It is differentiable where its inputs are, but for what a checkpoint brought.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it. ``observers``: of a field without an
            energy it was asked for. ``checkpoint``: that of another run.
    """
    if not isinstance(field, Field):
        raise TypeError(f"field: expected a field of macaron_ops.sphere; got {field!r}")
    x0 = points_on_sphere("x0", x0)
    law = normalization if isinstance(normalization, Normalization) else Normalization(normalization)
    if not isinstance(ascent, bool):
        raise TypeError(f"ascent: expected a bool; got {ascent!r}")
    run = _Run(
        field=field,
        law=law,
        stepper=stepper(field if ascent else -field, scheme, substep, law, direction),
        end=positive("t", t),
        step=positive("step", step),
        tolerance=None if tolerance is None else positive("tolerance", tolerance),
        stop_drift=None if stop_drift is None else positive("stop_drift", stop_drift),
        observers=_observers(observers),
        every=positive_int("every", every),
        keep_points=keep_points,
    )
    settings = dict(
        field=field,
        x0=x0,
        t=run.end,
        step=run.step,
        scheme=scheme,
        ascent=ascent,
        substep=substep,
        normalization=asdict(law),
        direction=direction,
        tolerance=run.tolerance,
        stop_drift=run.stop_drift,
        observers=run.observers,
        every=every,
        keep_points=keep_points,
    )
    meta = describe(settings) | {"about": repr(field)}
    state = State(0, 0.0, run.step, law.start(x0), x0.new_full(x0.shape[:-2], torch.nan))
    frames: list[Frame] = []
    if checkpoint is not None:
        checkpoint = Path(checkpoint)
        positive_int("checkpoint_every", checkpoint_every)
        if checkpoint.exists():
            state, frames = file.read(checkpoint, meta, x0.device)
    return _finish(run, *_loop(run, state, frames, meta, checkpoint, checkpoint_every, progress), meta)


@dataclass(frozen=True)
class _Run:
    field: Field
    law: Normalization
    stepper: Stepper
    end: float
    step: float
    tolerance: float | None
    stop_drift: float | None
    observers: dict[str, Observer]
    every: int
    keep_points: bool

    def advance(self, s: State) -> State:
        """One step, which ends no later than the time where the law jumps."""
        end = min((b for b in (*self.law.breaks, self.end) if b > s.t), default=self.end)
        h, following, y = self._moved(s, end)
        last = end - (s.t + h) <= _CLOSE * h
        way = to_sphere(y.detach()) - to_sphere(s.y.detach())
        drift = torch.linalg.vector_norm(way, dim=-1).amax(-1) / h
        return State(s.taken + 1, end if last else s.t + h, following, y, drift)

    def _moved(self, s: State, end: float) -> tuple[float, float, Tensor]:
        """The step that was taken, the next one, and where it led."""
        h = _until(s.t, end, s.h)
        if self.tolerance is None:
            return h, s.h, self.stepper.advance(s.t, s.y, h)
        power, meant = 1.0 / (self.stepper.order + 1), s.h
        while True:
            y, error = self.stepper.doubled(s.t, s.y, h)
            if error <= self.tolerance:
                factor = min(5.0, 0.9 * (self.tolerance / error) ** power) if error > 0.0 else 5.0
                # A step that the end cut short says nothing against the longer one that was meant.
                return h, max(h * factor, meant if h < meant else 0.0), y
            h *= max(0.2, 0.9 * (self.tolerance / error) ** power) if math.isfinite(error) else 0.2
            meant = h
            if h <= _SMALLEST * self.end:
                raise ValueError(
                    f"tolerance: {self.tolerance:g} is not met at t = {s.t:g} by steps of {h:.1g} in {s.y.dtype}"
                )

    def over(self, s: State) -> str | None:
        if self.stop_drift is not None and s.taken and bool((s.drift <= self.stop_drift).all()):
            return "drift"
        return "time" if s.t >= self.end else None

    def told(self, s: State) -> str:
        """Beside the bar, now and then: the drift of a GPU's particles has to be fetched."""
        return "" if s.taken % 16 else f"h = {s.h:.3g}, drift {s.drift.max().item():.2g}"

    def frame(self, s: State) -> Frame:
        seen = Snapshot(s.t, to_sphere(s.y), s.drift)
        observed = {name: observer(self.field, seen) for name, observer in self.observers.items()}
        return Frame(s.taken, s.t, s.y if self.keep_points else None, observed)


def _until(t: float, end: float, h: float) -> float:
    """h, or what is left; a remainder of rounding belongs to the step before it."""
    left = end - t
    return h if left > h * (1.0 + _CLOSE) or abs(left - h) <= _CLOSE * h else left


def _loop(
    run: _Run, state: State, frames: list[Frame], meta: dict, checkpoint: Path | None, often: int, progress: bool
) -> tuple[State, list[Frame], str]:
    try:
        with bar(run.end, "t", progress) as show:
            while True:
                why = run.over(state)
                if (why or state.taken % run.every == 0) and not (frames and frames[-1].taken == state.taken):
                    frames.append(run.frame(state))
                if why:
                    break
                if checkpoint is not None and state.taken and state.taken % often == 0:
                    file.write(checkpoint, state, frames, meta)
                state = run.advance(state)  # one assignment: an interrupt leaves a whole state
                show(state.t, run.told(state) if progress else "")
    except KeyboardInterrupt:
        if checkpoint is not None:
            file.write(checkpoint, state, frames, meta)
        raise
    if checkpoint is not None:
        file.write(checkpoint, state, frames, meta)
    return state, frames, why


def _finish(run: _Run, state: State, frames: list[Frame], why: str, meta: dict) -> Trajectory:
    kept = torch.stack([frame.y for frame in frames]) if run.keep_points else state.y[None]
    radii = torch.linalg.vector_norm(kept, dim=-1) if run.law.name in ("pre", "peri", "mix") else None
    return Trajectory(
        times=torch.tensor([frame.t for frame in frames], dtype=torch.float64),
        points=to_sphere(kept) if radii is not None else kept,
        radii=radii,
        observed={name: torch.stack([frame.observed[name] for frame in frames]) for name in run.observers},
        steps=state.taken,
        stopped=why,
        meta=meta,
    )


def _observers(given: Iterable[str] | Mapping[str, Observer]) -> dict[str, Observer]:
    if isinstance(given, str):
        raise TypeError(f"observers: expected several names, ({given!r},); got {given!r}")
    named = given if isinstance(given, Mapping) else {name: None for name in given}
    for name, observer in named.items():
        if observer is None:
            choice("observers", name, tuple(OBSERVERS))
    return {name: OBSERVERS[name] if observer is None else observer for name, observer in named.items()}
