"""What ``forward`` of torch's encoder and decoder layers means, up to the substeps: shapes, masks, nested inputs.

Masks mean what they mean to ``nn.MultiheadAttention``: ``(T, S)`` or ``(B H, T, S)`` and ``(B, S)`` (``(S,)``
unbatched), bool (True: may not attend) or added to the scores. ``is_causal`` is torch's hint that the mask is the
causal one: it takes the mask's place, unless there is a key padding mask too. As torch takes it, a float32 mask may go
with inputs of any dtype; it is cast to theirs. The one intended difference: a row that is masked entirely attends to
nothing and gives zeros, where torch gives NaN.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from macaron_ops.ops import Substep, split_layer
from macaron_ops.ops.autocast import autocast_dtype

from .nested import pack, pad
from .parts import require_part

__all__ = ["attention_arguments", "decode", "encode", "require_mask"]


def encode(
    substeps: Callable[..., list[Substep]],
    attention: nn.MultiheadAttention,
    src: Tensor,
    src_mask: Tensor | None,
    src_key_padding_mask: Tensor | None,
    is_causal: bool,
    save: str,
) -> Tensor:
    """An encoder layer whose ``substeps(**arguments of the attention)`` are given."""
    require_part("self_attn", attention, nn.MultiheadAttention)
    _check_hint("is_causal", is_causal)
    _check_input("src", src, attention)
    if src.is_nested:
        _check_nested("src", src, attention, src_mask=src_mask, src_key_padding_mask=src_key_padding_mask)
        packed, cu_seqlens, repack = pack(src)
        return repack(split_layer(packed, substeps(causal=is_causal, cu_seqlens=cu_seqlens), save=save))
    x = _batch_first("src", src, attention)
    arguments = attention_arguments(
        ("src_mask", src_mask), ("src_key_padding_mask", src_key_padding_mask), is_causal, attention.num_heads, x, x
    )
    return _like(src, split_layer(x, substeps(**arguments), save=save), attention)


def decode(
    substeps: Callable[[dict, dict], list[Substep]],
    self_attention: nn.MultiheadAttention,
    cross_attention: nn.MultiheadAttention,
    tgt: Tensor,
    memory: Tensor,
    tgt_mask: Tensor | None,
    memory_mask: Tensor | None,
    tgt_key_padding_mask: Tensor | None,
    memory_key_padding_mask: Tensor | None,
    tgt_is_causal: bool,
    memory_is_causal: bool,
    save: str,
) -> Tensor:
    """A decoder layer whose ``substeps(arguments of the self-attention, of the cross-attention)`` are given."""
    require_part("self_attn", self_attention, nn.MultiheadAttention)
    require_part("multihead_attn", cross_attention, nn.MultiheadAttention)
    _check_hint("tgt_is_causal", tgt_is_causal)
    _check_hint("memory_is_causal", memory_is_causal)
    _check_input("tgt", tgt, self_attention)
    _check_input("memory", memory, cross_attention)
    repack = None
    if tgt.is_nested:
        _check_nested("tgt", tgt, self_attention, tgt_mask=tgt_mask, tgt_key_padding_mask=tgt_key_padding_mask)
        x, tgt_key_padding_mask, repack = pad(tgt)
    else:
        x = _batch_first("tgt", tgt, self_attention)
    if memory.is_nested:
        _check_nested(
            "memory", memory, self_attention, memory_mask=memory_mask, memory_key_padding_mask=memory_key_padding_mask
        )
        context, memory_key_padding_mask, _ = pad(memory)
    else:
        context = _batch_first("memory", memory, cross_attention, cross_attention.kdim)
    if context.dim() != x.dim() or context.shape[:-2] != x.shape[:-2]:
        raise ValueError(f"memory: expected the batch of tgt, {tuple(tgt.shape)}; got {tuple(memory.shape)}")
    heads = self_attention.num_heads
    tgt_masks = ("tgt_mask", tgt_mask), ("tgt_key_padding_mask", tgt_key_padding_mask), tgt_is_causal
    memory_masks = ("memory_mask", memory_mask), ("memory_key_padding_mask", memory_key_padding_mask), memory_is_causal
    among = attention_arguments(*tgt_masks, heads, x, x)
    across = attention_arguments(*memory_masks, cross_attention.num_heads, x, context)
    y = split_layer(x, substeps(among, {"context": context, **across}), save=save)
    return _like(tgt, y, self_attention) if repack is None else repack(y)


def require_mask(hint: str, is_causal: bool, name: str, mask: Tensor | None) -> None:
    """In torch's layers ``is_causal`` says something about the mask and does not stand for it."""
    if is_causal is True and mask is None:
        raise ValueError(f"{hint}: expected False without {name}: it is a hint that {name} is causal; got True")


def attention_arguments(
    attn_mask: tuple[str, Tensor | None],
    key_padding_mask: tuple[str, Tensor | None],
    is_causal: bool,
    num_heads: int,
    x: Tensor,
    context: Tensor,
) -> dict:
    """``causal``, ``attn_mask`` and ``key_padding_mask`` of ``attend_step`` from the (named) arguments of a layer."""
    mask_name, mask = attn_mask
    padding_name, padding = key_padding_mask
    tokens, keys = x.shape[-2], context.shape[-2]
    if mask is not None:
        sequences = x.shape[0] if x.dim() == 3 else 1
        _check_mask(mask_name, mask, x, (tokens, keys), (sequences * num_heads, tokens, keys))
    if padding is not None:
        _check_mask(padding_name, padding, x, (*x.shape[:-2], keys))
    causal = is_causal and (padding is None or mask is None)
    return {
        "causal": causal,
        "attn_mask": None if causal else _like_input(mask, x),
        "key_padding_mask": _like_input(padding, x),
    }


def _check_mask(name: str, mask: object, x: Tensor, *shapes: tuple[int, ...]) -> None:
    """A mask of one of the shapes, of a dtype and on the device that go with ``x``."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name}: expected a tensor or None; got {type(mask).__name__}")
    if mask.dtype not in (torch.bool, torch.float32, x.dtype) and not _autocasts(x, mask.dtype):
        raise TypeError(f"{name}: expected dtype bool, float32 or that of the input, {x.dtype}; got {mask.dtype}")
    if tuple(mask.shape) not in shapes:
        raise ValueError(f"{name}: expected shape {' or '.join(map(str, shapes))}; got {tuple(mask.shape)}")
    if mask.device != x.device:
        raise ValueError(f"{name}: expected a tensor on the device of the input, {x.device}; got {mask.device}")


def _like_input(mask: Tensor | None, x: Tensor) -> Tensor | None:
    """A float32 mask in the dtype of ``x``."""
    return mask.to(x.dtype) if mask is not None and mask.dtype == torch.float32 else mask


def _check_hint(name: str, is_causal: object) -> None:
    if not isinstance(is_causal, bool):
        raise TypeError(f"{name}: expected True or False; got {is_causal!r}")


def _check_input(name: str, x: object, attention: nn.MultiheadAttention) -> None:
    """A tensor on the parameters' device, of their dtype or one that autocast brings to it."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor; got {type(x).__name__}")
    parameter = next(attention.parameters(), x)  # a replica of nn.DataParallel has none
    if x.device != parameter.device:
        raise ValueError(f"{name}: expected a tensor on the parameters' device, {parameter.device}; got {x.device}")
    if x.dtype != parameter.dtype and not _autocasts(x, parameter.dtype):
        raise TypeError(f"{name}: expected the parameters' dtype, {parameter.dtype}; got {x.dtype}")


def _autocasts(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether the operators cast a tensor of this dtype beside ``x``: under autocast, unless it is float64."""
    return autocast_dtype(x) is not None and dtype.is_floating_point and dtype != torch.float64


def _check_nested(name: str, x: Tensor, attention: nn.MultiheadAttention, **masks: Tensor | None) -> None:
    if x.dim() != 3 or x.size(-1) != attention.embed_dim:
        raise ValueError(f"{name}: expected a nested tensor (B, *, {attention.embed_dim}); got {x.dim()} dimensions")
    if not attention.batch_first:
        raise ValueError(f"{name}: expected a dense tensor where batch_first is False; got a nested one")
    for mask_name, mask in masks.items():
        if mask is not None:
            raise ValueError(f"{mask_name}: expected None with a nested {name}, which has no padding")


def _batch_first(name: str, x: Tensor, attention: nn.MultiheadAttention, width: int | None = None) -> Tensor:
    """``(B, T, D)`` or ``(T, D)``."""
    width = attention.embed_dim if width is None else width
    if x.dim() not in (2, 3) or x.shape[-1] != width:
        batched = f"(B, T, {width})" if attention.batch_first else f"(T, B, {width})"
        raise ValueError(f"{name}: expected shape {batched} or (T, {width}); got {tuple(x.shape)}")
    return x if x.dim() == 2 or attention.batch_first else x.transpose(0, 1)


def _like(x: Tensor, y: Tensor, attention: nn.MultiheadAttention) -> Tensor:
    """``y``, batch first, in the layout of ``x``."""
    return y if x.dim() == 2 or attention.batch_first else y.transpose(0, 1)
