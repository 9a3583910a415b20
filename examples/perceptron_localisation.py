"""What a perceptron does to interacting particles: it pins them, and where they repel, spreads them over atoms.

Particles on the circle move along the gradient of

    E = 1/(2 beta n^2) sum_ij exp(beta (<x_i, x_j> - 1)) + 1/(2 n) sum_i v(x_i),

attention and the potential v of a perceptron. Kinds of critical points are told by the spectrum of the Riemannian
Hessian. Three things are shown:

1. Without attention the highest point of E is all particles in one, at the maximum of v.
2. Uphill with attention the particles gather in a few atoms at maxima of v. All in one, at the highest, is a strict
   maximum, too.
3. Downhill they repel one another and end in many atoms. No arc of 1/(2 sqrt(beta)) holds more of them than the second
   derivative allows. For a perceptron that is small against attention (--size 0.15) that is less than 0.5742, the
   bound of arXiv 2601.21366; a larger one can hold more in place.

    python examples/perceptron_localisation.py
    python examples/perceptron_localisation.py --activation gelu --size 1 --out pictures
"""

import argparse
import math
from pathlib import Path

import torch

from macaron_ops.sphere import (
    SelfAttention,
    cluster_mass_bound,
    find_critical_points,
    heaviest_arc,
    potential_maximum,
    random_perceptron,
)
from macaron_ops.sphere.exact import single_cluster_bound
from macaron_ops.sphere.pictures import landscape, look


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--activation", default="relu", choices=("relu", "gelu", "tanh"))
    parser.add_argument("--neurons", type=int, default=8)
    parser.add_argument("--size", type=float, default=0.15, help="sum of the absolute values of the neurons' weights")
    parser.add_argument("--particles", type=int, default=32)
    parser.add_argument("--betas", type=float, nargs="+", default=[4.0, 16.0, 64.0, 256.0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("results/perceptron_localisation"), help="for the pictures")
    args = parser.parse_args()
    n, draw = args.particles, torch.Generator().manual_seed(args.seed)

    perceptron = random_perceptron(args.neurons, 2, args.activation, size=args.size, bias=0.3, generator=draw)
    top, value = potential_maximum(perceptron)
    every = find_critical_points(perceptron, n=1, d=2, starts=32, steps=0, generator=draw)
    print(f"{perceptron}: its potential v is largest, {value:.4f}, at the angle {angle(top):+.4f}")
    for point in every:
        print(f"  {point.kind:<10} v = {2 * point.energy:+.4f} at {angle(point.x[0]):+.4f}")

    together = top.expand(1, n, 2)
    (dirac,) = find_critical_points(perceptron, x0=together)
    print(f"\n1. no attention, all particles there: {dirac.kind}, E = {dirac.energy:.6f}, v/2 = {value / 2:.6f}")

    print("\n2. uphill: the strict maxima that uniform starts lead to\n   beta  masses of the atoms")
    clouds, found = {}, []
    for beta in args.betas:
        field = attention(beta) + perceptron
        points = find_critical_points(field, n=n, d=2, starts=4, generator=draw)
        found.append([point.atoms() for point in points if point.stable])
        for atoms in found[-1]:
            print(f"   {beta:4g}  {' '.join(f'{mass:.3f}' for mass in atoms.masses)}")
        (point,) = find_critical_points(field, x0=together)
        print(
            f"   {beta:4g}  {'  '.join(f'{mass:.3f}' for mass in point.atoms().masses)}  (started there: {point.kind})"
        )
    pictures = [look.save(landscape.atoms_against_beta(args.betas, found, title="uphill"), args.out / "uphill.png")]
    clouds[f"uphill, beta = {args.betas[-1]:g}"] = found[-1][0]

    print("\n3. downhill: the strict minima that uniform starts lead to")
    print("   beta  atoms  heaviest  heaviest arc  second order allows")
    found, allowed = [], []
    for beta in args.betas:
        allowed.append(cluster_mass_bound(beta, perceptron, factor=math.exp(-beta), n=n))
        points = find_critical_points(-(attention(beta) + perceptron), n=n, d=2, starts=4, generator=draw)
        found.append([point.atoms() for point in points if point.stable])
        for point in points:
            if point.stable:
                masses, arc = point.atoms().masses, heaviest_arc(point.x, 0.5 / math.sqrt(beta))
                print(f"   {beta:4g}  {len(masses):5}  {masses[0]:8.3f}  {arc:12.3f}  {allowed[-1]:19.3f}")
    bounds = {f"{single_cluster_bound():.4f}": [single_cluster_bound()] * len(args.betas), "second order": allowed}
    drawn = landscape.atoms_against_beta(args.betas, found, bounds, "downhill")
    pictures.append(look.save(drawn, args.out / "downhill.png"))
    clouds[f"downhill, beta = {args.betas[-1]:g}"] = found[-1][0]
    pictures.append(look.save(landscape.potential(perceptron, every, clouds), args.out / "potential.png"))
    print("\n" + "\n".join(map(str, pictures)))


def attention(beta: float):
    """exp(beta (<x, y> - 1)): its largest weight is 1 at every beta, or it would drown the perceptron."""
    return math.exp(-beta) * SelfAttention(beta, weighting="unnormalized")


def angle(x: torch.Tensor) -> float:
    return math.atan2(x[1], x[0])


if __name__ == "__main__":
    main()
