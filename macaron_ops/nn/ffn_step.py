"""``FFNStep``: the FFN step with its parameters."""

from torch import Tensor, nn

from macaron_ops.ops import Substep, split_layer, substep
from macaron_ops.ops import ffn_step as operator
from macaron_ops.ops.checks import choice, number, positive_int, probability
from macaron_ops.ops.run import SAVE

from .activation import Activation, fused_activation, hidden_rows
from .norm import build_norm, norm_arguments
from .parts import require_part

__all__ = ["FFNStep"]


class FFNStep(nn.Module):
    """``y = a x + c FFN(N(x))``, or post-norm ``y = N(a x + c FFN(x))``: one :func:`macaron_ops.ffn_step`.

    At the default ``step=0.5`` it is the half-step of the Macaron layer. Initialised as ``nn.Linear``.

    Args:
        d_model: D. dim_feedforward: the hidden width F.
        activation: a name (gated ones too), or a callable; ``F.gelu``, ``nn.SiLU()`` and the like are fused.
        norm: ``"layer"``, ``"rms"``, ``"sphere"`` or None. eps: of the norm.
        step: c. residual_scale: a. placement: of the norm, ``"pre"`` or ``"post"``.
        dropout, activation_dropout: probabilities, of the output and of the hidden activations, in training.
        bias: of the two matrices and of a LayerNorm.
        save: memory policy, ``"fast"`` or ``"lean"``.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
    """

    def __init__(
        self,
        d_model: int,
        dim_feedforward: int,
        *,
        activation: Activation = "relu",
        norm: str | None = "layer",
        eps: float = 1e-5,
        step: float = 0.5,
        residual_scale: float = 1.0,
        placement: str = "pre",
        dropout: float = 0.0,
        activation_dropout: float = 0.0,
        bias: bool = True,
        save: str = "fast",
        device=None,
        dtype=None,
    ):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        d_model = positive_int("d_model", d_model)
        hidden = positive_int("dim_feedforward", dim_feedforward)
        choice("placement", placement, ("pre", "post"))
        choice("save", save, SAVE)
        self.activation = fused_activation(activation)
        self.step = number("step", step)
        self.residual_scale = number("residual_scale", residual_scale)
        self.placement = placement
        self.dropout = probability("dropout", dropout)
        self.activation_dropout = probability("activation_dropout", activation_dropout)
        self.save = save
        self.norm = build_norm(norm, d_model, eps, bias, **factory)
        self.linear1 = nn.Linear(d_model, hidden_rows(self.activation, hidden), bias=bias, **factory)
        self.linear2 = nn.Linear(hidden, d_model, bias=bias, **factory)

    def forward(self, x: Tensor, seed: int | Tensor | None = None) -> Tensor:
        """``x (..., D)`` to the same shape; ``seed``: of the dropouts."""
        return split_layer(x, [self.substep(seed)], save=self.save)

    def substep(self, seed: int | Tensor | None = None) -> Substep:
        """The step as an element of :func:`macaron_ops.split_layer`."""
        require_part("linear1", self.linear1, nn.Linear)
        require_part("linear2", self.linear2, nn.Linear)
        return substep(
            operator,
            self.linear1.weight,
            self.linear1.bias,
            self.linear2.weight,
            self.linear2.bias,
            activation=self.activation,
            step=self.step,
            residual_scale=self.residual_scale,
            placement=self.placement,
            dropout=self.dropout if self.training else 0.0,
            activation_dropout=self.activation_dropout if self.training else 0.0,
            seed=seed,
            **norm_arguments(self.norm),
        )

    def extra_repr(self) -> str:
        a = "" if self.residual_scale == 1.0 else f"residual_scale={self.residual_scale}, "
        return (
            f"step={self.step}, {a}activation={self.activation!r}, placement={self.placement!r}, "
            f"dropout={self.dropout}, activation_dropout={self.activation_dropout}, save={self.save!r}"
        )
