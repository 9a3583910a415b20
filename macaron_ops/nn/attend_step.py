"""``AttendStep``: the attention step with its parameters."""

from torch import Tensor, nn

from macaron_ops.ops import Substep, split_layer, substep
from macaron_ops.ops import attend_step as operator
from macaron_ops.ops.checks import choice, number, positive_int, probability
from macaron_ops.ops.run import SAVE

from .norm import build_norm, norm_arguments
from .parts import require_part

__all__ = ["AttendStep"]


class AttendStep(nn.Module):
    """``y = a x + c MHA(N(x))``, or post-norm ``y = N(a x + c MHA(x))``: one :func:`macaron_ops.attend_step`.

    Initialised as ``nn.MultiheadAttention``: q, k, v Xavier uniform, the output matrix as ``nn.Linear``, biases 0.

    Args:
        d_model: D. num_heads: H.
        num_kv_heads: divides H (grouped queries); None: H.
        head_dim: None: D / H. Another one gives an inner width H head_dim that is not D.
        context_dim: width of the tokens that cross-attention reads, with q, k and v as matrices of their own; None:
            one packed matrix, for self-attention or a context of width D.
        norm: ``"layer"``, ``"rms"``, ``"sphere"`` or None. eps: of the norm.
        step: c. residual_scale: a. placement: of the norm, ``"pre"`` or ``"post"``.
        dropout, attention_dropout: probabilities, of the output and of the attention weights, in training.
        bias: of all matrices and of a LayerNorm.
        save: memory policy, ``"fast"`` or ``"lean"``.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        context_dim: int | None = None,
        norm: str | None = "layer",
        eps: float = 1e-5,
        step: float = 1.0,
        residual_scale: float = 1.0,
        placement: str = "pre",
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        bias: bool = True,
        save: str = "fast",
        device=None,
        dtype=None,
    ):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        d_model = positive_int("d_model", d_model)
        self.num_heads = positive_int("num_heads", num_heads)
        self.num_kv_heads = self.num_heads if num_kv_heads is None else positive_int("num_kv_heads", num_kv_heads)
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads: expected a divisor of num_heads = {num_heads}; got {num_kv_heads}")
        if head_dim is None and d_model % self.num_heads:
            raise ValueError(f"num_heads: expected a divisor of d_model = {d_model}; got {num_heads}")
        self.head_dim = d_model // self.num_heads if head_dim is None else positive_int("head_dim", head_dim)
        self.context_dim = None if context_dim is None else positive_int("context_dim", context_dim)
        choice("placement", placement, ("pre", "post"))
        choice("save", save, SAVE)
        self.step = number("step", step)
        self.residual_scale = number("residual_scale", residual_scale)
        self.placement = placement
        self.dropout = probability("dropout", dropout)
        self.attention_dropout = probability("attention_dropout", attention_dropout)
        self.save = save
        self.norm = build_norm(norm, d_model, eps, bias, **factory)
        width, kv_width = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        if self.context_dim is None:
            self.in_proj = nn.Linear(d_model, width + 2 * kv_width, bias=bias, **factory)
        else:
            self.q_proj = nn.Linear(d_model, width, bias=bias, **factory)
            self.k_proj = nn.Linear(self.context_dim, kv_width, bias=bias, **factory)
            self.v_proj = nn.Linear(self.context_dim, kv_width, bias=bias, **factory)
        self.out_proj = nn.Linear(width, d_model, bias=bias, **factory)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As ``nn.MultiheadAttention``."""
        for linear in self._projections().values():
            nn.init.xavier_uniform_(linear.weight)
        self.out_proj.reset_parameters()
        for linear in (*self._projections().values(), self.out_proj):
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        causal: bool = False,
        attn_mask: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        rotary: tuple[Tensor, Tensor] | None = None,
        seed: int | Tensor | None = None,
    ) -> Tensor:
        """``x (..., T, D)`` to the same shape; the arguments are those of :func:`macaron_ops.attend_step`."""
        step = self.substep(
            context,
            causal=causal,
            attn_mask=attn_mask,
            key_padding_mask=key_padding_mask,
            cu_seqlens=cu_seqlens,
            rotary=rotary,
            seed=seed,
        )
        return split_layer(x, [step], save=self.save)

    def substep(
        self,
        context: Tensor | None = None,
        *,
        causal: bool = False,
        attn_mask: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        rotary: tuple[Tensor, Tensor] | None = None,
        seed: int | Tensor | None = None,
    ) -> Substep:
        """The step as an element of :func:`macaron_ops.split_layer`."""
        projections = self._projections()
        for name, linear in {**projections, "out_proj": self.out_proj}.items():
            require_part(name, linear, nn.Linear)
        if self.context_dim is None:
            weights, biases = self.in_proj.weight, self.in_proj.bias
        elif context is None:
            raise ValueError(f"context: expected a tensor of width context_dim = {self.context_dim}; got None")
        else:
            weights = tuple(p.weight for p in projections.values())
            biases = tuple(p.bias for p in projections.values())
        return substep(
            operator,
            weights,
            biases,
            self.out_proj.weight,
            self.out_proj.bias,
            self.num_heads,
            num_kv_heads=self.num_kv_heads,
            step=self.step,
            residual_scale=self.residual_scale,
            placement=self.placement,
            context=context,
            causal=causal,
            attn_mask=attn_mask,
            key_padding_mask=key_padding_mask,
            cu_seqlens=cu_seqlens,
            rotary=rotary,
            dropout=self.dropout if self.training else 0.0,
            attention_dropout=self.attention_dropout if self.training else 0.0,
            seed=seed,
            **norm_arguments(self.norm),
        )

    def _projections(self) -> dict[str, nn.Linear]:
        names = ("in_proj",) if self.context_dim is None else ("q_proj", "k_proj", "v_proj")
        return {name: getattr(self, name) for name in names}

    def extra_repr(self) -> str:
        groups = "" if self.num_kv_heads == self.num_heads else f"num_kv_heads={self.num_kv_heads}, "
        a = "" if self.residual_scale == 1.0 else f"residual_scale={self.residual_scale}, "
        return (
            f"num_heads={self.num_heads}, {groups}head_dim={self.head_dim}, step={self.step}, {a}"
            f"placement={self.placement!r}, dropout={self.dropout}, attention_dropout={self.attention_dropout}, "
            f"save={self.save!r}"
        )
