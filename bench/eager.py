"""The denominators: each operator and layer in plain PyTorch, as fast as eager PyTorch lets it be.

Pre-norm, one product for q, k and v, `scaled_dot_product_attention` on views, the step folded into the residual sum
(`torch.add(x, u, alpha=c)`), nothing copied that need not be. Dropout is left out on every side of the comparison.

    Lie-Trotter:  x <- x + A(x);           x <- x + B(x)
    Strang:       x <- x + 1/2 B1(x);      x <- x + A(x);      x <- x + 1/2 B2(x)

Parameters carry the names of `nn.TransformerEncoderLayer` (and `macaron_*` for the first half-FFN), so that one
state_dict loads into every implementation of a scheme.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from macaron_ops.splitting import Scheme

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}
SCHEMES = ("Lie-Trotter", "Strang")


def ffn_step(
    x: Tensor,
    w_in: Tensor,
    b_in: Tensor,
    w_out: Tensor,
    b_out: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    *,
    activation: str,
    step: float,
    onto: Tensor | None = None,
) -> Tensor:
    """y = x + step (W_out act(W_in LN(x) + b_in) + b_out); x, y (..., D), w_in (F, D), w_out (D, F). `onto` takes the
    place of the x that is added to."""
    normed = F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias)
    hidden = ACTIVATIONS[activation](F.linear(normed, w_in, b_in))
    return torch.add(x if onto is None else onto, F.linear(hidden, w_out, b_out), alpha=step)


def attend_step(
    x: Tensor,
    w_qkv: Tensor,
    b_qkv: Tensor,
    w_out: Tensor,
    b_out: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    *,
    heads: int,
    step: float = 1.0,
) -> Tensor:
    """y = x + step (W_out MHA(LN(x)) + b_out); x, y (B, T, D), w_qkv (3D, D)."""
    batch, length, width = x.shape
    qkv = F.linear(F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias), w_qkv, b_qkv)
    q, k, v = qkv.view(batch, length, 3, heads, width // heads).permute(2, 0, 3, 1, 4).unbind(0)
    mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, length, width)
    return torch.add(x, F.linear(mixed, w_out, b_out), alpha=step)


def normalize_step(x: Tensor, u: Tensor, *, step: float) -> Tensor:
    """y = S(x + step (u - <u, x> x)), S(z) = z / |z|; all (..., D)."""
    tangent = u - (u * x).sum(-1, keepdim=True) * x
    return F.normalize(torch.add(x, tangent, alpha=step), dim=-1)


def sphere_attend_step(x: Tensor, *, step: float, beta: float) -> Tensor:
    """u_i = sum_j softmax_j(beta <x_i, x_j>) x_j, then normalize_step; x (B, n, d). Stores n x n weights."""
    return normalize_step(x, torch.softmax((beta * x) @ x.mT, dim=-1) @ x, step=step)


@torch.no_grad()
def times_to_cluster(x: Tensor, *, beta: float, t: float, step: float, close: float) -> Tensor:
    """The first time at which all products of a start, x (batch, n, d), are above `close`; (batch,), inf if none is."""
    arrivals = torch.full((len(x),), torch.inf, dtype=torch.float64, device=x.device)
    for taken in range(round(t / step) + 1):
        together = (x @ x.mT).amin((-1, -2)) > close
        arrivals = torch.where(together & arrivals.isinf(), taken * step, arrivals)
        x = sphere_attend_step(x, step=step, beta=beta)
    return arrivals


def sphere_attend_step_sdpa(x: Tensor, *, step: float, beta: float, others: Tensor | None = None) -> Tensor:
    """The same by `scaled_dot_product_attention`, whose kernels for large n store no weights. `others`, x by default,
    are the particles that x is drawn to."""
    heads, all_heads = x.unsqueeze(1), (x if others is None else others).unsqueeze(1)
    u = F.scaled_dot_product_attention(heads, all_heads, all_heads, scale=beta).squeeze(1)
    return normalize_step(x, u, step=step)


def sphere_attend_step_keops(x: Tensor, *, step: float, beta: float) -> Tensor:
    """The same by pykeops, which compiles the sum over j the first time (half a minute) and keeps it on disk."""
    LazyTensor = _lazy_tensor()
    here, others = LazyTensor((beta * x).unsqueeze(2)), LazyTensor(x.unsqueeze(1))
    return normalize_step(x, (here | others).sumsoftmaxweight(others, axis=2), step=step)


@cache
def _lazy_tensor() -> type:
    """pykeops' LazyTensor. Where its OpenMP is not torch's, it reads how many threads to start when it is loaded."""
    os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    os.environ.setdefault("KEOPS_VERBOSE", "0")
    from pykeops.torch import LazyTensor

    return LazyTensor


class EagerLieTrotterLayer(nn.Module):
    """The standard pre-norm encoder layer: (B, T, D) -> (B, T, D), the function of `nn.TransformerEncoderLayer`."""

    def __init__(self, width: int, heads: int, hidden: int, activation: str) -> None:
        super().__init__()
        self.activation = activation
        self.self_attn = nn.MultiheadAttention(width, heads, batch_first=True)  # holds the parameters; not called
        self.linear1 = nn.Linear(width, hidden)
        self.linear2 = nn.Linear(hidden, width)
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.feed(self.attend(x), self.linear1, self.linear2, self.norm2, step=1.0)

    def attend(self, x: Tensor, step: float = 1.0) -> Tensor:
        p, norm, out = self.self_attn, self.norm1, self.self_attn.out_proj
        weights = (p.in_proj_weight, p.in_proj_bias, out.weight, out.bias, norm.weight, norm.bias)
        return attend_step(x, *weights, heads=p.num_heads, step=step)

    def feed(
        self,
        x: Tensor,
        w_in: nn.Linear,
        w_out: nn.Linear,
        norm: nn.LayerNorm,
        step: float,
        onto: Tensor | None = None,
    ) -> Tensor:
        weights = (w_in.weight, w_in.bias, w_out.weight, w_out.bias, norm.weight, norm.bias)
        return ffn_step(x, *weights, activation=self.activation, step=step, onto=onto)


class EagerStrangLayer(EagerLieTrotterLayer):
    """The Macaron layer: a half-step of each of two FFNs around a whole step of attention. `hidden` is their sum."""

    def __init__(self, width: int, heads: int, hidden: int, activation: str) -> None:
        super().__init__(width, heads, hidden // 2, activation)
        self.macaron_linear1 = nn.Linear(width, hidden // 2)
        self.macaron_linear2 = nn.Linear(hidden // 2, width)
        self.macaron_norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.feed(x, self.macaron_linear1, self.macaron_linear2, self.macaron_norm, step=0.5)
        return self.feed(self.attend(x), self.linear1, self.linear2, self.norm2, step=0.5)


class EagerSchemeLayer(EagerLieTrotterLayer):
    """One step of any real splitting scheme, all stages with the one attention and the one FFN."""

    def __init__(self, width: int, heads: int, hidden: int, activation: str, scheme: Scheme) -> None:
        super().__init__(width, heads, hidden, activation)
        self.scheme = scheme

    def forward(self, x: Tensor) -> Tensor:
        if getattr(self.scheme, "increments", None):  # the parallel layer
            return self.feed(x, self.linear1, self.linear2, self.norm2, step=1.0, onto=self.attend(x))
        terms = [(weight, self.compose(x, stages)) for weight, stages in self.scheme.weighted]
        (weight, total), *others = terms
        total = total if weight == 1.0 else weight * total
        for weight, term in others:
            total = torch.add(total, term, alpha=weight)
        return total

    def compose(self, x: Tensor, stages: tuple) -> Tensor:
        for operator, c in stages:
            x = self.attend(x, c) if operator == "A" else self.feed(x, self.linear1, self.linear2, self.norm2, step=c)
        return x


EAGER_LAYERS: dict[str, type[EagerLieTrotterLayer]] = {"Lie-Trotter": EagerLieTrotterLayer, "Strang": EagerStrangLayer}


def avoid_kinks_(layer: EagerLieTrotterLayer, x: Tensor) -> None:
    """Moves the biases in front of relu, by a thousandth, away from where it has no derivative: a hidden unit within
    rounding of 0 would have a gradient in one implementation and none in another, both right."""
    exact = copy.deepcopy(layer).double()
    feed = exact.feed

    def moved(x: Tensor, w_in: nn.Linear, w_out: nn.Linear, norm: nn.LayerNorm, step: float) -> Tensor:
        w_in.bias += kink_shift(x, w_in.weight, w_in.bias, norm.weight, norm.bias)
        return feed(x, w_in, w_out, norm, step)

    exact.feed = moved
    with torch.no_grad():
        exact(x.double())
    layer.load_state_dict(exact.state_dict())


def kink_shift(x: Tensor, w_in: Tensor, b_in: Tensor, norm_weight: Tensor, norm_bias: Tensor) -> Tensor:
    """For each hidden unit, the one of a few small shifts that leaves its smallest pre-activation farthest from 0."""
    hidden = F.linear(F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias), w_in, b_in).flatten(0, -2)
    shifts = torch.linspace(-1e-3, 1e-3, 9, dtype=hidden.dtype, device=hidden.device)
    distances = torch.stack([(hidden + shift).abs().amin(0) for shift in shifts])
    return shifts[distances.argmax(0)]


def randomize_(module: nn.Module, seed: int) -> nn.Module:
    """Random parameters, with no zero bias and no unit norm weight, which would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(random_parameter(name, tuple(parameter.shape), generator))
    return module


def random_parameter(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Normal: matrices scaled by fan-in^-1/2, norm weights about 1, everything else small."""
    values = torch.randn(shape, generator=generator, device=generator.device)
    if len(shape) == 2:
        return values * shape[1] ** -0.5
    return 1 + 0.1 * values if "norm" in name and name.endswith("weight") else 0.1 * values
