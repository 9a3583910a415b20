"""``SplitLayer``: a Transformer layer of any splitting scheme."""

from torch import Tensor, nn

from macaron_ops.ops import Substep
from macaron_ops.ops.checks import choice, number, positive_int
from macaron_ops.ops.run import SAVE
from macaron_ops.splitting import AffineSplitting, Scheme

from .activation import Activation
from .attend_step import AttendStep
from .ffn_step import FFNStep
from .scheme_steps import fused_scheme, of_step, run_scheme

__all__ = ["SplitLayer"]


class SplitLayer(nn.Module):
    """Self-attention A and FFN B in the order and with the step sizes of a splitting scheme, as ONE autograd node
    (a sum of compositions: one for each).

    Every scheme has the same number of matrix parameters: ``dim_feedforward`` is divided among the stages of B, the
    heads (of width ``d_model / nhead``) among those of A. So ``"strang_BAB"`` is the Macaron layer of Lu et al.
    2019, arXiv 1906.02762. Each stage has a norm of its own. With ``shared`` there is one A and one B, of full width,
    that every stage uses: a step of the scheme in the sense of numerical analysis.

    Args:
        d_model: D. nhead: heads in all. dim_feedforward: hidden width in all.
        scheme: a name of :data:`macaron_ops.splitting.CATALOGUE`, or a scheme; real ones of A and B alone. Stages that
            go backwards have a negative step.
        step: h, which multiplies all coefficients.
        shared: one set of parameters for all stages.
        placement: of the norms, ``"pre"`` or ``"post"``; a sum of compositions has only ``"pre"``.
        The others as :class:`FFNStep` and :class:`AttendStep`.

    Raises:
        ValueError, TypeError: an argument does not fit, or cannot be divided among the stages; the message names it.
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        *,
        scheme: str | Scheme = "strang_BAB",
        step: float = 1.0,
        shared: bool = False,
        activation: Activation = "relu",
        norm: str | None = "layer",
        eps: float = 1e-5,
        placement: str = "pre",
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        activation_dropout: float = 0.0,
        bias: bool = True,
        save: str = "fast",
        device=None,
        dtype=None,
    ):
        super().__init__()
        d_model, nhead = positive_int("d_model", d_model), positive_int("nhead", nhead)
        dim_feedforward = positive_int("dim_feedforward", dim_feedforward)
        if d_model % nhead:
            raise ValueError(f"nhead: expected a divisor of d_model = {d_model}; got {nhead}")
        choice("save", save, SAVE)
        self.scheme = fused_scheme(scheme)
        self.step = number("step", step)
        self.shared = shared
        self.save = save
        if isinstance(self.scheme, AffineSplitting) and placement != "pre":
            raise ValueError(f"placement: expected 'pre' for the scheme {self.scheme.name!r}; got {placement!r}")
        heads = nhead if shared else _share("nhead", nhead, self.scheme, "A")
        hidden = dim_feedforward if shared else _share("dim_feedforward", dim_feedforward, self.scheme, "B")
        common = {
            "norm": norm,
            "eps": eps,
            "placement": placement,
            "dropout": dropout,
            "bias": bias,
            "device": device,
            "dtype": dtype,
        }
        attend = {"head_dim": d_model // nhead, "attention_dropout": attention_dropout, **common}
        ffn = {"activation": activation, "activation_dropout": activation_dropout, **common}
        stages = (("A", 1.0), ("B", 1.0)) if shared else (stage for _, term in self.scheme.weighted for stage in term)
        self.stages = nn.ModuleList(
            AttendStep(d_model, heads, step=c * self.step, **attend)
            if o == "A"
            else FFNStep(d_model, hidden, step=c * self.step, **ffn)
            for o, c in stages
        )

    def forward(
        self,
        x: Tensor,
        *,
        causal: bool = False,
        attn_mask: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        rotary: tuple[Tensor, Tensor] | None = None,
        seed: int | Tensor | None = None,
    ) -> Tensor:
        """``x (..., T, D)`` to the same shape.

        Args:
            causal, attn_mask, key_padding_mask, cu_seqlens, rotary: as :func:`macaron_ops.attend_step`.
            seed: of the dropouts; stage i takes ``seed + i``. None: one is drawn.
        """
        attention = {
            "causal": causal,
            "attn_mask": attn_mask,
            "key_padding_mask": key_padding_mask,
            "cu_seqlens": cu_seqlens,
            "rotary": rotary,
        }
        if seed is not None and not isinstance(seed, (int, Tensor)):
            raise TypeError(f"seed: expected an int, an int64 tensor of shape () or None; got {seed!r}")

        def substep(i: int, operator: str, coefficient: float) -> Substep:
            stage = self.stages["AB".index(operator) if self.shared else i]
            stage_seed = None if seed is None else seed + i
            attends = isinstance(stage, AttendStep)
            found = stage.substep(seed=stage_seed, **attention) if attends else stage.substep(stage_seed)
            return of_step(found, coefficient * self.step) if self.shared else found

        return run_scheme(x, self.scheme, substep, self.save)

    def extra_repr(self) -> str:
        step = "" if self.step == 1.0 else f"step={self.step}, "
        return f"scheme={self.scheme.name!r}, {step}{'shared, ' if self.shared else ''}save={self.save!r}"


def _share(name: str, total: int, scheme: Scheme, operator: str) -> int:
    """What each stage of an operator gets of a total."""
    stages = scheme.count(operator)
    if total % stages:
        raise ValueError(
            f"{name}: expected a multiple of {stages}, the number of {operator} stages of {scheme.name!r}; got {total}"
            " (with shared=True all stages have the same parameters, and nothing is divided)"
        )
    return total // stages
