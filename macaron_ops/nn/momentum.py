"""``MomentumStack``: the same stages with inertia."""

import torch
from torch import Tensor, nn

from macaron_ops.ops import split_layer
from macaron_ops.ops.checks import number
from macaron_ops.splitting import Splitting

from .scheme_steps import of_step
from .split_stack import SplitStack

__all__ = ["MomentumStack"]


class MomentumStack(SplitStack):
    """A :class:`SplitStack` whose stages push a velocity, which moves x; v starts at 0. The stage c F of length h does

        v <- N_v(damping v + gain c h F(x + lookahead v)),    x <- x + v.

    =====================================================================  =======================================
    Momentum ResNet (Sander et al. 2021, arXiv 2102.07870)                 ``damping=g, gain=1 - g`` (the default)
    YuriiFormer (Zimin, Polyanskiy, Rigollet 2026, arXiv 2601.23236):      ``gain=1.0, lookahead=0.9,
    Nesterov's method on the layer's energies, Lie-Trotter                 velocity_norm=True, learned=True``
    no inertia: :class:`SplitStack` itself                                 ``damping=0.0, gain=1.0``
    =====================================================================  =======================================

    Args:
        damping, gain, lookahead: see above; ``gain=None`` is ``1 - damping``.
        velocity_norm: N_v is a LayerNorm for each stage, else nothing.
        learned: the three numbers are parameters, one of each for every stage of every step.
        stack: every other argument of :class:`SplitStack`; the scheme is a composition, substeps are Euler's.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        *,
        damping: float = 0.9,
        gain: float | None = None,
        lookahead: float = 0.0,
        velocity_norm: bool = False,
        learned: bool = False,
        **stack,
    ):
        super().__init__(d_model, nhead, dim_feedforward, **{"scheme": "lie_trotter_AB", "knots": None, **stack})
        if not isinstance(self.scheme, Splitting):
            raise ValueError(f"scheme: expected a composition, for a velocity to go through; got {self.scheme.name!r}")
        if self.substep != "euler":
            raise ValueError(f"substep: expected 'euler'; got {self.substep!r}")
        damping = number("damping", damping)
        numbers = (damping, 1 - damping if gain is None else number("gain", gain), number("lookahead", lookahead))
        factory = {name: stack.get(name) for name in ("device", "dtype")}
        stages = self.steps * len(self.scheme.stages)
        inertia = torch.tensor(numbers, **factory).repeat(stages, 1)
        self.inertia = nn.Parameter(inertia) if learned else None
        self.numbers = numbers
        self.norms = nn.ModuleList(
            nn.LayerNorm(d_model, **factory) if velocity_norm else nn.Identity() for _ in range(stages)
        )

    def forward(self, x: Tensor, **attention: object) -> Tensor:
        """``x (..., T, D)`` to the same shape; the arguments of the attention as :meth:`SplitStack.forward`."""
        v, h, norms = torch.zeros_like(x), self.time / self.steps, iter(self.norms)
        inertia = iter([self.numbers] * len(self.norms) if self.inertia is None else self.inertia)
        fields = self._fields(**attention)
        for i in range(self.steps):
            substep = self._stages(fields, i, self.steps, h)
            for j, (operator, c) in enumerate(self.scheme.stages):
                damping, gain, lookahead = next(inertia)
                push = of_step(substep(j, operator, c), c * h, residual_scale=0.0)
                v = next(norms)(damping * v + gain * split_layer(x + lookahead * v, [push], save=self.save))
                x = x + v
        return x

    def extra_repr(self) -> str:
        damping, gain, lookahead = self.numbers
        return f"{super().extra_repr()}, damping={damping}, gain={gain}, lookahead={lookahead}"
