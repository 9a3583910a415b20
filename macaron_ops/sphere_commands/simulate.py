"""`macaron-ops sphere simulate`."""

from __future__ import annotations

import argparse
import math
from functools import partial
from pathlib import Path

from .output import output_file

__all__ = ["add"]

_DEFAULTS: dict[str, object] = {
    "particles": 64,
    "dimension": 3,
    "beta": 1.0,
    "heads": 1,
    "weighting": "softmax",
    "descent": False,
    "neurons": 0,
    "activation": "relu",
    "size": 0.15,
    "bias": 0.3,
    "until": 15.0,
    "step": 0.1,
    "scheme": None,
    "tolerance": None,
    "stop_drift": None,
    "normalization": "post",
    "every": 1,
}
PRESETS: dict[str, dict[str, object]] = {
    "clustering": {},
    "metastability": {
        "particles": 200,
        "dimension": 2,
        "beta": 9.0,
        "until": 3000.0,
        "scheme": "rk4",
        "tolerance": 1e-7,
    },
    "perceptron": {"particles": 64, "dimension": 2, "beta": 16.0, "neurons": 8, "until": 40.0},
    "paper": {
        "particles": 500,
        "dimension": 3,
        "beta": 10.0,
        "weighting": "unnormalized",
        "descent": True,
        "neurons": 5,
        "size": 1.0,
        "bias": 0.0,
        "until": 100.0,
        "stop_drift": 1e-4,
        "every": 5,
    },
}
_OBSERVERS = ("drift", "smallest_product", "mean_product", "clusters", "masses", "effective_rank")

_ALL_PAIRS = 20_000  # particles up to which every frame looks at all products

_EXAMPLES = """presets (options beside them win):
  clustering      n=64 on S^2, beta=1, h=.1, T=15: the particles of arXiv 2312.10794 gather in a point
  metastability   n=200 on the circle, beta=9: some sqrt(beta) clusters, which wait exponentially long for one another
                  (arXiv 2410.06833); steps adapt, the axis of time is a logarithm
  perceptron      attention at beta=16 and a ReLU perceptron of 8 neurons on the circle, by Strang splitting
  paper           n=500 on S^2, descent, ReLU, h=.1, until nothing moves faster than 1e-4: arXiv 2601.21366

examples:
  macaron-ops sphere simulate --preset clustering --out results/clustering
  macaron-ops sphere simulate --particles 1000 --beta 9 --neurons 4 --scheme strang_BAB
  macaron-ops sphere simulate --preset metastability --beta 25
  macaron-ops sphere simulate --particles 100000 --until 2 --every 10 --dtype float32 --out results/many

dx_i/dt = P_i u_i(x), with u of self-attention at --beta (Q = K = V = 1) and of a perceptron of --neurons. Unnormalised
attention has the weights exp(beta (<x, y> - 1)) / n here: their largest is 1/n at every beta. --scheme is "euler", the
normalised step (default; one fused kernel), "midpoint", "heun", "rk4", or a splitting scheme with attention as A and
the perceptron as B (default with neurons: strang_BAB; `python examples/splitting_schemes.py` lists them).
--normalization is where the layers normalise, as a law of speed: post, pre, peri, mix, ngpt, ln_scaling.

--out gets simulate.npz (macaron_ops.sphere.Trajectory.load), observed.png (the energy among it, where the field has
one; at most 256 clusters are counted), particles.png on the circle and on S^2, and on S^2 particles.html, which is
turned by dragging. Interrupted? The same command goes on, from checkpoint.npz."""


def add(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "simulate",
        help="particles along attention and a perceptron, measured on the way",
        description=_run.__doc__,
        epilog=_EXAMPLES,
    )
    parser.add_argument("--preset", choices=PRESETS, help="see below (default: clustering)")
    parser.add_argument("--particles", type=int, metavar="N", help="default: 64")
    parser.add_argument("--dimension", type=int, metavar="D", help="2: the circle, 3: S^2, ... (default: 3)")
    parser.add_argument("--beta", type=float, metavar="B", help="inverse temperature (default: 1)")
    parser.add_argument("--weighting", choices=("softmax", "unnormalized"), help="default: softmax")
    parser.add_argument(
        "--descent", action=argparse.BooleanOptionalAction, default=None, help="against the field (default: along)"
    )
    parser.add_argument("--neurons", type=int, metavar="K", help="of the perceptron; 0: attention alone (default: 0)")
    parser.add_argument("--activation", choices=("relu", "gelu", "tanh", "identity"), help="default: relu")
    parser.add_argument("--size", type=float, metavar="S", help="sum of the weights' absolute values (default: 0.15)")
    parser.add_argument("--bias", type=float, metavar="S", help="standard deviation of the biases (default: 0.3)")
    parser.add_argument("--until", type=float, metavar="T", help="the time (default: 15)")
    parser.add_argument("--step", type=float, metavar="H", help="with --tolerance the first one (default: 0.1)")
    parser.add_argument("--scheme", metavar="NAME", help="see below")
    parser.add_argument("--tolerance", type=float, metavar="E", help="adapts the step to this error of each")
    parser.add_argument("--stop-drift", type=float, metavar="V", help="ends when no particle is faster")
    parser.add_argument("--normalization", metavar="LAW", help="see below (default: post)")
    parser.add_argument("--every", type=int, metavar="N", help="steps from a frame to the next (default: 1)")
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float64", help="default: float64")
    parser.add_argument("--seed", type=int, default=0, help="of the perceptron and the start (default: 0)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where results go (default: results/<time>)")
    parser.set_defaults(run=_run)


def _run(given: argparse.Namespace) -> int:
    """Move particles on the unit sphere along self-attention and a perceptron, measure energy, clusters and products on
    the way, and draw it."""
    from .. import cli

    cli._require(("matplotlib", "rich"))
    from ..sphere import simulate

    asked = {name: getattr(given, name) for name in _DEFAULTS if getattr(given, name, None) is not None}
    chosen = {**_DEFAULTS, **PRESETS.get(given.preset, {}), **asked}
    path = output_file(given.out, "simulate.npz")
    field, x0 = cli._ask((ValueError, TypeError), _start, chosen, given)
    run = partial(
        simulate,
        field,
        x0,
        chosen["until"],
        chosen["step"],
        chosen["scheme"] or ("strang_BAB" if chosen["neurons"] else "euler"),
        ascent=not chosen["descent"],
        normalization=chosen["normalization"],
        tolerance=chosen["tolerance"],
        stop_drift=chosen["stop_drift"],
        observers=_observers(chosen),
        every=chosen["every"],
        keep_points=chosen["particles"] <= 5000,
        progress=True,
        checkpoint=path.with_name("checkpoint.npz"),
        checkpoint_every=100,
    )
    trajectory = cli._ask((ValueError, TypeError), run)
    trajectory.save(path)
    path.with_name("checkpoint.npz").unlink()
    pictures = draw(trajectory, field, path.parent, logarithmic=chosen["tolerance"] is not None)
    print("\n".join(_table(trajectory, field)))
    print("\n".join(f"written: {name}" for name in (path, *pictures)))
    return cli.FINISHED


def _start(chosen: dict[str, object], given: argparse.Namespace):
    """The field and the particles that the settings ask for."""
    import torch

    from ..sphere import SelfAttention, random_perceptron, uniform

    draw = torch.Generator().manual_seed(given.seed)
    dtype, d = getattr(torch, given.dtype), chosen["dimension"]
    field = SelfAttention(chosen["beta"], weighting=chosen["weighting"])
    if chosen["weighting"] == "unnormalized":
        field = math.exp(-abs(chosen["beta"])) * field
    if chosen["neurons"]:
        options = {"size": chosen["size"], "bias": chosen["bias"], "generator": draw}
        field = field + random_perceptron(chosen["neurons"], d, chosen["activation"], **options)
    return field, uniform(chosen["particles"], d, dtype=dtype, generator=draw)


def _observers(chosen: dict[str, object]) -> dict[str, object]:
    """Softmax attention climbs the energy of the unnormalised one, but with a perceptron none: then there is no such
    curve."""
    named = dict.fromkeys(_OBSERVERS)
    if chosen["particles"] > _ALL_PAIRS:
        del named["smallest_product"]
    if chosen["weighting"] == "unnormalized":
        return {"energy": None, **named}
    if chosen["neurons"] or chosen["beta"] == 0:
        return named
    scale = math.exp(-abs(chosen["beta"]))

    def energy(field, seen):
        """Of the weights exp(beta (<x, y> - 1))."""
        return scale * field.energy(seen.points)

    return {"energy": energy, **named}


def draw(trajectory, field, folder: Path, logarithmic: bool = False) -> list[Path]:
    """The pictures, where there is something to draw."""
    from ..sphere.pictures import interactive, look, motion

    paths = [look.save(motion.observed(trajectory, logarithmic), folder / "observed.png")]
    d, kept = trajectory.points.shape[-1], len(trajectory.points) == len(trajectory.times)
    if d in (2, 3) and kept:
        drawn = motion.particles(trajectory, field, logarithmic=logarithmic)
        paths.append(look.save(drawn, folder / "particles.png"))
        if d == 3:
            paths.append(interactive.sphere_page(trajectory, field, folder / "particles.html"))
    return paths


def _table(trajectory, field) -> list[str]:
    names = [name for name in trajectory.observed if name != "masses"]
    lines = [f"{field!r}: {trajectory.steps} steps, stopped by {trajectory.stopped}"]
    lines.append("       t  " + "  ".join(f"{name.replace('_', ' '):>16}" for name in names))
    few = max(1, (len(trajectory.times) - 1) // 8)
    chosen = sorted({*range(0, len(trajectory.times), few), len(trajectory.times) - 1})
    for i in chosen:
        values = "  ".join(f"{trajectory.observed[name][i].item():>16.6g}" for name in names)
        lines.append(f"{trajectory.times[i]:>8.4g}  {values}")
    heaviest = [f"{mass:.3f}" for mass in trajectory.observed["masses"][-1].tolist() if mass > 0.0005]
    if heaviest:
        lines.append(f"the heaviest clusters: {' '.join(heaviest[:8])}{' ...' if len(heaviest) > 8 else ''}")
    return lines
