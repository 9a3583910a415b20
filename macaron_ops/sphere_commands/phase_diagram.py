"""`macaron-ops sphere phase-diagram`."""

from __future__ import annotations

import argparse
import time
from functools import partial
from pathlib import Path

from .output import output_file

__all__ = ["add"]

PRESETS: dict[str, dict[str, object]] = {
    "published": {},
    "quick": {"batch": 128, "betas": 30},
    "high": {"dimension": 128, "batch": 64, "betas": 30},
}
_DEFAULTS: dict[str, object] = {
    "particles": 32,
    "dimension": 2,
    "batch": 2048,
    "betas": 90,
    "largest": 9.0,
    "until": 30.0,
    "step": 0.1,
    "close": 0.999,
}

_EXAMPLES = """presets (options beside them win):
  published   n=32 on the circle, 2048 starts, 90 betas in .1 to 9, T=30, h=.1, clustered above .999: the setting of
              arXiv 2312.10794 (there in float64). Half a minute on two cores with the native kernels.
  quick       the same with 128 starts and 30 betas: two seconds
  high        d=128: nearly orthonormal starts, which the exact curve tells

examples:
  macaron-ops sphere phase-diagram --preset quick --out results/phase
  macaron-ops sphere phase-diagram --dimension 3 --largest 20
  macaron-ops sphere phase-diagram --out results/phase

Every start moves by x <- S(x + h P u), u softmax attention at beta. A start has clustered when all its inner products
are above --close. The orange curve is the exact time from an orthonormal start (any d >= n), which random particles of
high dimension nearly are; on the circle they wait far longer, and at a large beta for ever longer times, in several
clusters.

Interrupted? The same command goes on. --out gets phase_diagram.npz (macaron_ops.sphere.PhaseDiagram.load),
phase_diagram.png and phase_diagram.html, a page that the pointer reads."""


def add(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "phase-diagram",
        help="when random particles become one cluster, against time and temperature",
        description=_run.__doc__,
        epilog=_EXAMPLES,
    )
    parser.add_argument("--preset", choices=PRESETS, help="see below (default: published)")
    parser.add_argument("--particles", type=int, metavar="N", help="default: 32")
    parser.add_argument("--dimension", type=int, metavar="D", help="2: the circle, 3: S^2, ... (default: 2)")
    parser.add_argument("--batch", type=int, metavar="N", help="starts for each beta (default: 2048)")
    parser.add_argument("--betas", type=int, metavar="N", help="how many, evenly up to the largest (default: 90)")
    parser.add_argument("--largest", type=float, metavar="B", help="the largest beta (default: 9)")
    parser.add_argument("--until", type=float, metavar="T", help="the time (default: 30)")
    parser.add_argument("--step", type=float, metavar="H", help="at most 1 (default: 0.1)")
    parser.add_argument("--close", type=float, metavar="C", help="what all products have to pass (default: 0.999)")
    parser.add_argument("--seed", type=int, default=0, help="of the starts (default: 0)")
    parser.add_argument("--device", default="cpu", help="default: cpu")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where results go (default: results/<time>)")
    parser.set_defaults(run=_run)


def _run(given: argparse.Namespace) -> int:
    """Draw the phase diagram of attention: the share of random starts whose particles have become one cluster, against
    time and inverse temperature, with the exact curve over it."""
    from .. import cli

    cli._require(("matplotlib", "scipy", "rich"))
    from ..sphere import phase_diagram
    from ..sphere.pictures import interactive, look, phase

    asked = {name: getattr(given, name) for name in _DEFAULTS if getattr(given, name) is not None}
    chosen = {**_DEFAULTS, **PRESETS.get(given.preset, {}), **asked}
    path = output_file(given.out, "phase_diagram.npz", goes_on=True)
    began = time.monotonic()
    run = partial(
        phase_diagram,
        _betas(chosen),
        n=chosen["particles"],
        d=chosen["dimension"],
        batch=chosen["batch"],
        t=chosen["until"],
        step=chosen["step"],
        close=chosen["close"],
        seed=given.seed,
        device=given.device,
        progress=True,
        checkpoint=path,
    )
    diagram = cli._ask((ValueError, TypeError), run)
    seconds = time.monotonic() - began
    pictures = (
        look.save(phase.phase_diagram(diagram), path.with_suffix(".png")),
        interactive.phase_page(diagram, path.with_suffix(".html")),
    )
    print("\n".join(_table(diagram)))
    print(f"{len(diagram.betas)} betas of {diagram.meta['batch']:,} starts in {seconds:.1f} s")
    print("\n".join(f"written: {name}" for name in (path, *pictures)))
    return cli.FINISHED


def _betas(chosen: dict[str, object]) -> list[float]:
    """Evenly from the largest / count on: rounded, so that 0.3 is 0.3."""
    from .. import cli
    from ..ops.checks import number, positive_int

    count = cli._ask((ValueError, TypeError), positive_int, "--betas", chosen["betas"])
    largest = cli._ask((ValueError, TypeError), number, "--largest", chosen["largest"])
    return [round(largest * (i + 1) / count, 12) for i in range(count)]


def _table(diagram) -> list[str]:
    end = diagram.meta["t"]
    shares, medians, exact = diagram.share([end / 3, end]).tolist(), diagram.median(), diagram.orthonormal()
    lines = [f"    beta  clustered by t={end / 3:g}  by t={end:g}  half of them at  orthonormal start at"]
    few = max(1, len(shares) // 10)
    for i in range(few - 1, len(shares), few):
        third, whole = shares[i]
        lines.append(f"{diagram.betas[i]:>8.3g}  {third:>18.1%}  {whole:>7.1%}  {medians[i]:>15.3g}  {exact[i]:>20.3g}")
    return lines
