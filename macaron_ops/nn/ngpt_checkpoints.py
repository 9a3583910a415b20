"""nGPT checkpoints of public code, read into :class:`macaron_ops.nn.NGPT`.

What such a ``state_dict`` does not say is asked for; a tensor that is missing, unknown or of another shape is an error.
Learned scales are stored as ``value / start * base`` in all three, with other starts and bases: values are kept, not
what is stored.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["from_lucidrains", "from_nvidia"]

_ROUNDING = 2**-8  # of a unit vector that was stored in bfloat16
_COMPILED = "_orig_mod."  # torch.compile puts it before every name


def from_nvidia(cls: type, state: Mapping[str, Tensor], *, n_head: int, base_scale: float, save: str = "fast"):
    """A model of NVIDIA/ngpt (``model.py``) with ``use_nGPT=1``, in float32.

    The same function, positions included: that code multiplies q and k by sines and cosines and does not rotate them
    (``positions="nvidia"``).

    Args:
        state: the checkpoint's ``"model"``.
        n_head, base_scale: of its ``"model_args"``.

    Raises:
        ValueError: the tensors are not those of such a model, or token vectors have not length 1, as its training
            leaves them: to its first layer each would be another length in the values than in the residual.
    """
    source = _Source(state)
    tokens = source.take("transformer.wte.weight", None, None)
    lengths = tokens.norm(dim=1)
    if not torch.allclose(lengths, torch.ones_like(lengths), atol=_ROUNDING):
        raise ValueError(
            "state: transformer.wte.weight: expected rows of length 1, normalised as after a step of training; got "
            f"lengths from {lengths.min():.3g} to {lengths.max():.3g}"
        )
    vocabulary, width = tokens.shape
    if width % n_head or width // n_head % 2:
        raise ValueError(f"n_head: expected a divisor of n_embd = {width} that leaves an even width; got {n_head}")
    layers = source.count("transformer.h.")
    model = _empty(cls, vocabulary, width, n_head, layers, 4 * width, positions="nvidia", save=save)
    scale = model.base / base_scale
    found = {
        "tokens.weight": F.normalize(tokens, dim=-1),
        "head.weight": source.take("lm_head.weight", vocabulary, width),
        "logit_scale": source.take("sz", vocabulary) * scale,
    }
    for i in range(layers):
        theirs, ours = f"transformer.h.{i}.", f"layers.{i}."
        qkv = [source.take(f"{theirs}{name}.weight", width, width) for name in ("query", "key", "value")]
        c_fc, suv = source.take(f"{theirs}c_fc.weight", 8 * width, width), source.take(f"{theirs}suv", 8 * width)
        # They multiply by s_qk after each pair of channels has changed places.
        sqk = source.take(f"{theirs}sqk", width).unflatten(0, (-1, 2)).flip(1)
        found |= {
            f"{ours}in_proj.weight": torch.cat(qkv),
            f"{ours}out_proj.weight": source.take(f"{theirs}att_c_proj.weight", width, width),
            f"{ours}qk_scale": sqk.reshape(n_head, -1) * scale,
            f"{ours}attention_alpha": source.take(f"{theirs}attn_alpha", width) * scale,
            # u comes first and v, which is activated, second.
            f"{ours}linear1.weight": torch.cat(c_fc.chunk(2)[::-1]),
            f"{ours}hidden_scale": torch.cat(suv.chunk(2)[::-1]),
            f"{ours}linear2.weight": source.take(f"{theirs}mlp_c_proj.weight", width, 4 * width),
            f"{ours}ffn_alpha": source.take(f"{theirs}mlp_alpha", width) * scale,
        }
    return _filled(model, found, source)


def from_lucidrains(
    cls: type,
    state: Mapping[str, Tensor],
    *,
    heads: int,
    add_value_residual: bool = True,
    alpha_init: float | None = None,
    save: str = "fast",
):
    """A ``nGPT`` of lucidrains' package nGPT-pytorch (0.2.16 was read), in float32: the same function.

    Its learned scale of q alone, s, is ours of q and k, ``sqrt(s)``. A tied embedding becomes two equal matrices.

    Args:
        state: its ``state_dict``, with parametrised weights or ``manual_norm_weights``.
        heads, add_value_residual, alpha_init: as the model was made with; the defaults are its own. Of its other
            options those that change no tensor's shape (``causal``, ``attn_norm_qk``, ``norm_eps``,
            ``num_hyperspheres``, the ``..._init`` and ``..._scale``) have to be at their defaults.

    Raises:
        ValueError: the tensors are not those of such a model, or a learned scale of q or step size is negative, which
            nGPT's absolute values do not give.
    """
    source = _Source(state)
    tokens = source.weight("token_embed", None, None)
    vocabulary, width = tokens.shape
    layers = source.count("layers.")
    inner, hidden = (source.weight(f"layers.0.{n}", None, width).shape[0] for n in ("0.fn.to_q", "1.fn.to_hidden"))
    if inner % heads or inner // heads % 2:
        raise ValueError(f"heads: expected a divisor of {inner} that leaves an even width; got {heads}")
    head_dim = inner // heads
    model = _empty(
        cls, vocabulary, width, heads, layers, hidden, head_dim=head_dim, value_residual=add_value_residual, save=save
    )
    _check_frequencies(source.take("rotary_embed.freqs", head_dim // 2), head_dim)
    step = (1 / layers if alpha_init is None else alpha_init) / 0.05  # their first step size over ours, ALPHA
    found = {
        "tokens.weight": tokens,
        "head.weight": source.weight("to_logits", vocabulary, width) if source.has("to_logits") else tokens.clone(),
        "logit_scale": source.take("logit_scale.scale", vocabulary),
    }
    for i in range(layers):
        attention, ffn, ours = f"layers.{i}.0.", f"layers.{i}.1.", f"layers.{i}."
        q, k, v = (source.weight(f"{attention}fn.to_{name}", inner, width) for name in "qkv")
        s_qk = source.positive(f"{attention}fn.qk_scale.scale", inner) * width
        gate, up = (source.weight(f"{ffn}fn.to_{name}", hidden, width) for name in ("gate", "hidden"))
        gate_scale, up_scale = (source.take(f"{ffn}fn.{name}_scale.scale", hidden) for name in ("gate", "hidden"))
        found |= {
            f"{ours}in_proj.weight": torch.cat([_half_split(q, heads), _half_split(k, heads), v]),
            f"{ours}out_proj.weight": source.weight(f"{attention}fn.to_out", width, inner, dim=0),
            f"{ours}qk_scale": _half_split(s_qk.sqrt(), heads).view(heads, head_dim) * model.base,
            f"{ours}attention_alpha": source.positive(f"{attention}branch_scale.scale", width) * step,
            f"{ours}linear1.weight": torch.cat([gate, up]),
            f"{ours}hidden_scale": torch.cat([gate_scale, up_scale * model.base]),
            f"{ours}linear2.weight": source.weight(f"{ffn}fn.to_out", width, hidden, dim=0),
            f"{ours}ffn_alpha": source.positive(f"{ffn}branch_scale.scale", width) * step,
        }
    return _filled(model, found, source)


class _Source:
    """A ``state_dict`` that knows what was read of it."""

    def __init__(self, state: Mapping[str, Tensor]):
        self._state = {name.removeprefix(_COMPILED): tensor for name, tensor in state.items()}
        self._left = set(self._state)

    def has(self, prefix: str) -> bool:
        return any(name.startswith(prefix) for name in self._state)

    def count(self, prefix: str) -> int:
        """The number of layers."""
        found = {int(name.removeprefix(prefix).split(".")[0]) for name in self._state if name.startswith(prefix)}
        if not found or found != set(range(len(found))):
            raise ValueError(f"state: expected layers {prefix}0 and so on; got {sorted(found)}")
        return len(found)

    def take(self, name: str, *shape: int | None) -> Tensor:
        """A tensor of this shape in float32; None stands for any size."""
        if name not in self._state:
            raise ValueError(f"state: expected a tensor {name}; there is none")
        tensor = self._state[name]
        if tensor.dim() != len(shape) or any(w not in (None, h) for h, w in zip(tensor.shape, shape, strict=True)):
            expected = tuple("any" if size is None else size for size in shape)
            raise ValueError(f"state: {name}: expected shape {expected}; got {tuple(tensor.shape)}")
        self._left.discard(name)
        return tensor.detach().float()

    def positive(self, name: str, *shape: int) -> Tensor:
        tensor = self.take(name, *shape)
        if (tensor < 0).any():
            raise ValueError(
                f"state: {name}: expected no negative number, which nGPT has no form of; got {tensor.min()}"
            )
        return tensor

    def weight(self, name: str, *shape: int | None, dim: int = -1) -> Tensor:
        """The matrix of lucidrains' ``NormLinear``: as stored, or normalised along ``dim`` by its parametrisation."""
        original = f"{name}.linear.parametrizations.weight.original"
        if original in self._state:
            return F.normalize(self.take(original, *shape), dim=dim)
        return self.take(f"{name}.linear.weight", *shape)

    def require_all_read(self) -> None:
        if self._left:
            raise ValueError(f"state: expected the tensors of an nGPT; got also {', '.join(sorted(self._left)[:5])}")


def _empty(cls: type, *sizes: int, **options):
    return cls(*sizes, device="meta", dtype=torch.float32, **options)


def _filled(model, tensors: dict[str, Tensor], source: _Source):
    source.require_all_read()
    model.load_state_dict({name: tensor.clone() for name, tensor in tensors.items()}, assign=True)
    return model.requires_grad_()


def _half_split(rows: Tensor, heads: int) -> Tensor:
    """Rows, or numbers, of q and k whose pairs of channels are neighbours, with the halves of pairs apart, as
    ``attend_step`` turns them."""
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def _check_frequencies(found: Tensor, head_dim: int) -> None:
    expected = 10000.0 ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    if not torch.allclose(found.cpu(), expected):
        raise ValueError("state: rotary_embed.freqs: expected the frequencies 10000^(-2i / dim_head); got others")
