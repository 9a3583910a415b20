"""A run of `macaron-ops tune`: from shapes to problems, in an order that pays soonest, to the table; what it tells."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch

from macaron_ops.kernels.device import target

from .. import numbers
from ..correctness import WrongResult
from ..presets import PRESETS
from ..timing import Clock
from .candidates import candidates
from .journal import Journal
from .search import USUAL, Effort, NotTaken, Outcome, present_tile, search
from .work import PRODUCTS, Problem, problems

__all__ = ["SHAPES", "Summary", "plan", "plan_lines", "run", "told"]

# (tokens, D, F): the FFN half-steps of the models that the benchmarks measure, and narrow ones; the telling ones first.
SHAPES = (
    (16384, 1024, 4096),
    (16384, 512, 2048),
    (16384, 256, 1024),
    (16384, 144, 576),
    (16384, 128, 512),
    (16384, 1024, 2048),
    (16384, 64, 256),
    (2048, 1024, 4096),
    (2048, 512, 2048),
    (256, 1024, 4096),
)


def plan(
    device: torch.device,
    dtypes: Sequence[str],
    products: Sequence[str] = (),
    shapes: Sequence[tuple[int, int, int]] = (),
    presets: Sequence[str] = (),
) -> list[Problem]:
    """The problems: of shapes (M, N, K) as they are, of presets' FFN steps (whole and half hidden width), else of
    ``SHAPES``; each product, or those named."""
    products = products or tuple(PRODUCTS)
    if shapes:
        return [Problem(product, dtype, *shape) for shape in shapes for dtype in dtypes for product in products]
    steps = []
    for preset in (PRESETS[name] for name in presets):
        batch, length = preset.size(device.type, "normal")
        steps += [(batch * length, preset.width, hidden) for hidden in (preset.hidden // 2, preset.hidden)]
    return list(problems(steps or SHAPES, dtypes, products))


def plan_lines(found: Sequence[Problem], device: torch.device) -> list[str]:
    """What a dry run tells: each problem, its present tile and how many others would be tried."""
    on, lines, total = target(device), [], 0
    for problem in found:
        present = present_tile(problem, device)
        rest = candidates(problem.product, problem.operand, on.architecture, problem.shape, present)
        total += len(rest)
        lines.append(f"{problem}: {len(rest)} candidates beside {tile_words(present)}")
    return [*lines, f"{len(found)} problems, {total} candidates on {on.name or on.architecture}"]


def tile_words(tile) -> str:
    """The fields of a tile that differ from their defaults."""
    sides = f"{tile.BM} x {tile.BN} x {tile.BK}, {tile.num_warps} warps, {tile.num_stages} stages"
    extra = [f"{n}={v}" for n, v in tile._asdict().items() if v != tile._field_defaults.get(n, v)]
    return ", ".join([sides, *extra])


class Watch(Protocol):
    """What watches a run; progress.Bar shows it to people."""

    def problem(self, index: int, problem: Problem) -> None: ...
    def step(self, doing: str, share: float) -> None: ...
    def say(self, line: str) -> None: ...


@dataclass
class Summary:
    """How a run ended."""

    path: Path
    outcomes: list[Outcome] = field(default_factory=list)
    before: int = 0  # problems that had their entry already
    left: int = 0  # problems that there was no time for
    wrong: list[str] = field(default_factory=list)  # problems whose present tile computes something else


def run(
    found: Sequence[Problem],
    device: torch.device,
    clock: Clock,
    journal: Journal,
    *,
    seconds: float = float("inf"),
    again: bool = False,
    effort: Effort = USUAL,
    watch: Watch,
) -> Summary:
    """Tunes one problem after another; the table is complete up to the last one at every moment."""
    end, summary = time.monotonic() + seconds, Summary(journal.path)
    for index, problem in enumerate(found):
        if not again and journal.has(problem):
            summary.before += 1
            continue
        if time.monotonic() > end:
            summary.left += 1
            continue
        watch.problem(index, problem)
        try:
            outcome = search(problem, device, clock, effort, lambda: time.monotonic() > end, watch.step)
        except NotTaken as error:
            watch.say(str(error))
            continue
        except WrongResult as error:
            summary.wrong.append(f"{problem}: the present tile is wrong: {error}")
            watch.say(summary.wrong[-1])
            continue
        if outcome is None:
            summary.left += 1
            continue
        journal.add(outcome)
        summary.outcomes.append(outcome)
        watch.say(outcome_line(outcome))
    return summary


def outcome_line(outcome: Outcome) -> str:
    fastest = outcome.timings[outcome.tile]
    kept = outcome.tile == outcome.present
    verdict = "kept" if kept else f"{numbers.times(outcome.speedup)} the speed of {tile_words(outcome.present)}"
    out = ", ".join(f"{count} {reason}" for reason, count in outcome.out.items())
    tried = f"{outcome.tried} of {outcome.of} tried" + (f", out: {out}" if out else "")
    return f"{outcome.problem}: {tile_words(outcome.tile)}, {numbers.seconds(fastest.median)}, {verdict} ({tried})"


def told(summary: Summary) -> list[str]:
    """The end of a run, in sentences."""
    better = [o for o in summary.outcomes if o.tile != o.present]
    lines = [
        f"{len(summary.outcomes)} problems tuned, {len(better)} with a faster tile; {summary.before} were done before."
    ]
    if summary.left:
        lines.append(f"{summary.left} are left: the same command goes on with them.")
    if summary.outcomes:
        lines.append(f"Table: {summary.path}")
    return lines
