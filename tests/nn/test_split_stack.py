"""Claim: SplitStack is a flow through the fused operators: refining its steps shows the order of scheme and substep,
with parameters fixed or interpolated in time; with parameters of their own its stages are an ordinary network.
MomentumStack gives the same stages a velocity."""

import pytest
import torch
from torch import nn

from macaron_ops.nn import MomentumStack, SplitStack
from macaron_ops.splitting import Operator, fitted_order, integrate, sandwich
from tests.nn.test_split_layer import step
from tests.nn.tools import output_and_grads, randomize

D, H, F = 8, 2, 12


def build(kind=SplitStack, **options):
    return randomize(kind(D, H, F, activation="gelu", dtype=torch.float64, **options))


def draw(*shape):
    return torch.randn(*shape, D, dtype=torch.float64)


@pytest.mark.parametrize("knots", [1, 3])
@pytest.mark.parametrize(
    ("scheme", "substep", "order"),
    [
        ("lie_trotter_AB", "rk4", 1),
        ("strang_BAB", "euler", 1),
        ("strang_BAB", "midpoint", 2),
        ("blanes_moan4_BAB", "rk4", 4),
        ("richardson_strang4", "rk4", 4),
    ],
)
def test_orders(scheme, substep, order, knots):
    fine = {"scheme": "blanes_moan4_ABA", "substep": "rk4", "knots": knots, "time": 0.25}
    stack, finest, x = build(**{**fine, "scheme": scheme, "substep": substep}), build(**fine), draw(5)
    finest.load_state_dict(stack.state_dict())
    steps = (8, 12, 16)
    with torch.no_grad():
        truth = finest(x, 48)
        errors = [(stack(x, n) - truth).abs().max().item() for n in steps]
    assert abs(fitted_order([1 / n for n in steps], errors, 1e-13) - order) < 0.15


def test_fused_steps_are_integrate():
    """With two knots at the ends of the time, attention's masks reaching every stage, and gradients."""
    stack = build(steps=3, time=1.5, knots=2)
    x = draw(2, 5).requires_grad_()
    mask = torch.ones(5, 5, dtype=torch.bool).triu(1)

    def at(stages, t):
        mixed = {
            name: first + (last - first) * t / 1.5
            for (name, first), (_, last) in zip(*(stage.named_parameters() for stage in stages), strict=True)
        }
        return mixed

    def field(stages):
        def velocity(t, x):
            values = at(stages, t)
            return (
                torch.func.functional_call(Stepped(stages[0]), {f"stage.{n}": v for n, v in values.items()}, (x, mask))
                - x
            )

        return Operator(velocity, timed=True)

    y = integrate({"A": field(stack.attend), "B": field(stack.ffn)}, x, 0.0, 1.5, 3, "strang_BAB", substep="euler")
    z = stack(x, causal=True)
    torch.testing.assert_close(z, y)
    wanted = [x, *stack.parameters()]
    torch.testing.assert_close(
        torch.autograd.grad(z.square().sum(), wanted), torch.autograd.grad(y.square().sum(), wanted)
    )


class Stepped(nn.Module):
    """A whole step of a stage in plain torch."""

    def __init__(self, stage):
        super().__init__()
        self.stage = stage

    def forward(self, x, mask):
        return step(self.stage, x, 1.0, "pre", mask)


def test_own_parameters_are_an_ordinary_network():
    n, k = 4, 1
    stack = build(steps=1, time=float(n), knots=None, scheme=sandwich(n, k))
    y = x = draw(2, 5)
    attend, ffn = iter(stack.attend), iter(stack.ffn)
    for letter in "A" + "AB" * 3 + "B":
        y = step(next(attend if letter == "A" else ffn), y, 1.0, "pre")
    torch.testing.assert_close(stack(x), y)
    assert (next(attend, None), next(ffn, None)) == (None, None)
    two = build(steps=2, time=2.0, knots=None, scheme="strang_BAB")
    y = x
    for attend, first, second in zip(two.attend, two.ffn[::2], two.ffn[1::2], strict=True):
        y = step(second, step(attend, step(first, y, 0.5, "pre"), 1.0, "pre"), 0.5, "pre")
    torch.testing.assert_close(two(x), y)


def test_fixed_parameters_are_one_set():
    one, three = build(steps=2), build(steps=2, knots=3)
    assert 3 * sum(p.numel() for p in one.parameters()) == sum(p.numel() for p in three.parameters())
    assert sum(p.numel() for p in build(steps=4).parameters()) == sum(p.numel() for p in one.parameters())


def test_policies_and_compile():
    fast, x = build(steps=1, knots=2), draw(2, 5).requires_grad_()
    lean = build(steps=1, knots=2, save="lean")
    lean.load_state_dict(fast.state_dict())
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    for other in (lean, compiled):
        torch.testing.assert_close(output_and_grads(other, x), output_and_grads(fast, x))


def momentum_by_hand(stack, x, mask=None):
    v, attend, ffn = torch.zeros_like(x), iter(stack.attend), iter(stack.ffn)
    for i in range(2 * stack.steps):
        z = x + stack.inertia[i, 2] * v
        stage = next(ffn if i % 2 else attend)
        v = stack.norms[i](stack.inertia[i, 0] * v + stack.inertia[i, 1] * (step(stage, z, 1.0, "pre", mask) - z))
        x = x + v
    return x


@pytest.mark.parametrize("velocity_norm", [False, True])
def test_momentum(velocity_norm):
    stack = build(MomentumStack, steps=2, lookahead=0.8, velocity_norm=velocity_norm, learned=True)
    x = draw(2, 5).requires_grad_()
    y, z = momentum_by_hand(stack, x, torch.ones(5, 5, dtype=torch.bool).triu(1)), stack(x, causal=True)
    torch.testing.assert_close(z, y)
    wanted = [x, *stack.parameters()]
    torch.testing.assert_close(
        torch.autograd.grad(z.square().sum(), wanted), torch.autograd.grad(y.square().sum(), wanted)
    )


def test_momentum_without_inertia_is_the_stack():
    still = build(MomentumStack, steps=2, damping=0.0, scheme="strang_BAB")
    plain = build(steps=2, knots=None)
    plain.load_state_dict(still.state_dict())
    x = draw(2, 5)
    torch.testing.assert_close(still(x), plain(x))
    assert (MomentumStack(D, H, F, damping=0.75).numbers) == (0.75, 0.25, 0.0)


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (SplitStack, {"scheme": "strang"}, "scheme: expected one of"),
        (SplitStack, {"scheme": "chin4A"}, "which has a commutator"),
        (SplitStack, {"substep": "exact"}, "substep: expected one of 'euler'"),
        (SplitStack, {"knots": None, "substep": "rk4"}, "substep: expected 'euler' with knots=None"),
        (SplitStack, {"knots": 4, "steps": 4}, "steps: expected a multiple of knots - 1 = 3; got 4"),
        (SplitStack, {"steps": 0}, "steps: expected an integer of at least 1"),
        (MomentumStack, {"scheme": "sws"}, "scheme: expected a composition"),
        (MomentumStack, {"knots": 1, "substep": "rk4"}, "substep: expected 'euler'; got 'rk4'"),
    ],
)
def test_refusals(kind, arguments, message):
    with pytest.raises(ValueError, match=message):
        kind(D, H, F, **arguments)


def test_steps_of_their_own_cannot_be_refined():
    with pytest.raises(ValueError, match=r"steps: expected 2, each with its own parameters \(knots=None\); got 4"):
        build(steps=2, knots=None)(draw(2, 5), 4)
    with pytest.raises(ValueError, match="k: expected an integer between 0 and n = 3; got 4"):
        sandwich(3, 4)
