"""``SplitStack``: a Transformer as a flow, whose steps can be refined."""

from torch import Tensor, nn

from macaron_ops.ops import Substep, split_layer
from macaron_ops.ops.checks import choice, number, positive_int
from macaron_ops.ops.run import SAVE
from macaron_ops.splitting import RUNGE_KUTTA, Operator, Scheme, integrate

from .activation import Activation
from .attend_step import AttendStep
from .ffn_step import FFNStep
from .scheme_steps import between, fused_scheme, of_step, run_scheme

__all__ = ["SplitStack"]


class SplitStack(nn.Module):
    """``dx/dt = A(t, x) + B(t, x)`` from 0 to ``time`` in ``steps`` steps of a splitting scheme: pre-norm attention and
    FFN of full width, A and B, which every stage evaluates at its own time.

    What depends on t is the parameters. ``knots=1`` has one set: a layer with tied weights, stepped N times. With
    ``knots=K`` sets at K equidistant times the parameters run linearly from one to the next. Both define a flow, so
    that h = time / steps can be refined (``stack(x, steps=4 * stack.steps)``) and the scheme has an order; it is that
    of the substeps if that is lower, 1 for ``"euler"``. ``knots=None`` gives every stage of every step parameters of
    its own: an ordinary deep network laid out by the scheme, which nothing refines.

    Sources: Chen et al. 2018, Neural ODEs, arXiv 1806.07366; Lu et al. 2019, arXiv 1906.02762 (Transformers); Queiruga
    et al. 2020, arXiv 2008.02389 (interpolated parameters).

    Example::

        stack = SplitStack(256, 8, 1024, steps=6, knots=3)          # parameters of 3 layers, 6 Macaron steps
        sandwich_transformer = SplitStack(256, 8, 1024, steps=1, time=6.0, knots=None, scheme=sandwich(6, 2))

    Args:
        d_model: D. nhead: heads. dim_feedforward: hidden width.
        steps: of the forward pass. time: the end; None: ``float(steps)``, h = 1.
        scheme: as :class:`SplitLayer`.
        knots: parameter sets in time; steps must then be a multiple of ``knots - 1``, or the kinks at the knots lie
            within steps.
        substep: ``"euler"`` (fused, one autograd node a step), ``"midpoint"``, ``"heun"`` or ``"rk4"`` (each
            evaluation fused).
        The others as :class:`FFNStep` and :class:`AttendStep`.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        *,
        steps: int = 6,
        time: float | None = None,
        scheme: str | Scheme = "strang_BAB",
        knots: int | None = 1,
        substep: str = "euler",
        activation: Activation = "relu",
        norm: str | None = "layer",
        eps: float = 1e-5,
        bias: bool = True,
        save: str = "fast",
        device=None,
        dtype=None,
    ):
        super().__init__()
        self.steps = positive_int("steps", steps)
        self.time = float(steps) if time is None else number("time", time)
        self.scheme = fused_scheme(scheme)
        self.knots = None if knots is None else positive_int("knots", knots)
        choice("substep", substep, tuple(RUNGE_KUTTA))
        choice("save", save, SAVE)
        self.substep = substep
        self.save = save
        if knots is None and substep != "euler":
            raise ValueError(f"substep: expected 'euler' with knots=None, where no flow is refined; got {substep!r}")
        stages = self.scheme.cost(steps) if knots is None else (self.knots, self.knots)
        common = {"norm": norm, "eps": eps, "step": 1.0, "bias": bias, "save": save, "device": device, "dtype": dtype}
        self.attend = nn.ModuleList(AttendStep(d_model, nhead, **common) for _ in range(stages[0]))
        self.ffn = nn.ModuleList(
            FFNStep(d_model, dim_feedforward, activation=activation, **common) for _ in range(stages[1])
        )
        self._check_steps(self.steps)

    def forward(
        self,
        x: Tensor,
        steps: int | None = None,
        *,
        causal: bool = False,
        attn_mask: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        rotary: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """``x (..., T, D)`` to the same shape.

        Args:
            steps: instead of the stack's own; the same flow in finer or coarser steps.
            The others as :func:`macaron_ops.attend_step`.
        """
        steps = self.steps if steps is None else positive_int("steps", steps)
        self._check_steps(steps)
        fields = self._fields(
            causal=causal,
            attn_mask=attn_mask,
            key_padding_mask=key_padding_mask,
            cu_seqlens=cu_seqlens,
            rotary=rotary,
        )
        h = self.time / steps
        for i in range(steps):
            x = self._step(x, fields, i, steps, h)
        return x

    def _step(self, x: Tensor, fields: dict[str, list[Substep]], i: int, steps: int, h: float) -> Tensor:
        if self.substep == "euler":
            return run_scheme(x, self.scheme, self._stages(fields, i, steps, h), self.save)

        def velocity(name: str) -> Operator:
            def field(t: float, x: Tensor) -> Tensor:
                found = self._at(fields[name], t / self.time, i / steps)
                return split_layer(x, [of_step(found, 1.0, residual_scale=0.0)], save=self.save)

            return Operator(field, timed=True)

        operators = {name: velocity(name) for name in fields}
        return integrate(operators, x, i * h, (i + 1) * h, 1, self.scheme, substep=self.substep)

    def _stages(self, fields: dict[str, list[Substep]], i: int, steps: int, h: float):
        """``substep(j, operator, coefficient)`` of step i, for :func:`run_scheme`: each at its operator's clock."""
        starts = _starts(self.scheme)
        before = dict(zip("AB", self.scheme.cost(i), strict=True))

        def substep(j: int, operator: str, coefficient: float) -> Substep:
            of_its_own, start = starts[j]
            if self.knots is None:
                found = fields[operator][before[operator] + of_its_own]
            else:
                found = self._at(fields[operator], (i + start) / steps, i / steps)
            return of_step(found, coefficient * h)

        return substep

    def _at(self, knots: list[Substep], at: float, piece: float) -> Substep:
        """The field's substep at the share ``at`` of the time, on the line of the step that begins at ``piece``."""
        if len(knots) == 1:
            return knots[0]
        last = len(knots) - 1
        first = min(int(piece * last + 1e-9), last - 1)
        return between(knots[first], knots[first + 1], at * last - first)

    def _fields(self, **attention: object) -> dict[str, list[Substep]]:
        return {
            "A": [stage.substep(**attention) for stage in self.attend],
            "B": [stage.substep() for stage in self.ffn],
        }

    def _check_steps(self, steps: int) -> None:
        if self.knots is None and steps != self.steps:
            raise ValueError(f"steps: expected {self.steps}, each with its own parameters (knots=None); got {steps}")
        if self.knots is not None and self.knots > 1 and steps % (self.knots - 1):
            raise ValueError(f"steps: expected a multiple of knots - 1 = {self.knots - 1}; got {steps}")

    def extra_repr(self) -> str:
        return (
            f"scheme={self.scheme.name!r}, steps={self.steps}, time={self.time}, knots={self.knots}, "
            f"substep={self.substep!r}, save={self.save!r}"
        )


def _starts(scheme: Scheme) -> list[tuple[int, float]]:
    """Of each stage, over all terms: which one of its operator it is, and its operator's clock when it begins."""
    found, count = [], {"A": 0, "B": 0}
    for _, stages in scheme.weighted:
        clock = {"A": 0.0, "B": 0.0}
        for operator, coefficient in stages:
            found.append((count[operator], clock[operator]))
            count[operator] += 1
            clock[operator] += coefficient
    return found
