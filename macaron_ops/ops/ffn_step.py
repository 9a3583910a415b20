"""``ffn_step``: the FFN step as people call it."""

from collections.abc import Callable

from torch import Tensor

from macaron_ops.reference.activation import ACTIVATIONS, GATED
from macaron_ops.reference.ffn_step import Options, Tensors

from .checks import Operands, choice, number, probability
from .run import Bound, operator

__all__ = ["ffn_step"]


@operator
def ffn_step(
    x: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    *,
    norm: str | None = "layer",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    activation: str | Callable[[Tensor], Tensor] = "relu",
    step: float = 0.5,
    residual_scale: float = 1.0,
    placement: str = "pre",
    dropout: float = 0.0,
    activation_dropout: float = 0.0,
    seed: int | Tensor | None = None,
    save: str = "fast",
) -> Tensor:
    """A scaled, normalised feed-forward residual; at ``step=0.5`` the Macaron half-step::

        pre    y = a x + c drop(W_out drop_h(act(W_in N(x) + b_in)) + b_out)
        post   y = N(a x + c drop(W_out drop_h(act(W_in x + b_in)) + b_out))

    Statistics, accumulation and the residual sum are float32 (float64 for float64 inputs), with one rounding at the
    output. Under autocast the parameters of the products are cast as ``F.linear`` casts them, while x and y keep their
    dtype, as the residual stream of an eager layer does. Source: Lu et al. 2019, arXiv 1906.02762.

    Args:
        x: ``(..., D)``, any floating dtype.
        w_in: ``(F, D)``, ``(2F, D)`` with the gate's rows first for a gated activation; dtype and device of x, as
            all tensors here.
        b_in: ``(F,)`` or ``(2F,)``, or None.
        w_out: ``(D, F)``.
        b_out: ``(D,)`` or None.
        norm: N, ``"layer"``, ``"rms"``, ``"sphere"`` (x / max(\\|x\\|, eps)) or None.
        norm_weight, norm_bias: ``(D,)`` or None.
        eps: added to the variance (layer) or mean square (rms); least length (sphere).
        activation: ``"relu"``, ``"gelu"`` (erf), ``"gelu_tanh"``, ``"silu"``, gated ``"swiglu"``, ``"geglu"``; or a
            function of the pre-activations, which only the definition runs.
        step: c. residual_scale: a.
        placement: where N stands, ``"pre"`` or ``"post"``.
        dropout, activation_dropout: probabilities of the output's and the hidden activations' dropout.
        seed: of both dropouts, an int or an int64 0-d tensor; None draws one from torch's default generator.
        save: ``"fast"`` keeps the pre-activations for the backward pass, ``"lean"`` computes them again.

    Returns:
        y, shape and dtype of x.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        BackendError: the backend that was asked for cannot run the call.
    """
    t = Operands(x, min_dim=1)
    if isinstance(activation, type):
        raise TypeError(f"activation: expected a name or a function; got the class {activation.__name__}")
    if not callable(activation):
        choice("activation", activation, ACTIVATIONS)
    gated = not callable(activation) and activation in GATED
    w_out = t.operand("w_out", w_out, t.width, "F")
    hidden = w_out.shape[1]
    if gated:
        rows = 2 * hidden
        if getattr(w_in, "shape", (rows,))[:1] != (rows,):
            raise ValueError(
                f"w_in: expected (2F, D) = ({rows}, {t.width}) for the gated activation {activation!r} "
                f"with w_out (D, F) = ({t.width}, {hidden}); got {tuple(w_in.shape)}"
            )
    else:
        rows = "F" if callable(activation) else hidden
    w_in = t.operand("w_in", w_in, rows, t.width)
    b_in = t.operand("b_in", b_in, w_in.shape[0], optional=True)
    b_out = t.operand("b_out", b_out, t.width, optional=True)
    norm, norm_weight, norm_bias, eps, placement = t.norm(norm, norm_weight, norm_bias, eps, placement)
    dropout = probability("dropout", dropout)
    activation_dropout = probability("activation_dropout", activation_dropout)
    dropped = dropout > 0.0 or activation_dropout > 0.0
    seed = t.seed(seed, used=dropped)
    options = Options(
        norm,
        eps,
        activation,
        number("step", step),
        number("residual_scale", residual_scale),
        placement,
        dropout,
        activation_dropout,
        0,
    )
    tensors = Tensors(w_in, b_in, w_out, b_out, norm_weight, norm_bias, seed)
    return Bound("ffn_step", t.x, tensors, options, save, draws=dropped and seed is None, derived=t.derived)
