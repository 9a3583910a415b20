"""``SplitLayer``: a Transformer layer of any splitting scheme."""

from torch import Tensor, nn

from macaron_ops.ops import parallel
from macaron_ops.ops import split_layer as operator
from macaron_ops.ops.checks import choice, positive_int
from macaron_ops.ops.run import SAVE
from macaron_ops.splitting import AffineSplitting, Splitting, find

from .activation import Activation
from .attend_step import AttendStep
from .ffn_step import FFNStep

__all__ = ["SplitLayer"]


class SplitLayer(nn.Module):
    """Self-attention A and FFN B in the order and with the step sizes of a splitting scheme, as ONE autograd node.

    Every scheme has the same number of matrix parameters: ``dim_feedforward`` is divided among the stages of B, the
    heads (of width ``d_model / nhead``) among those of A. So ``"strang_BAB"`` is the Macaron layer of Lu et al.
    2019, arXiv 1906.02762. Each stage has a norm of its own.

    Args:
        d_model: D. nhead: heads in all. dim_feedforward: hidden width in all.
        scheme: a name of :data:`macaron_ops.splitting.CATALOGUE`, or a scheme.
        placement: of the norms, ``"pre"`` or ``"post"``; a parallel scheme has only ``"pre"``.
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
        scheme: str | Splitting | AffineSplitting = "strang_BAB",
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
        self.scheme = scheme if isinstance(scheme, (Splitting, AffineSplitting)) else find(scheme)
        self.save = save
        self.joined = isinstance(self.scheme, AffineSplitting)
        stages = self.scheme.increments if self.joined else self.scheme.stages
        if stages is None:
            raise ValueError(f"scheme: expected a composition, or a sum of single stages; got {self.scheme.name!r}")
        if self.joined and placement != "pre":
            raise ValueError(f"placement: expected 'pre' for the scheme {self.scheme.name!r}; got {placement!r}")
        heads = _share("nhead", nhead, self.scheme, "A")
        hidden = _share("dim_feedforward", dim_feedforward, self.scheme, "B")
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
        self.stages = nn.ModuleList(
            AttendStep(d_model, heads, step=c, **attend) if o == "A" else FFNStep(d_model, hidden, step=c, **ffn)
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
        substeps = []
        for i, stage in enumerate(self.stages):
            stage_seed = None if seed is None else seed + i
            attends = isinstance(stage, AttendStep)
            substeps.append(stage.substep(seed=stage_seed, **attention) if attends else stage.substep(stage_seed))
        return operator(x, [parallel(*substeps)] if self.joined else substeps, save=self.save)

    def extra_repr(self) -> str:
        return f"scheme={self.scheme.name!r}, save={self.save!r}"


def _share(name: str, total: int, scheme: Splitting | AffineSplitting, operator: str) -> int:
    """What each stage of an operator gets of a total."""
    stages = scheme.count(operator)
    if total % stages:
        raise ValueError(
            f"{name}: expected a multiple of {stages}, the number of {operator} stages of {scheme.name!r}; got {total}"
        )
    return total // stages
