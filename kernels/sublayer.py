"""What the sublayer steps share: ``y = a x + c drop(W f(N(x)) + b)``, or N of the sum, around whatever f is.

operand           N(x) or x as the matrix that the first product reads
residual_sum      the second product with the residual sum, and the norm after it, in its epilogue
after             the norm that follows the sum: the post-norm, or that of the next substep (``border``)
through_output    back from dy to the gradients of the sum, of the product's result and of b, in one row kernel
through_norm      back through N to x, with the residual's gradient and, if it is still wanted, that of b, in another
"""

import torch
from torch import Tensor

from .border import Ahead, Behind, hands_ahead, hands_behind, is_post
from .device import why_not_on
from .dropout import Dropout
from .linear_residual import Norm, linear_residual
from .norm_rows import normalize_rows, normalize_rows_backward
from .rows import LONGEST, Rows, as_rows
from .sums import Later, Sum

__all__ = [
    "after",
    "is_post",
    "matrix",
    "operand",
    "residual_sum",
    "sum_for",
    "through_norm",
    "through_output",
    "why_not_rows",
    "y_and_next",
]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def why_not_rows(x: Tensor, w: Tensor) -> str | None:
    """Why no kernel runs on x and weights like ``w``; None where they do."""
    if x.dtype not in DTYPES or w.dtype not in (x.dtype, torch.bfloat16, torch.float16):
        return f"it runs float32, bfloat16 and float16, not x in {x.dtype} with weights in {w.dtype}"
    if w.dtype != x.dtype and x.dtype != torch.float32:
        return f"x in {x.dtype} needs weights in {x.dtype}, not {w.dtype}"
    if x.shape[-1] > LONGEST:
        return f"its rows have at most {LONGEST} channels, not {x.shape[-1]}"
    return why_not_on(x.device)


def matrix(rows: Rows) -> Tensor:
    return rows.tensor.as_strided((rows.count, rows.tensor.shape[-1]), (rows.outer_stride, 1))


def operand(rows: Rows, dtype: torch.dtype, t=None, o=None, given: Tensor | None = None) -> Tensor:
    """A product's operand, (M, D) in ``dtype``: N(x), or x itself (without t and o always), read where it lies if it
    can be; ``given`` is N(x) where it is there already."""
    if given is not None:
        return given.view(rows.count, -1)
    if o is not None and o.placement == "pre" and o.norm is not None:
        return normalize_rows(rows, o.norm, t.norm_weight, t.norm_bias, o.eps, dtype)
    if rows.is_matrix and rows.tensor.dtype == dtype:
        return matrix(rows)
    return normalize_rows(rows, None, None, None, 0.0, dtype)


def residual_sum(rows: Rows, t, o, h: Tensor, dropout: Dropout, dtype: torch.dtype, norm: Norm | None = None) -> Tensor:
    """``a x + c drop(h W_out^T + b_out)``, (M, D) in ``dtype``, or the norm of that."""
    a, c = o.residual_scale, o.step
    return linear_residual(h, t.w_out, t.b_out, rows, dtype, transposed=True, a=a, c=c, dropout=dropout, norm=norm)


def after(x: Tensor, t, o, total: Tensor | None, ahead: Ahead) -> tuple[Norm | None, torch.dtype]:
    """The norm that follows the residual sum, and the dtype of what is written last. The sum goes to ``total`` before a
    post-norm, if it is given, and is y before the norm of the next substep."""
    if hands_ahead(x, o, ahead):
        return ahead.norm(torch.empty(x.shape, dtype=x.dtype, device=x.device)), ahead.next_dtype
    return Norm(o.norm, t.norm_weight, t.norm_bias, o.eps, total) if is_post(o) else None, x.dtype


def y_and_next(last: Tensor, norm: Norm | None) -> tuple[Tensor, Tensor | None]:
    """y and N(y) of the next substep, if it asks for it, from what was written after and before ``norm``."""
    return (last, None) if norm is None or not norm.of_total else (norm.total, last)


def sum_for(need: bool, parameter: Tensor | None, c: float = 1.0) -> Sum | None:
    """The gradient of a parameter as a sum over rows."""
    return Sum(parameter.dtype, c) if need else None


def through_output(
    grads: Rows, total: Rows, t, o, dropout: Dropout, need_x: bool, need, need_g: bool, again: bool,
    behind: Behind, later: Later,
):  # fmt: skip
    """``(gradient of the residual sum, g, norm_weight's, norm_bias's, b_out's gradient)``; c g is that of the second
    product's result, in the dtype of the weights. With ``again``, a row kernel after this reads ``grads`` anyway:
    b_out's gradient is left to it, None here, where nothing else has to be read."""
    post, dtype = is_post(o), t.w_out.dtype
    same = not dropout.drops and grads.tensor.dtype == dtype
    if behind.dropped is not None:
        g, written, again = behind.dropped, (None, None), False
    elif not post and same and grads.is_matrix:
        g, written = matrix(grads), (None, None)
    else:
        g = None  # g is the gradient of the sum itself where they have the same dtype and nothing is dropped
        in_total = post and (need_x or (same and need_g))
        written = (grads.tensor.dtype if in_total else None, dtype if need_g and not (post and same) else None)
    sums = (
        sum_for(post and need.norm_weight, t.norm_weight),
        sum_for(post and need.norm_bias, t.norm_bias),
        sum_for(need.b_out and (any(written) or not again), t.b_out, o.step),
    )
    d_total = None
    by_weight = by_bias = by_b_out = None
    if any(written) or any(sums):
        d_total, dropped, (by_weight, by_bias, by_b_out) = normalize_rows_backward(
            grads, total, o.norm if post else None, t.norm_weight, o.eps,
            total=written[0], dropped=written[1], dropout=dropout, sums=sums, later=later,
        )  # fmt: skip
        g = g if g is not None else d_total if dropped is None else dropped
    residual = grads if d_total is None else as_rows(d_total)
    return residual, g, by_weight, by_bias, by_b_out


def through_norm(
    dn: Tensor, rows: Rows, grads: Rows, t, o, need_x: bool, need, need_b_out: bool, n: Tensor | None,
    behind: Behind, later: Later,
) -> tuple[Tensor | None, dict[str, Tensor], list[Tensor | None]]:  # fmt: skip
    """``(dx, the gradients of the norm's parameters and of b_out by name, what the substep before asks for)``, pre
    placement, those needed; ``dn`` is the gradient of N(x), in whose place dx may come, and ``n``, if it is given, gets
    N(x) again."""
    hands = hands_behind(rows.tensor, (need_x, *need), t, o, behind)
    dx, dropped, (by_weight, by_bias, by_b_out) = normalize_rows_backward(
        as_rows(dn), rows, o.norm, t.norm_weight, o.eps, bias=t.norm_bias, n=n,
        residual=grads if need_x else None, a=o.residual_scale, total=rows.tensor.dtype if need_x else None,
        dropped=behind.before_dtype if hands else None, dropout=behind.dropout if hands else None,
        sums=(
            sum_for(need.norm_weight, t.norm_weight),
            sum_for(need.norm_bias, t.norm_bias),
            behind.sum if hands else sum_for(need_b_out, t.b_out, o.step),
        ),
        of_residual=not hands, in_place=True, later=later,
    )  # fmt: skip
    found = {"norm_weight": by_weight, "norm_bias": by_bias} | ({"b_out": by_b_out} if need_b_out else {})
    return dx, found, [dropped, by_b_out] if hands else [None, None]
