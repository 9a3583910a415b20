"""nGPT, the normalised Transformer: tokens are points on the unit sphere (Loshchilov et al. 2024, arXiv 2410.01131).

    h <- S(h + alpha_A (S(Attention(h)) - h)),    h <- S(h + alpha_M (S(FFN(h)) - h)),    S(z) = z / |z|

Queries and keys are rotated, made unit vectors per head and multiplied by ``s_qk``; scores are scaled by
sqrt(head_dim). ``FFN(h) = W_2 (silu(s_v v sqrt(D)) * s_u u sqrt(D))`` with ``[v; u] = W_1 h``. Logits are
``s_z * (W h)``. After each step of the optimiser all matrices are normalised along D: there is no weight decay and no
norm layer.

The learned scales are stored as ``value / start * base`` with ``base = 1 / sqrt(D)``, so that an optimiser's steps in
them are as large, relatively, as in the matrices (section 2.5). ``W_1``'s rows are scaled in a copy in each call.

Two variants are those of public code, whose checkpoints :meth:`NGPT.from_nvidia` and :meth:`NGPT.from_lucidrains` read:
positions that are factors (``positions="nvidia"``), and values that are the mean with the first layer's
(``value_residual``, Zhou et al. 2024, arXiv 2410.17897). Both run in the same operator with wider matrices, filled up
with zeros in each call.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from macaron_ops.ops import attend_step, ffn_step, normalize_step
from macaron_ops.ops.checks import choice, positive_int
from macaron_ops.ops.run import SAVE

from . import ngpt_checkpoints
from .embedding import check_tokens
from .parts import require_part
from .positions import nvidia_factors, rotary_angles

__all__ = ["NGPT", "NGPTLayer", "keep_normalized"]

ALPHA = 0.05  # the first step size of a substep: about 1 / num_layers (section 2.2.2)
_POSITIONS = {"rotary": rotary_angles, "nvidia": nvidia_factors}


class NGPTLayer(nn.Module):
    """One layer of nGPT, causal.

    Args:
        d_model: D. nhead: heads, divides D.
        dim_feedforward: F; None: 4 D.
        head_dim: None: D / nhead. Another one gives an inner width that is not D.
        save: memory policy, ``"fast"`` or ``"lean"``.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int | None = None,
        *,
        head_dim: int | None = None,
        save: str = "fast",
        device=None,
        dtype=None,
    ):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        d_model, nhead = positive_int("d_model", d_model), positive_int("nhead", nhead)
        hidden = 4 * d_model if dim_feedforward is None else positive_int("dim_feedforward", dim_feedforward)
        if head_dim is None and d_model % nhead:
            raise ValueError(f"nhead: expected a divisor of d_model = {d_model}; got {nhead}")
        choice("save", save, SAVE)
        self.num_heads, self.base, self.save = nhead, d_model**-0.5, save
        self.head_dim = d_model // nhead if head_dim is None else positive_int("head_dim", head_dim)
        self.in_proj = nn.Linear(d_model, 3 * nhead * self.head_dim, bias=False, **factory)
        self.out_proj = nn.Linear(nhead * self.head_dim, d_model, bias=False, **factory)
        self.linear1 = nn.Linear(d_model, 2 * hidden, bias=False, **factory)
        self.linear2 = nn.Linear(hidden, d_model, bias=False, **factory)
        self.attention_alpha = nn.Parameter(torch.full((d_model,), self.base, **factory))
        self.ffn_alpha = nn.Parameter(torch.full((d_model,), self.base, **factory))
        self.qk_scale = nn.Parameter(torch.full((nhead, self.head_dim), self.base, **factory))
        self.hidden_scale = nn.Parameter(torch.ones(2 * hidden, **factory))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Matrices of random directions."""
        for linear in (self.in_proj, self.out_proj, self.linear1, self.linear2):
            nn.init.normal_(linear.weight, std=self.base)
        normalize_weights(self)

    def forward(
        self, h: Tensor, rotary: tuple[Tensor, Tensor] | None = None, *, first_values: Tensor | None = None
    ) -> Tensor:
        """``h (B, T, D)``, rows of unit length, to the same.

        Args:
            rotary: ``(cos, sin)`` as :func:`macaron_ops.attend_step`, or ``(factors, None)``, ``(T, head_dim)``: q and
                k are multiplied by them.
            first_values: :meth:`values` of the first layer; the values are the mean of these and the layer's own.
        """
        for name in ("in_proj", "out_proj", "linear1", "linear2"):
            require_part(name, getattr(self, name), nn.Linear)
        update = {"norm": None, "step": 1.0, "residual_scale": 0.0, "save": self.save}
        x, w_qkv, w_out, qk_scale = h, self.in_proj.weight, self.out_proj.weight, self.qk_scale / self.base
        if first_values is not None:
            x = torch.cat([h, first_values], dim=-1)
            w_qkv, w_out = self._beside_first_values(w_qkv), F.pad(w_out, (0, 0, 0, first_values.shape[-1]))
        if rotary is not None and rotary[1] is None:
            # A channel and one of zeros are a pair, which is multiplied by cos and not turned.
            rotary = rotary[0], torch.zeros_like(rotary[0])
            w_qkv = F.pad(w_qkv.unflatten(0, (-1, self.head_dim)), (0, 0, 0, self.head_dim)).flatten(0, 1)
            w_out = F.pad(w_out.unflatten(1, (-1, self.head_dim)), (0, self.head_dim)).flatten(1)
            qk_scale = F.pad(qk_scale, (0, self.head_dim))
        attended = attend_step(
            x,
            w_qkv,
            None,
            w_out,
            None,
            self.num_heads,
            causal=True,
            rotary=rotary,
            qk_scale=qk_scale,
            scale=self.head_dim**0.5,
            **update,
        )[..., : h.shape[-1]]
        h = self._toward(h, attended, self.attention_alpha)
        scale = self.hidden_scale * h.shape[-1] ** 0.5
        w_in = scale[:, None] * self.linear1.weight
        fed = ffn_step(h, w_in, None, self.linear2.weight, None, activation="swiglu", **update)
        return self._toward(h, fed, self.ffn_alpha)

    def values(self, h: Tensor) -> Tensor:
        """``(B, T, nhead head_dim)``: what the layer's attention averages."""
        return F.linear(h, self.in_proj.weight.chunk(3)[2])

    def _beside_first_values(self, w_qkv: Tensor) -> Tensor:
        """``[[W_q, 0], [W_k, 0], [W_v / 2, 1 / 2]]``, for ``[h, first values]``."""
        w_q, w_k, w_v = w_qkv.chunk(3)
        half = 0.5 * torch.eye(w_v.shape[0], device=w_v.device, dtype=w_v.dtype)
        return torch.cat([F.pad(torch.cat([w_q, w_k]), (0, w_v.shape[0])), torch.cat([0.5 * w_v, half], dim=1)])

    def _toward(self, h: Tensor, u: Tensor, alpha: Tensor) -> Tensor:
        return normalize_step(h, u, alpha.abs() * (ALPHA / self.base), direction="difference")

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, head_dim={self.head_dim}, save={self.save!r}"


class NGPT(nn.Module):
    """The language model: unit token vectors, ``num_layers`` :class:`NGPTLayer`, and scaled cosines as logits.

    Its matrices stay normalised when :func:`keep_normalized` knows the optimiser, or :meth:`normalize_weights` is
    called after each step. Train it without weight decay and warm-up.

    Example::

        model = NGPT(vocab_size=256, d_model=128, nhead=4, num_layers=4)
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        keep_normalized(model, optimizer)
        logits, loss = model(tokens[:, :-1], tokens[:, 1:])

    Args:
        vocab_size: number of tokens.
        positions: ``"rotary"``, or ``"nvidia"``: q and k are not turned, each channel is multiplied by a sine or a
            cosine of the position, as NVIDIA's public code does.
        value_residual: from the second layer on values are the mean of the layer's own and the first layer's.
        The others as :class:`NGPTLayer`.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
    """

    def __init__(
        self,
        vocab_size: int,
        d_model: int,
        nhead: int,
        num_layers: int,
        dim_feedforward: int | None = None,
        *,
        head_dim: int | None = None,
        positions: str = "rotary",
        value_residual: bool = False,
        save: str = "fast",
        device=None,
        dtype=None,
    ):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        choice("positions", positions, tuple(_POSITIONS))
        self.positions, self.value_residual = positions, value_residual
        vocab_size, num_layers = positive_int("vocab_size", vocab_size), positive_int("num_layers", num_layers)
        self.layers = nn.ModuleList(
            NGPTLayer(d_model, nhead, dim_feedforward, head_dim=head_dim, save=save, **factory)
            for _ in range(num_layers)
        )
        self.base = d_model**-0.5
        self.tokens = nn.Embedding(vocab_size, d_model, **factory)
        self.head = nn.Linear(d_model, vocab_size, bias=False, **factory)
        self.logit_scale = nn.Parameter(torch.full((vocab_size,), self.base, **factory))
        nn.init.normal_(self.head.weight, std=self.base)
        normalize_weights(self)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Logits ``(B, T, vocab_size)``, and with ``targets`` also their mean cross entropy, in float32 at least.

        Args:
            tokens: ids ``(B, T)``; position t sees the positions up to t.
            targets: ids ``(B, T)``, the tokens after ``tokens``; -100 is left out of the mean.
        """
        check_tokens("tokens", tokens)
        h = self.tokens(tokens)
        first = self.layers[0]
        rotary = _POSITIONS[self.positions](h.shape[1], first.head_dim, device=h.device, dtype=h.dtype)
        values = first.values(h) if self.value_residual and len(self.layers) > 1 else None
        for layer in self.layers:
            h = layer(h, rotary, first_values=None if layer is first else values)
        logits = self.head(h) * (self.logit_scale / self.base)
        if targets is None:
            return logits
        wide = torch.promote_types(logits.dtype, torch.float32)
        return logits, F.cross_entropy(logits.flatten(0, 1).to(wide), targets.flatten().long())

    @classmethod
    def from_nvidia(cls, state: Mapping[str, Tensor], *, n_head: int, base_scale: float, save: str = "fast") -> "NGPT":
        """See :func:`.ngpt_checkpoints.from_nvidia`."""
        return ngpt_checkpoints.from_nvidia(cls, state, n_head=n_head, base_scale=base_scale, save=save)

    @classmethod
    def from_lucidrains(cls, state: Mapping[str, Tensor], *, heads: int, save: str = "fast", **options) -> "NGPT":
        """See :func:`.ngpt_checkpoints.from_lucidrains`."""
        return ngpt_checkpoints.from_lucidrains(cls, state, heads=heads, save=save, **options)

    def normalize_weights(self) -> None:
        """Makes the rows, or columns, of all matrices unit vectors again."""
        normalize_weights(self)


@torch.no_grad()
def normalize_weights(module: nn.Module) -> None:
    """Each matrix of nGPT's layers and embeddings in ``module``, along D, by one multi-tensor call."""
    weights, lengths = [], []
    for part in module.modules():
        if isinstance(part, NGPTLayer):
            pairs = ((part.in_proj, 1), (part.linear1, 1), (part.out_proj, 0), (part.linear2, 0))
        elif isinstance(part, NGPT):
            pairs = ((part.tokens, 1), (part.head, 1))
        else:
            continue
        for owner, dim in pairs:
            weights.append(owner.weight)
            lengths.append(torch.linalg.vector_norm(owner.weight, dim=dim, keepdim=True, dtype=_wide(owner.weight)))
    torch._foreach_div_(weights, [length.to(w.dtype) for length, w in zip(lengths, weights, strict=True)])


def _wide(weight: Tensor) -> torch.dtype:
    return torch.promote_types(weight.dtype, torch.float32)


def keep_normalized(model: nn.Module, optimizer: torch.optim.Optimizer) -> torch.utils.hooks.RemovableHandle:
    """Has every step of ``optimizer`` followed by :func:`normalize_weights`; the handle's ``remove()`` ends that.

    Raises:
        ValueError: ``model`` has no layer of nGPT.
    """
    if not any(isinstance(part, NGPTLayer) for part in model.modules()):
        raise ValueError(f"model: expected one with an NGPTLayer; got {type(model).__name__}")
    return optimizer.register_step_post_hook(lambda *_: normalize_weights(model))
