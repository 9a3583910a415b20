"""Clusters on the circle wait for one another, exponentially long in beta: a staircase against the logarithm of time.

At first particles gather within their neighbourhoods, about sqrt(beta) of them. What one cluster feels of another at
the angle a is exp(-beta (1 - cos a)), so that nothing seems to happen until, all at once, two have met. Steps adapt:
thousands of units of time take some hundred steps. Geshkovski, Koubbi, Polyanskiy, Rigollet 2024, arXiv 2410.06833.

    python examples/metastability.py
    python examples/metastability.py --betas 4 9 16 25 --until 1e5 --seed 2
"""

import argparse
import math
from pathlib import Path

import torch

from macaron_ops.sphere import SelfAttention, simulate, uniform
from macaron_ops.sphere.pictures import look, motion


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--betas", type=float, nargs="+", default=[4.0, 9.0, 16.0])
    parser.add_argument("--particles", type=int, default=200)
    parser.add_argument("--until", type=float, default=3000.0)
    parser.add_argument("--tolerance", type=float, default=1e-6, help="of a step's error")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("results/metastability"), help="for the pictures")
    args = parser.parse_args()
    x0 = uniform(args.particles, 2, generator=torch.Generator().manual_seed(args.seed))
    paths = []
    for beta in args.betas:
        field = SelfAttention(beta)
        options = {"tolerance": args.tolerance, "observers": ("energy", "clusters"), "progress": True}
        path = simulate(field, x0, args.until, 0.1, "rk4", **options)
        clusters = path.observed["clusters"]
        fewer = (clusters.diff() < 0).nonzero().squeeze(-1) + 1
        meetings = "  ".join(f"{clusters[i]} from t = {path.times[i]:.4g}" for i in fewer[-5:])
        print(f"beta = {beta:4g} (root {math.sqrt(beta):.1f}), {path.steps} steps: {meetings}")
        paths.append(path)
        print("  ", look.save(motion.particles(path, field, logarithmic=True), args.out / f"particles-{beta:g}.png"))
    drawn = motion.staircase(paths, [f"beta = {beta:g}" for beta in args.betas])
    print(look.save(drawn, args.out / "staircase.png"))


if __name__ == "__main__":
    main()
