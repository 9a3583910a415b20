"""`macaron-ops sphere critical-points`."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

from .output import output_file

__all__ = ["add"]

PRESETS: dict[str, dict[str, object]] = {
    "circle": {"descent": True, "beta": [4.0, 16.0, 64.0, 256.0], "starts": 4},
    "circle-ascent": {"descent": False, "beta": [4.0, 16.0, 64.0, 256.0], "starts": 4},
    "potential": {
        "dimension": 3,
        "particles": 1,
        "beta": [],
        "activation": "tanh",
        "starts": 64,
        "every_kind": True,
    },
    "saddles": {"dimension": 2, "particles": 8, "beta": [4.0], "neurons": 0, "starts": 64, "every_kind": True},
    "paper": {
        "dimension": 3,
        "particles": 500,
        "descent": True,
        "beta": [0.01, 0.1, 1.0, 10.0, 50.0],
        "neurons": 5,
        "activation": "relu",
        "size": 1.0,
        "bias": 0.0,
        "threshold": 0.5,
        "starts": 1,
    },
}
_DEFAULTS: dict[str, object] = {
    "dimension": 2,
    "particles": 32,
    "descent": False,
    "beta": [16.0],
    "neurons": 8,
    "activation": "relu",
    "size": 0.15,
    "bias": 0.3,
    "starts": 8,
    "steps": 500,
    "every_kind": False,
    "threshold": 0.01,
}
_LARGEST = 700.0
_ACTIVATIONS = ("relu", "gelu", "tanh", "identity")

_EXAMPLES = """presets (options beside them win):
  circle          repelling particles on the circle with a perceptron: many atoms, none heavier than 0.5742
  circle-ascent   attracting ones: atoms at the maxima of the potential
  potential       one particle on S^2 without attention: every critical point of the perceptron's potential
  saddles         attention alone, 8 particles on the circle: its saddles by bare Newton steps
  paper           N=500 on S^2, descent, ReLU, beta .01 to 50, the settings of arXiv 2601.21366 (1000 x 1000 Hessians:
                  half a minute on two cores)

examples:
  macaron-ops sphere critical-points --preset circle --out results/circle
  macaron-ops sphere critical-points --beta 4 --beta 64 --neurons 3 --activation gelu --descent
  macaron-ops sphere critical-points --preset potential --seed 3

The energy is 1/(2 beta n^2) sum exp(beta (<x_i, x_j> - 1)) + 1/(2n) sum v(x_i), with the perceptron's potential v:
attention's weights have their largest value 1 at every beta, so that neither part drowns the other. Particles flow
from uniform starts up this energy (--descent: down), then Newton's method on the sphere takes over, and the
eigenvalues of the Riemannian Hessian say what the point is: a maximum or a minimum of the energy is strict up to
rotations, and "unstable" counts the directions in which the flow leaves. An atom is a chain of particles with links of
at most min(c / sqrt(beta), pi / (2 d)), c of --threshold: 0.01 asks for particles in one point.

Down the energy on the circle no arc of 1 / (2 sqrt(beta)) holds more than the second derivative allows at a strict
minimum: the dotted line of atoms.png. It is below 0.5742 (dashed; the published one, for large beta) where the
perceptron is small against attention, as with --size 0.15; --size 1 goes beyond. Up the energy all may be in one.

--out gets critical_points.json (all settings; each point's kind, energy, spectrum, atoms), atoms.png against beta,
and potential.png on the circle and on S^2."""


def add(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "critical-points",
        help="where flows of attention and perceptrons end: atoms, their masses, their stability",
        description=_run.__doc__,
        epilog=_EXAMPLES,
    )
    parser.add_argument("--preset", choices=PRESETS, help="see below")
    parser.add_argument("--beta", type=float, action="append", metavar="B", help="may be given again (default: 16)")
    parser.add_argument("--particles", type=int, metavar="N", help="default: 32")
    parser.add_argument("--dimension", type=int, metavar="D", help="2: the circle, 3: S^2, ... (default: 2)")
    parser.add_argument(
        "--descent", action=argparse.BooleanOptionalAction, default=None, help="down the energy (default: up)"
    )
    parser.add_argument("--neurons", type=int, metavar="K", help="of the perceptron; 0: attention alone (default: 8)")
    parser.add_argument("--activation", choices=_ACTIVATIONS, help="default: relu")
    parser.add_argument("--size", type=float, metavar="S", help="sum of the weights' absolute values (default: 0.15)")
    parser.add_argument("--bias", type=float, metavar="S", help="standard deviation of the biases (default: 0.3)")
    parser.add_argument("--starts", type=int, metavar="N", help="for each beta (default: 8)")
    parser.add_argument("--steps", type=int, metavar="N", help="of the flow, at most (default: 500)")
    parser.add_argument(
        "--every-kind", action="store_true", default=None, help="bare Newton steps from the starts: saddles, too"
    )
    parser.add_argument("--threshold", type=float, metavar="C", help="of the atoms (default: 0.01)")
    parser.add_argument("--seed", type=int, default=0, help="of the perceptron and the starts (default: 0)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where results go (default: results/<time>)")
    parser.set_defaults(run=_run)


def _run(given: argparse.Namespace) -> int:
    """Find critical points of the energy of attention and a perceptron on the sphere from many starts, tell maxima from
    saddles, and draw their atoms against beta."""
    from .. import cli

    cli._require(("matplotlib",))
    settings = _settings(given)
    path = output_file(given.out, "critical_points.json")
    found = cli._ask((ValueError, TypeError), search, settings)
    path.write_text(
        json.dumps({"settings": settings, "points": [row for rows in found.rows for row in rows]}, indent=1)
    )
    pictures = draw(settings, found, path.parent)
    print("\n".join(_table(settings, found)))
    print("\n".join(f"written: {name}" for name in (path, *pictures)))
    return cli.FINISHED


def _settings(given: argparse.Namespace) -> dict[str, object]:
    """Defaults, the preset's, then the command line's."""
    asked = {name: getattr(given, name) for name in _DEFAULTS if getattr(given, name) is not None}
    return {**_DEFAULTS, **PRESETS.get(given.preset, {}), **asked, "preset": given.preset, "seed": given.seed}


class Found:
    """For each beta (one, None, of a perceptron alone): the critical points, and rows of JSON for them."""

    def __init__(self, perceptron: object) -> None:
        self.perceptron = perceptron
        self.betas: list[float | None] = []
        self.points: list[list] = []
        self.atoms: list[list] = []
        self.rows: list[list[dict[str, object]]] = []


def search(settings: dict[str, object]) -> Found:
    """The critical points that the settings ask for.

    Raises:
        ValueError, TypeError: a setting does not fit; the message names it.
    """
    import torch

    from ..ops.checks import positive_int
    from ..sphere import SelfAttention, find_critical_points, random_perceptron
    from ..sphere.checks import positive

    draw = torch.Generator().manual_seed(settings["seed"])
    d, n = positive_int("--dimension", settings["dimension"]), positive_int("--particles", settings["particles"])
    k = settings["neurons"]
    perceptron = None
    if k:
        options = {"size": settings["size"], "bias": settings["bias"], "generator": draw}
        perceptron = random_perceptron(k, d, settings["activation"], **options)
    if not settings["beta"] and perceptron is None:
        raise ValueError("--neurons 0: expected a --beta, or neurons")
    found = Found(perceptron)
    for beta in settings["beta"] or [None]:
        parts = [] if perceptron is None else [perceptron]
        if beta is not None:
            if positive("--beta", beta) > _LARGEST:
                raise ValueError(f"--beta: expected at most {_LARGEST:g}, where exp(beta) is finite; got {beta:g}")
            attention = SelfAttention(beta, weighting="unnormalized")
            parts.append(math.exp(-beta) * attention)
        field = sum(parts[1:], start=parts[0])
        points = find_critical_points(
            -field if settings["descent"] else field,
            n,
            d,
            starts=settings["starts"],
            steps=0 if settings["every_kind"] else settings["steps"],
            generator=draw,
        )
        _keep(found, settings, beta, points)
    return found


def _keep(found: Found, settings: dict[str, object], beta: float | None, points: list) -> None:
    from ..sphere import cluster_threshold, heaviest_arc

    arcs = beta is not None and settings["dimension"] == 2
    reach = 1e-3 if beta is None else cluster_threshold(beta, settings["dimension"], settings["threshold"])
    atoms = [point.atoms(reach) for point in points]
    sign = -1.0 if settings["descent"] else 1.0  # the points are those of sign * energy
    turned = {"maximum": "minimum", "minimum": "maximum"} if settings["descent"] else {}
    found.betas.append(beta)
    found.points.append(points)
    found.atoms.append(atoms)
    found.rows.append(
        [
            {
                "beta": beta,
                "kind": turned.get(point.kind, point.kind),
                "stable": point.stable,
                "energy": sign * point.energy,
                "residual": point.residual,
                "unstable_directions": point.index,
                "nullity": point.nullity,
                "symmetry": point.symmetry,
                "starts": point.starts,
                "largest_eigenvalue": point.eigenvalues[-1].item(),
                "smallest_eigenvalue": point.eigenvalues[0].item(),
                "masses": cloud.masses.tolist(),
                "positions": cloud.positions.tolist(),
                "heaviest_arc": heaviest_arc(point.x, 0.5 / math.sqrt(beta)) if arcs else None,
            }
            for point, cloud in zip(points, atoms, strict=True)
        ]
    )


def _bound(settings: dict[str, object], found: Found, beta: float) -> float:
    from ..sphere import cluster_mass_bound

    return cluster_mass_bound(beta, found.perceptron, factor=math.exp(-beta), n=settings["particles"])


def draw(settings: dict[str, object], found: Found, folder: Path) -> list[Path]:
    """The pictures, where there is something to draw."""
    from ..sphere.pictures import landscape, look

    paths, d = [], settings["dimension"]
    kept = [(beta, atoms) for beta, atoms in zip(found.betas, found.atoms, strict=True) if beta is not None and atoms]
    if kept:
        from ..sphere.exact import single_cluster_bound

        betas = [beta for beta, _ in kept]
        bounds = {}
        if d == 2 and settings["descent"]:
            bounds = {
                f"{single_cluster_bound():.4f}": [single_cluster_bound()] * len(betas),
                "second order": [_bound(settings, found, beta) for beta in betas],
            }
        drawn = landscape.atoms_against_beta(betas, [atoms for _, atoms in kept], bounds)
        paths.append(look.save(drawn, folder / "atoms.png"))
    if found.perceptron is not None and d in (2, 3):
        single = settings["particles"] == 1 and found.betas == [None]
        clouds = {} if single or not kept else {f"atoms, beta = {kept[-1][0]:g}": kept[-1][1][0]}
        points = found.points[0] if single else []
        paths.append(look.save(landscape.potential(found.perceptron, points, clouds), folder / "potential.png"))
    return paths


def _table(settings: dict[str, object], found: Found) -> list[str]:
    lines = ["    beta  kind          energy     unstable  flat (turns)  starts  atoms: masses"]
    for rows in found.rows:
        for row in rows:
            masses = [mass for mass in row["masses"] if mass > 0.0005]
            shown = " ".join(f"{mass:.3f}" for mass in masses[:6]) + (" ..." if len(masses) > 6 else "")
            beta = "-" if row["beta"] is None else f"{row['beta']:g}"
            lines.append(
                f"{beta:>8}  {row['kind']:<10} {row['energy']:>+12.8f} {row['unstable_directions']:>9}  "
                f"{row['nullity']:>4} ({row['symmetry']})  {row['starts']:>9}  {len(row['masses'])}: {shown}"
            )
        missing = settings["starts"] - sum(row["starts"] for row in rows)
        if missing:
            lines.append(f"          {missing} of {settings['starts']} starts did not come to rest")
    return lines
