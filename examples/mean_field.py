"""The limit of many particles: how fast clouds of n particles approach the density that the continuum equation gives.

Particles on the circle move by attention and a perceptron, d theta_i/dt = <u(theta_i), (-sin, cos)>. As n grows their
cloud tends to a density rho, which obeys d rho/dt + d(rho v)/d theta = 0. That equation is solved on a grid that knows
nothing of particles. W2 between the two falls as 1/n from a start where every particle stands for the same mass, and as
1/sqrt(n), like that of any sample, from random ones. In S^{d-1} there is no grid, and the sliced distance between two
clouds of n random particles falls as 1/sqrt(n), too.

One evaluation of a field takes n^2 weights and no memory for them. A million particles on two cores: minutes a step.

    python examples/mean_field.py
    python examples/mean_field.py --sizes 8 64 512 4096 32768 --dimension 3
"""

import argparse
import math
import time
from pathlib import Path

import torch

from macaron_ops import sphere
from macaron_ops.sphere.pictures import look
from macaron_ops.splitting import RUNGE_KUTTA, to_sphere


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[8, 32, 128, 512, 2048, 8192], help="of the clouds")
    parser.add_argument("--dimension", type=int, default=2, help="2: against the grid; more: two clouds, sliced W2")
    parser.add_argument("--beta", type=float, default=4.0)
    parser.add_argument("--weighting", choices=("softmax", "unnormalized"), default="softmax")
    parser.add_argument("--time", type=float, default=0.6)
    parser.add_argument("--steps", type=int, default=20, help="of Runge-Kutta 4")
    parser.add_argument("--cells", type=int, default=2048, help="of the grid")
    parser.add_argument("--out", type=Path, default=Path("results/mean_field"), help="for the picture")
    args = parser.parse_args()
    draw, d = torch.Generator().manual_seed(0), args.dimension
    perceptron = sphere.random_perceptron(5, d, "tanh", bias=0.3, generator=draw)
    field = sphere.SelfAttention(args.beta, weighting=args.weighting) + perceptron

    def moved(x: torch.Tensor) -> torch.Tensor:
        x, h = x.float(), args.time / args.steps  # float32: the fast kernels, W2 to 1e-6
        for _ in range(args.steps):
            x = to_sphere(RUNGE_KUTTA["rk4"](lambda t, x: field(x), 0.0, x, h))
        return x

    mean = torch.nn.functional.one_hot(torch.tensor(0), d).double()

    def sample(n: int) -> torch.Tensor:
        return sphere.von_mises_fisher(n, mean, 1.5, generator=draw)

    curves: dict[str, list[float]] = {}
    if d == 2:
        angle = sphere.circle_grid(args.cells)
        start = torch.exp(1.5 * angle.cos())
        start = start / start.sum() * args.cells / (2 * math.pi)
        density = sphere.circle_flow(field, start, args.time)
        grid = sphere.circle_points(sphere.circle_quantiles(density, 100 * args.cells))

        def to_grid(x: torch.Tensor) -> float:
            return sphere.wasserstein_circle(moved(x), grid)

        even = "even start, to the grid"
        curves = {even: [], "random start, to the grid": []}
    else:
        curves = {"two random starts, sliced": []}

    print(f"W2 at t = {args.time:g}, {field!r}")
    for n in args.sizes:
        began = time.perf_counter()
        if d == 2:
            found = [to_grid(sphere.circle_points(sphere.circle_quantiles(start, n))), to_grid(sample(n))]
        else:
            found = [sphere.sliced_wasserstein(moved(sample(n)), moved(sample(n)), generator=draw)]
        for curve, distance in zip(curves.values(), found, strict=True):
            curve.append(distance)
        pairs = ",  ".join(f"{name} {distance:.2e}" for name, distance in zip(curves, found, strict=True))
        print(f"  n = {n:<8} {pairs}   ({time.perf_counter() - began:.1f} s)")

    drawn, (axes,) = look.figure(1, 1, (6.0, 3.8))
    look.style(axes)
    axes.set_xscale("log")
    axes.set_yscale("log")
    for (name, curve), colour in zip(curves.items(), look.COLOURS, strict=False):
        axes.plot(args.sizes, curve, "o-", color=colour, label=name)
        power = 1.0 if name.startswith("even") else 0.5
        scale = curve[0] * args.sizes[0] ** power
        label = "1/n" if power == 1.0 else "1/sqrt(n)"
        axes.plot(args.sizes, [scale / n**power for n in args.sizes], "--", color=colour, linewidth=1, label=label)
    look.label(axes, f"W2 at t = {args.time:g}", "particles", "W2")
    look.legend(axes)
    print(look.save(drawn, args.out / "mean_field.png"))


if __name__ == "__main__":
    main()
