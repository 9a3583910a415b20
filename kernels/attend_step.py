"""``attend_step``: the attention step, forward and backward.

    pre    y = a x + c drop(W_out MHA(N(x)) + b_out)
    post   y = N(a x + c drop(W_out MHA(x) + b_out))

forward      n = N(x)                                            a row kernel
             q, k, v = n W^T + b                                 one product of packed weights, else one for each
             rotary, unit q and k                                a row kernel over heads (``heads``), where asked for
             o, m and l                                          flash attention (``attention_forward``)
             y = a x + c drop(o W_out^T + b_out)                 a product with its epilogue (``linear_residual``)
             y = N(y), post placement                            in it at D <= 256, else a row kernel
backward     g = drop(dy), db_out; post: dN first                a row kernel (none without dropout, norm or bias)
             do = c g W_out,  dW_out = c g^T o                   products
             delta = <do, o>                                     a row kernel over heads
             dq;  dk, dv;  floating masks                        a kernel each (``attention_backward``, ``_masks``)
             back through unit q and k and rotary                a row kernel over heads
             dn = dq W                                           a product
             dx = dN(dn) + a dy, n again, norm's parameters      a row kernel
             dW = dq^T n, db                                     products, and a row kernel for biases

What is not needed is not computed. q, k and v are read and their gradients written as they lie side by side in the
products: nothing is transposed. With ``save="lean"`` the projections are formed again, from an n of a row kernel, and
their gradients written over them; PyTorch's core then takes the batch in pieces, as its results lie apart. In a layer
the first row kernel of either pass may be part of the neighbour's last kernel (``border``).
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from . import border
from .attention import WIDEST_HEAD, Attention
from .attention_backward import attention_backward
from .attention_core import (
    attention,
    choose,
    core_asked_for,
    core_of,
    gradients_in_pieces,
    pieces_of,
    statistics_shape,
    why_not_core,
)
from .attention_masks import mask_gradient, spans_of
from .border import ALONE_AHEAD, ALONE_BEHIND, Ahead, Behind, ahead_shape, behind_shapes, ends
from .dropout import HIDDEN_STREAM, OUTPUT_STREAM, Dropout
from .heads import delta_of_heads, position_heads, position_heads_backward
from .linear_residual import linear_residual
from .projections import Projection, Wants, back_to_source, parameter_gradients, projections, queries_and_keys
from .rows import Rows, as_rows
from .side_by_side import side_by_side
from .sublayer import (
    after,
    is_post,
    operand,
    residual_sum,
    sum_for,
    through_norm,
    through_output,
    why_not_rows,
    y_and_next,
)
from .sums import Later
from .weight_gradient import weight_gradient

__all__ = [
    "Ahead", "Behind", "Saved", "ahead_shape", "backward", "begins", "behind_shapes", "detail", "ends", "forward",
    "saved_shapes", "slower", "why_not",
]  # fmt: skip

# What has a gradient through the attention itself.
INSIDE = ("w_q", "w_k", "w_v", "b_q", "b_k", "b_v", "context", "attn_mask", "key_padding_mask", "qk_scale")


class Saved(NamedTuple):
    """What the backward pass may find, in the dtype of w_q unless said otherwise; empty where ``save`` did not keep
    it. W = H head_dim, V = Hkv head_dim."""

    projected: Tensor  # fast: the first of ``projections``: q, or q, k and v (..., T, W or W + 2 V)
    keys: Tensor  # fast: the second, if there is one: k, or k and v (..., S, V or 2 V)
    values: Tensor  # fast: the third: v (..., S, V)
    attended: Tensor  # lean and fast: the heads' outputs, before W_out (..., T, W)
    # lean and fast: of the scores the maximum m in powers of 2, and 1 / l (B, H, 2, T), float32; the log-sum-exp where
    # the core is PyTorch's
    statistics: Tensor
    total: Tensor  # fast, post placement with a norm: the sum before it (..., T, D), in the dtype of x


def why_not(request) -> str | None:
    head_dim = request.tensors.w_out.shape[1] // request.options.num_heads
    if head_dim > WIDEST_HEAD:
        return f"its heads have at most {WIDEST_HEAD} channels, not {head_dim}"
    asked = core_asked_for()
    why_not_asked = None if asked is None else why_not_core(asked, request.x, request.tensors, request.options)
    if why_not_asked is not None:
        return f"its attention core {asked!r} was asked for, but {why_not_asked}"
    return why_not_rows(request.x, request.tensors.w_q)


def detail(request) -> str:
    """The core of a call, and why."""
    core = choose(request.x, request.tensors, request.options)
    return f"attention core {core.name!r}: {core.why}"


def slower(request) -> str | None:
    """Not measured yet: the tiles of float32 are small and, without tf32, off the tensor cores."""
    if request.tensors.w_q.dtype == torch.float32:
        return "in float32 PyTorch's products and attention are expected to be faster"
    return None


def saved_shapes(x: Tensor, tensors, options, save: str) -> Saved:
    """The shape and dtype of each saved tensor."""
    t, o = tensors, options
    fast, kept, dtype = save == "fast", save != "none", t.w_q.dtype
    nothing = (0,)
    statistics = statistics_shape(choose(x, t, o).name, x.shape[:-2].numel(), o.num_heads, x.shape[-2])
    found = [(*(x if p.of_x else t.context).shape[:-1], p.weight.shape[0]) for p in projections(t, o)]
    found = [(found[i] if fast and i < len(found) else nothing, dtype) for i in range(3)]
    return Saved(
        *found,
        attended=((*x.shape[:-1], t.w_out.shape[1]) if kept else nothing, dtype),
        statistics=(statistics if kept else nothing, torch.float32),
        total=(x.shape if fast and is_post(o) else nothing, x.dtype),
    )


def begins(x: Tensor, tensors, options) -> tuple:
    """What it asks of the substep before it."""
    return border.begins(x, tensors, options, tensors.w_q)


def forward(x: Tensor, tensors, options, save: str, ahead: Ahead = ALONE_AHEAD) -> tuple[Tensor, Saved, Tensor | None]:
    """y, shape and dtype of x, what ``save`` keeps, and what the next substep asks for."""
    t, o = _without_gaps(tensors), options
    shapes = saved_shapes(x, t, o, save)

    def keep(tensor: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return (
            torch.empty(shape, dtype=dtype, device=x.device) if tensor is None or shape == (0,) else tensor.view(shape)
        )

    rows = as_rows(x)
    if rows.count == 0:
        return torch.empty(x.shape, dtype=x.dtype, device=x.device), Saved(*(keep(None, *s) for s in shapes)), None
    products, a = projections(t, o), _attention(x, t, o)
    projected = _project(products, _sources(products, rows, t, o, given=ahead.normalized))
    q, k = _split(_positioned(queries_and_keys(projected, *a.widths), a, t), a)
    attended, statistics = attention(choose(x, t, o).name, q, k, _values(projected, a), a, save != "none")
    total = torch.empty(x.shape, dtype=x.dtype, device=x.device) if is_post(o) and save == "fast" else None
    norm, dtype = after(x, t, o, total, ahead)
    y, n = y_and_next(residual_sum(rows, t, o, attended, _output_dropout(t, o), dtype, norm), norm)
    found = (*projected, *(None,) * (3 - len(projected)), attended, statistics, total)
    return y.view(x.shape), Saved(*(keep(tensor, *shape) for tensor, shape in zip(found, shapes, strict=True))), n


def backward(
    grad: Tensor, needs: tuple[bool, ...], x: Tensor, tensors, saved: Saved, options, behind: Behind = ALONE_BEHIND
):
    """The gradients in x and in the tensors, and what the substep before asks for. What is not needed is None and costs
    nothing."""
    need_x, t, o = needs[0], _without_gaps(tensors), options
    need = type(t)(*needs[1:])
    found = dict.fromkeys(t._fields)
    rows, grads = as_rows(x), as_rows(grad)
    if rows.count == 0:
        zeros = (torch.zeros_like(w) if n else None for w, n in zip(t, need, strict=True))
        return torch.empty_like(x) if need_x else None, type(t)(*zeros), [None, None]
    pre_norm = o.placement == "pre" and o.norm is not None
    need_n = need_x or (pre_norm and (need.norm_weight or need.norm_bias))
    need_attention = need_n or any(getattr(need, name) for name in INSIDE)
    dropout = _output_dropout(t, o)
    attended = saved.attended.view(rows.count, t.w_out.shape[1])
    later = Later()

    before_norm = rows
    if is_post(o):
        kept = saved.total.numel() > 0
        total = saved.total if kept else residual_sum(rows, t, o, attended, dropout, torch.float32)
        before_norm = as_rows(total)
    residual, g, found["norm_weight"], found["norm_bias"], found["b_out"] = through_output(
        grads, before_norm, t, o, dropout, need_x, need, need_attention or need.w_out, need_x and pre_norm,
        behind, later,
    )  # fmt: skip
    if need.w_out:
        found["w_out"] = weight_gradient(g, attended, o.step, later)
    if not need_attention:
        later.end()
        return None, type(t)(**found), [None, None]

    do = linear_residual(g, t.w_out, None, None, t.w_q.dtype, transposed=False, c=o.step)
    late = need_n and pre_norm and saved.projected.numel() > 0  # the last row kernel writes n
    to_x, to_context, inner, (*products, sources, sums) = _through_attention(
        do, attended, saved, rows, t, o, need, need_n, late, later
    )
    found |= inner
    if not late:
        found |= parameter_gradients(*products, sources, sums, later)
    if need.context:
        found["context"] = back_to_source(to_context, t.context.dtype, None, 0.0).view(t.context.shape)
    grad_x, handed = None, [None, None]
    if need_n and pre_norm:
        dn = back_to_source(to_x, t.w_q.dtype, None, 0.0)
        n = torch.empty(dn.shape, dtype=dn.dtype, device=dn.device) if late and _reads_n(*products[:2]) else None
        grad_x, by_norm, handed = through_norm(
            dn, rows, grads, t, o, need_x, need, need.b_out and found["b_out"] is None, n, behind, later
        )
        found |= by_norm
        sources = [n if late and product.of_x else source for product, source in zip(products[0], sources, strict=True)]
    elif need_n:
        grad_x = back_to_source(to_x, x.dtype, residual, o.residual_scale)
    if late:
        found |= parameter_gradients(*products, sources, sums, later)
    later.end()
    return None if grad_x is None else grad_x.view(x.shape), type(t)(**found), handed


def _through_attention(
    do: Tensor, attended: Tensor, saved: Saved, rows: Rows, t, o, need, need_n: bool, late: bool, later: Later
):
    """The terms ``(gradient, weight)`` of the gradients in N(x) and in the context, the gradients by name of floating
    masks and of ``qk_scale``, and the arguments of :func:`parameter_gradients`; ``late``: but for N(x)."""
    products, a = projections(t, o), _attention(rows.tensor, t, o)
    wants = [product.wants(need, need_n) for product in products]
    lean = saved.projected.numel() == 0
    early = [lean or (want.weight and not (late and p.of_x)) for p, want in zip(products, wants, strict=True)]
    sources = _sources(products, rows, t, o, early)
    projected = [p.view(-1, p.shape[-1]) for p in saved[: len(products)]] if not lean else _project(products, sources)
    before, v = queries_and_keys(projected, *a.widths), _values(projected, a)
    placed = _positioned(before, a, t)
    q, k = _split(placed, a)
    turned, found = placed is not before, {}
    # q, k and v are not read again: a floating mask's gradient needs the scores, and position_heads_backward reads a
    # channel's partner, which another thread may have written over.
    in_place = lean and not turned and not (need.attn_mask or need.key_padding_mask)
    if in_place:
        sources = None  # formed again below rather than kept beside the gradients of q, k and v
    matrices = [
        None if not any(want) else p if in_place else torch.empty_like(p)
        for p, want in zip(projected, wants, strict=True)
    ]
    d_before = queries_and_keys(matrices, *a.widths)
    sums = [None] * len(products)
    core = core_of(saved.statistics, a.queries)
    if core == "triton":
        d_after = d_before
        if turned:
            pairs = zip(placed, d_before, strict=True)
            d_after = [torch.empty_like(p) if d is not None or need.qk_scale else None for p, d in pairs]
        dv = None if matrices[-1] is None else _values(matrices, a)
        dq, dk = _split(d_after, a)
        apart = in_place and dq is not None  # for q is read until dk and dv are there
        dq_now = torch.empty(q.shape, dtype=q.dtype, device=q.device) if apart else dq
        found = _through_our_core((q, k, v, a, do, saved.statistics), attended, dq_now, dk, dv, t, need)
        if apart and len(products) > 1:
            matrices[0] = dq_now
        elif apart:
            side_by_side([[dq_now]], dq)
    else:
        count = pieces_of(a, do.device) if in_place and len(products) == 1 else 1
        pieces = gradients_in_pieces(core, (do, q, k, v, attended, saved.statistics), a, count)
        if turned:
            (parts,) = pieces
            before, d_before, d_after = _split(before, a), _split(d_before, a), parts[:2]
            if matrices[-1] is not None:
                side_by_side([parts[2:]], _values(matrices, a))
        else:
            sums = _gather(pieces, count, matrices, wants, products, later)
    if turned:
        constants = a.head_dim, a.queries, t.cos, t.sin, t.qk_scale
        by_scale = [
            position_heads_backward(d, p, *constants, into, need.qk_scale)
            for d, p, into in zip(d_after, before, d_before, strict=True)
            if d is not None and (into is not None or need.qk_scale)
        ]
        if need.qk_scale:  # q's heads and k's, which share a scale or have one each
            found["qk_scale"] = torch.cat(by_scale).view(-1, *t.qk_scale.shape).sum(0)
    if in_place:
        sources = _sources(products, rows, t, o, [want.weight for want in wants])
    terms = [(p.of_x, (d, p.weight)) for p, want, d in zip(products, wants, matrices, strict=True) if want.source]
    to_x, to_context = ([term for of_x, term in terms if of_x is x] for x in (True, False))
    return to_x, to_context, found, (products, wants, matrices, sources, sums)


def _reads_n(products: list[Projection], wants: list[Wants]) -> bool:
    """Whether the gradient of a weight is a sum over N(x)."""
    return any(product.of_x and want.weight for product, want in zip(products, wants, strict=True))


def _through_our_core(inputs: tuple, attended: Tensor, dq, dk, dv, t, need) -> dict[str, Tensor]:
    """Fills dq, dk and dv, those that are there; the gradients of floating masks by name."""
    q, a, do = inputs[0], inputs[3], inputs[4]
    masks = need.attn_mask or need.key_padding_mask
    settle = q.dtype == torch.float32 and (dq is not None or dk is not None or masks)
    if settle:
        delta = torch.empty((a.batch, a.heads, a.queries), dtype=torch.float32, device=do.device)
    else:
        delta = delta_of_heads(do, attended, a.heads, a.queries)
    attention_backward(*inputs, delta, dq, dk, dv, settle)
    found = {}
    if need.attn_mask:
        found["attn_mask"] = mask_gradient(*inputs, delta, tuple(t.attn_mask.shape))
    if need.key_padding_mask:
        found["key_padding_mask"] = mask_gradient(*inputs, delta, (a.batch, 1, 1, a.keys)).view(a.batch, a.keys)
    return found


def _gather(
    pieces: Iterator[list[Tensor]],
    count: int,
    matrices: list[Tensor | None],
    wants: list[Wants],
    products: list[Projection],
    later: Later,
) -> list[Tensor | None]:
    """dq, dk and dv become the gradients of the products that gave q, k and v, in ``matrices``; their sums over the
    tokens where several stand in one product with a bias. More than one piece is for one product."""
    if len(products) == 1:
        return [side_by_side(pieces, matrices[0], sum_for(wants[0].bias, products[0].bias), count, later)]
    sums: list[Tensor | None] = [None] * len(products)
    (parts,) = pieces
    for i, (matrix, want, product) in enumerate(zip(matrices, wants, products, strict=True)):
        mine = parts[i : i + 1] if i < len(products) - 1 else parts[i:]
        if matrix is not None and len(mine) == 1:
            matrices[i] = mine[0]
        elif matrix is not None:
            sums[i] = side_by_side([mine], matrix, sum_for(want.bias, product.bias), later=later)
    return sums


def _without_gaps(t):
    """The tensors with vectors that kernels read as they lie in memory; products read matrices by their strides."""
    names = ("b_q", "b_k", "b_v", "b_out", "norm_weight", "norm_bias")
    return t._replace(**{n: v.contiguous() for n in names if (v := getattr(t, n)) is not None})


def _attention(x: Tensor, t, o) -> Attention:
    batch, tokens = x.shape[:-2].numel(), x.shape[-2]
    keys = tokens if t.context is None else t.context.shape[-2]
    return Attention(
        batch=batch,
        queries=tokens,
        keys=keys,
        heads=o.num_heads,
        kv_heads=o.num_kv_heads,
        head_dim=t.w_out.shape[1] // o.num_heads,
        scale=o.scale,
        causal=o.causal,
        mask=None if t.attn_mask is None else t.attn_mask.expand(batch, o.num_heads, tokens, keys),
        padding=t.key_padding_mask,
        spans=None if t.cu_seqlens is None else spans_of(t.cu_seqlens, tokens),
        dropout=Dropout.of(o.attention_dropout, t.seed, o.stream + HIDDEN_STREAM),
    )


def _output_dropout(t, o) -> Dropout:
    return Dropout.of(o.dropout, t.seed, o.stream + OUTPUT_STREAM)


def _sources(
    products: list[Projection], rows: Rows, t, o, needed: list[bool] | None = None, given: Tensor | None = None
) -> list[Tensor | None]:
    """What each product is formed from, where it is needed: N(x), which may be ``given``, or the context, each once."""
    needed = [True] * len(products) if needed is None else needed
    of_x, of_context = (any(n and p.of_x is of for n, p in zip(needed, products, strict=True)) for of in (True, False))
    n = operand(rows, t.w_q.dtype, t, o, given) if of_x else None
    context = operand(as_rows(t.context), t.w_q.dtype) if of_context else None
    return [n if product.of_x else context for product in products]


def _project(products: list[Projection], sources: list[Tensor]) -> list[Tensor]:
    return [
        linear_residual(source, p.weight, p.bias, None, p.weight.dtype, transposed=True)
        for p, source in zip(products, sources, strict=True)
    ]


def _positioned(parts: list[Tensor], a: Attention, t) -> list[Tensor]:
    """Queries and keys as the scores see them: the same, or new ones."""
    if t.cos is None and t.qk_scale is None:
        return parts
    positioned = [torch.empty(p.shape, dtype=p.dtype, device=p.device) for p in parts]
    for part, into in zip(parts, positioned, strict=True):
        position_heads(part, a.head_dim, a.queries, t.cos, t.sin, t.qk_scale, into)
    return positioned


def _split(parts: list[Tensor | None], a: Attention) -> list[Tensor | None]:
    """q and k of the columns that hold both, or of one matrix each."""
    if len(parts) == 2:
        return parts
    return [None, None] if parts[0] is None else list(parts[0].split(a.widths, dim=1))


def _values(matrices: list[Tensor], a: Attention) -> Tensor:
    return matrices[-1][:, -a.widths[1] :]
