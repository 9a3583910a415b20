"""Particles on S^2 under attention gather in one point, and when: simulations beside what theory gives exactly.

1. 64 random particles, and their smallest inner product while they gather.
2. An orthonormal start, whose products all follow one ordinary differential equation: the largest difference from it.
3. The six places where a Transformer normalises, as laws of speed, and the time that each takes from the same start.

    python examples/clustering.py
    python examples/clustering.py --beta 4 --particles 256 --out pictures
"""

import argparse
from pathlib import Path

import torch

from macaron_ops.sphere import NORMALIZATIONS, SelfAttention, orthonormal_product, simulate, uniform
from macaron_ops.sphere.pictures import interactive, look, motion


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--particles", type=int, default=64)
    parser.add_argument("--beta", type=float, default=1.0)
    parser.add_argument("--until", type=float, default=15.0)
    parser.add_argument("--patience", type=float, default=200.0, help="the latest time of part 3")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("results/clustering"), help="for the pictures")
    args = parser.parse_args()
    field = SelfAttention(args.beta)
    x0 = uniform(args.particles, 3, generator=torch.Generator().manual_seed(args.seed))

    watched = ("smallest_product", "clusters", "effective_rank", "energy")
    path = simulate(field, x0, args.until, 0.1, observers=watched, progress=True)
    print(f"1. {args.particles} particles, beta = {args.beta:g}\n      t  smallest product  clusters")
    for i in range(0, len(path.times), max(1, len(path.times) // 10)):
        print(
            f"   {path.times[i]:4.1f}  {path.observed['smallest_product'][i]:16.6f}  {path.observed['clusters'][i]:8}"
        )
    pictures = [
        look.save(motion.particles(path, field), args.out / "particles.png"),
        look.save(motion.observed(path), args.out / "observed.png"),
        interactive.sphere_page(path, field, args.out / "particles.html"),
    ]

    n = 16
    orthonormal = simulate(SelfAttention(4.0), torch.eye(n, dtype=torch.float64), 10.0, 0.01, "rk4", every=10)
    products = (orthonormal.points @ orthonormal.points.mT)[:, 0, 1]
    off = (products - orthonormal_product(orthonormal.times, n, 4.0)).abs().max()
    print(f"\n2. {n} orthonormal particles, beta = 4: largest difference from the exact equation {off:.1e}")

    print("\n3. when the smallest product passes 0.999, by where layers normalise")
    for name in NORMALIZATIONS:
        path = simulate(field, x0, args.patience, 0.1, "rk4", normalization=name, observers=("smallest_product",))
        there = (path.observed["smallest_product"] > 0.999).nonzero()
        print(f"   {name:<10} {f'{path.times[there[0, 0]]:.1f}' if len(there) else 'not yet'}")
    print("\n" + "\n".join(map(str, pictures)))


if __name__ == "__main__":
    main()
