"""How the tile of one product and shape is chosen.

Every candidate is compiled (one that breaks a rule of ``kernels.offline.faults`` is out), checked against the float64
definition by the rule of the benchmarks (one that computes something else is out), and then timed, interleaved with the
present tile: first all of them briefly, a few at a time, then the schedules of the best, then the best again, for
longer. On a GPU a call reads its operands from memory, as in the benchmarks: copies of them are taken in turn. The
present tile is replaced only by one whose 80th percentile lies below its 20th in that last look, for the noise of
neither explains it, and which breaks no rule in the other uses of the same entry (dropout, each activation).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from macaron_ops.kernels.device import Launch, Target, recording, target
from macaron_ops.kernels.offline import TARGETS, compile_for, faults, resources
from macaron_ops.kernels.tiles import Tile, tile, using

from ..compare import IMPROVEMENT, verdict
from ..correctness import WrongResult, Yardstick
from ..group import Ready, copies, in_turn
from ..kernel_calls import DTYPES, multiplying
from ..timing import Budget, Clock, Timing, measure, replay, speedup
from .candidates import candidates, schedules
from .work import Problem, Work, other_uses

__all__ = ["USUAL", "Attempt", "Effort", "NotTaken", "Outcome", "Progress", "present_tile", "search"]

Progress = Callable[[str, float], None]  # what is being done, and the share of the problem that is behind


class NotTaken(Exception):
    """At this shape the launcher goes another way than by the product's tile."""


@dataclass(frozen=True)
class Effort:
    """How long to look: at every candidate, and at the finalists. ``at_once`` candidates are timed together."""

    brief: Budget = Budget(seconds=0.05, min_rounds=5, max_rounds=30)
    long: Budget = Budget(seconds=0.5, min_rounds=15)
    finalists: int = 3
    at_once: int = 4


USUAL = Effort()


@dataclass(frozen=True)
class Attempt:
    """The work with a tile. On CUDA what is timed is its replay."""

    work: Work
    product: str
    tile: Tile

    def __call__(self):
        with using(self.product, self.tile):
            return self.work()


@dataclass
class Outcome:
    """What was found of a problem: the fastest tile, what each finalist took, and why the others are out."""

    problem: Problem
    present: Tile
    tile: Tile
    timings: dict[Tile, Timing]
    tried: int
    of: int
    out: dict[str, int] = field(default_factory=dict)  # the reason -> how many

    def rule_out(self, reason: str) -> None:
        self.out[reason] = self.out.get(reason, 0) + 1

    @property
    def complete(self) -> bool:
        return self.tried == self.of

    @property
    def speedup(self) -> float:
        return self.timings[self.present].median / self.timings[self.tile].median


def present_tile(problem: Problem, device: torch.device) -> Tile:
    with multiplying(problem.dtype):
        return tile(problem.product, DTYPES[problem.dtype], device, *problem.shape)


def search(
    problem: Problem,
    device: torch.device,
    clock: Clock,
    effort: Effort,
    time_is_up: Callable[[], bool] = lambda: False,
    progress: Progress = lambda doing, share: None,
) -> Outcome | None:
    """None where time was up before any candidate was timed. Raises WrongResult if the present tile is wrong."""
    on = target(device)
    with multiplying(problem.dtype):
        work = Work.of(problem, device)
        yardstick = work.yardstick()
        present = present_tile(problem, device)
        yardstick.check(Attempt(work, problem.product, present)())
        rest = candidates(problem.product, problem.operand, on.architecture, problem.shape, present)
        constants = [[x.constants for x in _launches(work, problem, t, on)] for t in (present, *rest[-1:])]
        if rest and constants[0] == constants[1]:
            raise NotTaken(f"{problem}: the few tiles of this shape are cut in parts, by the tile of that product")
        outcome = Outcome(problem, present, present, {}, 0, len(rest))
        works = [work, *(work.copy() for _ in range(copies(work.nbytes, device) - 1))]
        look = functools.partial(_brief_looks, outcome, works, yardstick, device, clock, effort, time_is_up, progress)
        found = look(rest)
        if rest and not outcome.tried:
            return None
        if found and not time_is_up():
            more = schedules(problem.product, on.architecture, max(found, key=found.get))
            more = [t for t in more if t not in (present, *found)]
            outcome.of += len(more)
            found |= look(more)
        finalists = sorted(found, key=found.get, reverse=True)[: effort.finalists]
        progress("the best again", 0.9)
        outcome.timings = _timings(
            [present, *finalists], works, problem, device, clock, effort.long,
            lambda share: progress("the best again", 0.9 + 0.1 * share),
        )  # fmt: skip
        faster = (t for t in finalists if _is_faster(outcome.timings[t], outcome.timings[present]))
        in_order = sorted(faster, key=lambda t: outcome.timings[t].median)
        outcome.tile = next((t for t in in_order if _serves(t, outcome, on)), present)
    return outcome


def _is_faster(one: Timing, other: Timing) -> bool:
    return verdict({"time": one.as_json()}, {"time": other.as_json()}) == IMPROVEMENT


def _brief_looks(
    outcome: Outcome,
    works: Sequence[Work],
    yardstick: Yardstick,
    device: torch.device,
    clock: Clock,
    effort: Effort,
    time_is_up: Callable[[], bool],
    progress: Progress,
    rest: list[Tile],
) -> dict[Tile, float]:
    """The present tile's time over that of each candidate that may run, as far as time allows."""
    found: dict[Tile, float] = {}
    for begin in range(0, len(rest), effort.at_once):
        able = []
        for t in rest[begin : begin + effort.at_once]:
            if time_is_up():
                break
            progress(f"{t.BM} x {t.BN} x {t.BK}", 0.9 * outcome.tried / outcome.of)
            reason = _why_not(t, works[0], yardstick, outcome.problem, device)
            outcome.tried += 1
            if reason is None:
                able.append(t)
            else:
                outcome.rule_out(reason)
        if able:
            timings = _timings([outcome.present, *able], works, outcome.problem, device, clock, effort.brief)
            found |= {t: speedup(timings[t], timings[outcome.present])["median"] for t in able}
        if time_is_up():
            break
    return found


def _why_not(t: Tile, work: Work, yardstick: Yardstick, problem: Problem, device: torch.device) -> str | None:
    """Why a tile is out: a rule that its kernel breaks, what the compiler says, a wrong result."""
    on = target(device)
    try:
        if _breaks_a_rule(_launches(work, problem, t, on), on):
            return "breaks a rule"
        yardstick.check(Attempt(work, problem.product, t)())
    except WrongResult:
        return "wrong"
    except Exception as error:  # what a compiler or a driver says of a tile that it cannot take is of many kinds
        return type(error).__name__
    return None


def _serves(t: Tile, outcome: Outcome, on: Target) -> bool:
    """Whether a tile breaks no rule in the other uses that the entry will have."""
    with using(outcome.problem.product, t), recording(*on) as launches:
        for use in other_uses(outcome.problem):
            use()
    try:
        broken = _breaks_a_rule(launches, on)
    except Exception:  # as of a candidate
        broken = True
    if broken:
        outcome.rule_out("breaks a rule in another use")
    return not broken


def _breaks_a_rule(launches: Sequence[Launch], on: Target) -> bool:
    """By what the compiled kernels use; the interpreter's have no machine code."""
    arch = on.architecture
    return arch in TARGETS and any(faults(resources(compile_for(x, arch)), x, arch) for x in launches)


def _launches(work: Work, problem: Problem, t: Tile, on: Target) -> list[Launch]:
    """What the work would start with a tile."""
    with recording(*on) as launches:
        Attempt(work, problem.product, t)()
    return launches


def _timings(
    tiles: Sequence[Tile],
    works: Sequence[Work],
    problem: Problem,
    device: torch.device,
    clock: Clock,
    budget: Budget,
    on_round: Callable[[float], None] = lambda share: None,
) -> dict[Tile, Timing]:
    """Of one call with each tile, on the copies of the work in turn."""
    calls = {}
    for t in tiles:
        call = in_turn([Ready(Attempt(work, problem.product, t)) for work in works]).call
        calls[t] = call if device.type != "cuda" else replay(call, device, len(works))
    timings = measure({str(t): call for t, call in calls.items()}, clock, budget, on_round)
    return {t: timings[str(t)].of_each(len(works)) for t in tiles}
