"""A splitting scheme from its table to a model, and what order it shows on the way.

Seen as a time step of dx/dt = A(x) + B(x), with A attention and B the feed-forward network, a layer is a splitting
scheme: a table that says which of the two is stepped for how long. Here a scheme is written down and checked, its
order is measured on fields that do not commute, with Euler substeps (a network's) and better ones, and the same scheme
then lays out a Transformer of continuous depth, whose steps are refined. At the end an encoder of PyTorch
is asked how far each of its layers is from the flow that it splits.

    python examples/splitting_schemes.py
    python examples/splitting_schemes.py --scheme blanes_moan4_BAB
"""

import argparse

import torch

import macaron_ops
from macaron_ops.nn import SplitStack
from macaron_ops.splitting import CATALOGUE, PROBLEMS, Splitting, find, fitted_order, observed_order


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--scheme", default="strang_BAB", choices=CATALOGUE, metavar="NAME", help="of the catalogue")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)

    scheme = find(args.scheme)
    print(f"{scheme.name}: order {scheme.order}, {scheme.cost()}, largest residual {scheme.residual():.0e}")
    print(f"  {scheme.source}")

    # One's own: unequal halves look as good as Strang's, and the order conditions say that they are not.
    try:
        Splitting("unequal", 2, (("B", 0.4), ("A", 1.0), ("B", 0.6)), source="this example").verify()
    except ValueError as error:
        print(f"  {error}")
    twice = Splitting("twice", 2, (("B", 0.25), ("A", 0.5), ("B", 0.5), ("A", 0.5), ("B", 0.25)), "two Strang steps")
    strang = find("strang_BAB").leading_error()
    print(f"  {twice.verify().name}: leading error {twice.leading_error():.3f}, Strang's {strang:.3f}")

    print("\nobserved order on nonlinear fields that do not commute")
    problem = PROBLEMS["flat"](not scheme.is_real)
    for substep in ("euler", "midpoint", "rk4", "exact"):
        if substep == "exact" and scheme.has_commutator:
            continue  # there is no flow of a commutator
        print(f"  {substep:9} {observed_order(problem, scheme, substep=substep):.2f}")

    if scheme.is_real and not scheme.has_commutator:
        print("\na Transformer of continuous depth, its error when the steps are refined")
        for substep in ("euler", "heun"):
            refine(scheme, substep)

    print("\nhow far the layers of an encoder are from the flow that they split (medians; 1 is what the flow moves)")
    layer = torch.nn.TransformerEncoderLayer(32, nhead=4, dim_feedforward=64, batch_first=True, norm_first=True)
    encoder = torch.nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False).eval()
    for found in macaron_ops.splitting_error(encoder, torch.randn(2, 10, 32)):
        measures = ("lie_trotter", "strang", "commutator")
        print(f"  {found.name}: " + ", ".join(f"{name} {found.median(name):.3f}" for name in measures))


def refine(scheme, substep: str) -> None:
    """One set of parameters, twelve, twenty-four and forty-eight steps to the same time."""
    flow = {"time": 1.0, "norm": "rms", "activation": "gelu", "dtype": torch.float64}
    stack = SplitStack(16, 2, 32, scheme=scheme, substep=substep, **flow)
    finest = SplitStack(16, 2, 32, scheme="strang_BAB", substep="rk4", **flow)
    finest.load_state_dict(stack.state_dict())
    x, steps = torch.randn(1, 6, 16, dtype=torch.float64), (12, 24, 48)
    with torch.no_grad():
        truth = finest(x, 384)
        errors = [(stack(x, n) - truth).abs().max().item() for n in steps]
    told = "  ".join(f"{n} steps {error:.1e}" for n, error in zip(steps, errors, strict=True))
    print(f"  {substep:9} {told}  order {fitted_order([1 / n for n in steps], errors):.2f}")


if __name__ == "__main__":
    main()
