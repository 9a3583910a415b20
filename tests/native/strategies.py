"""What hypothesis draws: calls of every operator over shapes, strides, options, dtypes and frozen subsets."""

import math
from dataclasses import replace
from functools import partial

import torch
from hypothesis import assume
from hypothesis import strategies as st

from tests.native.calls import DTYPES, LAYOUTS, Call, Drawn, values

__all__ = ["attend_calls", "ffn_calls", "normalize_calls", "sphere_calls"]

# Around a vector (4, 8, 16), a tile's rows (6, 12), a panel (32), a wide panel (64), a segment (240).
BORDERS = (4, 8, 11, 12, 13, 15, 16, 17, 31, 32, 33, 47, 48, 63, 64, 65, 96, 127, 129, 240, 241)
MOST_WORK = 2_000_000  # multiplications of a product, so that an example takes milliseconds

sizes = st.one_of(st.integers(1, 20), st.sampled_from(BORDERS))
counts = st.one_of(st.integers(0, 20), st.sampled_from(BORDERS))
batches = st.lists(st.sampled_from([1, 2, 3, 5, 0]), max_size=2).map(tuple)
layouts = st.one_of(st.just("contiguous"), st.sampled_from(LAYOUTS))
dtypes = st.sampled_from(list(DTYPES))
rates = st.sampled_from([0.0, 0.0, 0.3, 0.9])
seeds = st.sampled_from([0, 11, -1, 2**63 - 1])
numbers = st.sampled_from([1.0, 0.5, -1.5, 0.0])

# A gradient of one token is a product of many of a call's numbers. Of normal ones the largest of 192 such products is
# often many times the next, and the largest error, however many draws there are, that of one number.
_call = partial(Call, tails=False)


@st.composite
def _drawn(draw, *shape, **options):
    """A tensor of this shape in any layout, trained or not."""
    return Drawn(shape, **options, layout=draw(layouts), trained=draw(st.booleans()))


def _unequal(drawn):
    """Never equal rows: the gradient through the scores of equal keys, or through the unit vectors of heads with equal
    channels, is rounding alone, in eager PyTorch often the 0 that it should be, by luck."""
    return replace(drawn, layout="contiguous") if drawn.layout == "expanded" and len(drawn.shape) == 2 else drawn


@st.composite
def _projection(draw, rows, columns):
    return _unequal(draw(_drawn(rows, columns, kind="fan")))


@st.composite
def _x(draw, *shape):
    return draw(
        _drawn(*shape, role="x", scale=draw(st.sampled_from([1.0, 0.1, 10.0])), shift=draw(st.sampled_from([0.0, 3.0])))
    )


def _some(draw, **strategies):
    """Each of these tensors or not."""
    return {name: draw(drawn) for name, drawn in strategies.items() if draw(st.booleans())}


@st.composite
def _norm(draw, width):
    """Options and tensors of the normalisation."""
    norm = draw(st.sampled_from(["layer", "rms", "sphere", None]))
    options = {
        "norm": norm,
        "eps": draw(st.sampled_from([1e-5, 1e-2])),
        "placement": draw(st.sampled_from(["pre", "post"])),
    }
    if norm is None:
        return options, {}
    near_one = {"role": "scale", "scale": 0.1, "shift": 1.0}
    return options, _some(draw, norm_weight=_drawn(width, **near_one), norm_bias=_drawn(width, role="scale"))


def _dropouts(draw, *names):
    options = {name: draw(rates) for name in names}
    return {**options, "seed": draw(seeds)} if any(options.values()) else {}


def _sum_is_there(options, width, w_out):
    """The normalisation of post placement divides the rounding errors of a sum by its length r. Where P(r < s) is of
    order s^m, the largest 1 / r of any number of draws is t times the next one with probability t^-m: for m < 3 the
    largest error is often that of one number, which says nothing about a kernel. So no row has fewer dimensions (the
    mean of "layer" takes one), nor is all dropped with no residual. Nor has it one element of the step alone: m is 1
    where that cancels, down to the residual, which two dropouts of 0.9 leave 1,000 times smaller than its terms; nor
    one number for all elements, which equal rows of w_out make."""
    if options["placement"] == "pre" or options["norm"] is None:
        return
    assume(width > (3 if options["norm"] == "layer" else 2))
    assume(w_out.layout != "expanded")
    rate = options.get("dropout", 0.0)
    assume(options["residual_scale"] != 0.0 or rate == 0.0)
    assume(width * (1 - rate) * rate ** (width - 1) < 1e-6)  # the probability that a row keeps exactly one


@st.composite
def ffn_calls(draw):
    shape = draw(
        st.one_of(st.just(()), counts.map(lambda n: (n,)), st.tuples(batches, counts).map(lambda s: (*s[0], s[1])))
    )
    width, hidden = draw(sizes), draw(counts)
    assume(math.prod(shape) * width * max(hidden, 1) <= MOST_WORK)
    activation = draw(st.sampled_from(["relu", "gelu", "gelu_tanh", "silu", "swiglu", "geglu"]))
    inner = 2 * hidden if activation in ("swiglu", "geglu") else hidden
    options, affine = draw(_norm(width))
    tensors = {
        "x": draw(_x(*shape, width)),
        "w_in": draw(_drawn(inner, width, kind="fan")),
        "w_out": draw(_drawn(width, hidden, kind="fan")),
        **_some(draw, b_in=_drawn(inner), b_out=_drawn(width)),
        **affine,
    }
    options |= {"activation": activation, "step": draw(numbers), "residual_scale": draw(numbers)}
    options |= _dropouts(draw, "dropout", "activation_dropout")
    _sum_is_there(options, width, tensors["w_out"])
    save, grad = draw(st.sampled_from(["fast", "lean"])), draw(layouts)
    return _call("ffn_step", tensors, options, draw(dtypes), save, grad)


@st.composite
def _masks(draw, batch, heads, tokens, keys):
    pairs = [(tokens, keys), (batch * heads, tokens, keys)]
    broadcast = st.tuples(*(st.sampled_from([1, n]) for n in (batch, heads, tokens, keys)))
    shapes = st.one_of(st.sampled_from(pairs), broadcast)
    kinds = st.sampled_from(["blocked", "normal", "bias"])
    found = {}
    if draw(st.booleans()):
        found["attn_mask"] = draw(_drawn(*draw(shapes), kind=draw(kinds), role="x"))
    return found


@st.composite
def attend_calls(draw):
    batch_shape, tokens, width = draw(batches), draw(counts), draw(sizes)
    batch = math.prod(batch_shape)
    kv_heads = draw(st.integers(1, 3))
    heads = kv_heads * draw(st.integers(1, 3))
    head_dim = draw(st.one_of(st.integers(1, 12), st.sampled_from([16, 17, 32, 33, 64, 65])))
    crosses = draw(st.booleans())
    keys, source = (draw(counts), draw(st.sampled_from([width, 7, 33]))) if crosses else (tokens, width)
    channels, kv_channels = heads * head_dim, kv_heads * head_dim
    assume(batch * (tokens + keys) * max(width, source) * channels <= MOST_WORK)
    assume(batch * heads * tokens * keys * head_dim <= MOST_WORK)

    options, affine = draw(_norm(width))
    tensors = {"x": _unequal(draw(_x(*batch_shape, tokens, width))), **affine}
    if source == width and draw(st.booleans()):
        tensors["w_qkv"] = draw(_projection(channels + 2 * kv_channels, width))
        tensors |= _some(draw, b_qkv=_drawn(channels + 2 * kv_channels))
    else:
        for name, rows, columns in (("q", channels, width), ("k", kv_channels, source), ("v", kv_channels, source)):
            tensors[f"w_{name}"] = draw(_projection(rows, columns))
            tensors |= _some(draw, **{f"b_{name}": _drawn(rows)})
    tensors["w_out"] = draw(_drawn(width, channels, kind="fan"))
    tensors |= _some(draw, b_out=_drawn(width))
    if crosses:
        tensors["context"] = _unequal(draw(_drawn(*batch_shape, keys, source)))
    tensors |= draw(_masks(batch, heads, tokens, keys))
    if draw(st.booleans()):
        kind = draw(st.sampled_from(["blocked", "normal", "bias"]))
        tensors["key_padding_mask"] = draw(_drawn(*batch_shape, keys, kind=kind, role="x"))
    if not crosses and draw(st.booleans()):
        pairs = draw(st.integers(0, head_dim // 2))
        tensors |= {name: draw(_drawn(tokens, pairs, role="x")) for name in ("cos", "sin")}
    if draw(st.booleans()):
        shape = (heads, head_dim) if heads == kv_heads and draw(st.booleans()) else (head_dim,)
        tensors["qk_scale"] = draw(_drawn(*shape, role="scale", shift=1.0))
    elif "b_k" in tensors and ("cos" not in tensors or tensors["cos"].shape[1] == 0):
        # What all keys have in common a softmax does not see.
        tensors["b_k"] = replace(tensors["b_k"], trained=False)

    options |= {"num_heads": heads, "num_kv_heads": kv_heads, "causal": draw(st.booleans())}
    options |= {"step": draw(numbers), "residual_scale": draw(numbers), "scale": draw(st.sampled_from([None, 0.3]))}
    if not crosses and batch_shape == () and draw(st.booleans()):
        cuts = draw(st.lists(st.integers(0, tokens), max_size=4))
        options["cu_seqlens"] = (0, *sorted(cuts), tokens)
    options |= _dropouts(draw, "dropout", "attention_dropout")
    _sum_is_there(options, width, tensors["w_out"])
    save, grad = draw(st.sampled_from(["fast", "lean"])), draw(layouts)
    return _call("attend_step", tensors, options, draw(dtypes), save, grad)


# Nothing of the steps on the sphere is a product's operand, so that autocast changes nothing.
_sphere_dtypes = st.sampled_from(["float32", "bfloat16"])
directions = st.sampled_from(["tangent", "difference", "ambient"])


def _number_or(draw, name, width):
    """A number, or a tensor of shape () or (where there is a width) (width,)."""
    shapes = [None, ()] if width is None else [None, (), (width,)]
    shape = draw(st.sampled_from(shapes))
    if shape is None:
        return {}, {name: draw(st.sampled_from([0.3, 1.0, 0.0, -0.5]))}
    return {name: draw(_drawn(*shape, kind="positive", role="x", scale=0.5))}, {}


@st.composite
def normalize_calls(draw):
    shape, width = draw(st.one_of(st.just(()), st.tuples(batches, counts).map(lambda s: (*s[0], s[1])))), draw(sizes)
    tensors = {
        "x": draw(_drawn(*shape, width, kind="unit", role="x")),
        "u": draw(_drawn(*shape, width, role="x", scale=draw(st.sampled_from([1.0, 0.01])))),
    }
    step, number = _number_or(draw, "step", width)
    options = {"direction": draw(directions), **number}
    return _call("normalize_step", tensors | step, options, draw(_sphere_dtypes), grad=draw(layouts))


@st.composite
def sphere_calls(draw):
    batch_shape, rows, width = draw(batches), draw(counts), draw(sizes)
    direction = draw(directions)
    # "difference" divides the rounding errors of u by |u|, and in a plane P(|u| < r) is of order r^2 (see
    # _sum_is_there); on a line two values often cancel. No mean of a cap is short, whatever its weights: all are
    # positive, softmax or not.
    kind = "cap" if direction == "difference" and width <= 2 else "unit"
    tensors = {"x": draw(_drawn(*batch_shape, rows, width, kind=kind, role="x"))}
    channels, keys = width, rows
    if draw(st.booleans()):
        channels = draw(sizes)
        tensors["query"] = draw(_drawn(*batch_shape, rows, channels, kind="unit", role="x"))
    if channels != width or draw(st.booleans()):
        keys = draw(sizes) if rows else rows
        tensors["key"] = draw(_drawn(*batch_shape, keys, channels, kind="unit", role="x"))
    if keys != rows or draw(st.booleans()):
        tensors["value"] = draw(_drawn(*batch_shape, keys, width, kind=kind, role="x"))
    assume(math.prod(batch_shape) * rows * keys * max(width, channels) <= MOST_WORK)
    step, step_number = _number_or(draw, "step", width)
    if direction == "ambient" and width < 4:
        # x + u may be short where u is about as long as x, as of one key, or of a few: P(|x + u| < r) is then of order
        # r^(width - 1) (see _sum_is_there).
        step, step_number = {}, {"step": 0.3}
    beta, beta_number = _number_or(draw, "beta", None)
    if beta_number and draw(st.booleans()):
        beta_number = {"beta": draw(st.sampled_from([4.0, 12.0, 30.0, 60.0, -20.0]))}
    steep = abs(beta_number.get("beta", 1.0)) > 1.0
    options = {
        "weighting": draw(st.sampled_from(["softmax", "unnormalized"])),
        "direction": direction,
        "causal": draw(st.booleans()),
        **step_number,
        **beta_number,
    }
    if beta_number.get("beta", 1.0) > 4.0 and options["weighting"] == "unnormalized" and direction == "tangent":
        # Beside weights of e^beta x is nothing: S(x + step v) divides the errors of u by what is left of it in the
        # tangent space, of width - 1 dimensions (see _sum_is_there).
        assume(width > 4)
    if options["weighting"] == "softmax" and not batch_shape and tensors.get("key", tensors["x"]).layout == "expanded":
        # No score moves the softmax of equal keys (see _unequal).
        tensors |= {"query": replace(tensors["query"], trained=False)} if "query" in tensors else {}
        beta = {name: replace(t, trained=False) for name, t in beta.items()}
    if steep and direction == "difference":
        # A few keys make u, and the errors of their scores, times beta and over |u|^2, its gradients: the largest error
        # is that of the one u, of all draws, whose values cancel most. Means of a cap are all about as long.
        tensors |= {name: replace(t, kind="cap") for name, t in tensors.items() if name in ("x", "value")}
    call = _call("sphere_attend_step", tensors | step | beta, options, draw(_sphere_dtypes), grad=draw(layouts))
    if "step" in step and _stands_still(call):
        # What step is multiplied by is rounding, and so is its gradient (none at all in bfloat16, where S(x) - x is 0
        # for most x).
        call.tensors["step"] = replace(step["step"], trained=False)
    return call


def _stands_still(call):
    """Whether each particle attends to nothing but itself, or to others that stand where it does."""
    found = values(call, 0)
    x = found["x"]
    q, k, v = (found.get(name, x) for name in ("query", "key", "value"))
    if 0 in x.shape or 0 in k.shape:
        return False
    scores = found.get("beta", call.options.get("beta")) * q @ k.mT
    if call.options["causal"]:
        scores += torch.full_like(scores, -torch.inf).triu(1)
    u = scores.softmax(-1) @ v
    tangent = u - (u * x).sum(-1, keepdim=True) * x
    return bool((torch.linalg.vector_norm(tangent, dim=-1) < 0.01 * torch.linalg.vector_norm(u, dim=-1)).all())
