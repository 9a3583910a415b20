"""Claims: NaN and infinities in any argument get exactly where they get in the definition; but for those in a key or
value that queries do not see (causal, cu_seqlens, boolean masks), which the queries that do see it get."""

import pytest
import torch

import macaron_ops
from macaron_ops import native
from tests.ops.cases import CASES, build
from tests.ops.test_numbers import leaves_of, run

pytestmark = pytest.mark.skipif(native.library() is None, reason=f"the native backend: {native.why_not_loaded()}")

NAMES = {
    *(f"ffn_step-{name}" for name in ("relu", "gelu", "gelu_tanh", "silu", "swiglu", "post", "sphere", "no-norm")),
    *(f"attend_step-{name}" for name in ("self", "separate", "grouped", "cross", "post")),
    *(f"attend_step-{name}" for name in ("learned-mask", "learned-mask-per-head", "learned-padding")),
    *(f"attend_step-{name}" for name in ("rotary", "unit-qk")),
    *(f"sphere_attend_step-{name}" for name in ("softmax", "unnormalized", "given", "past-a-tile")),
    *(f"normalize_step-{name}" for name in ("tangent", "difference", "ambient")),
}
CHOSEN = [case for case in CASES if repr(case) in NAMES]


def finite(case, spoilt, value, backend):
    """Which numbers of the output and of every gradient are finite, with one number of one argument replaced."""
    args, kwargs = build(case, torch.float32)
    flat = leaves_of(args, kwargs)[spoilt].detach().view(-1)
    flat[len(flat) // 2] = value
    with macaron_ops.use_backend(backend):
        results = run(case.operator, args, kwargs, torch.ones(args[0].shape))
    return [result.isfinite() for result in results]


def test_the_chosen_cases_are_there():
    assert len(CHOSEN) == len(NAMES)


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("case", CHOSEN, ids=repr)
def test_they_go_where_the_references_go(case, value):
    for spoilt in range(len(leaves_of(*build(case, torch.float32)))):
        native_finite, exact = (finite(case, spoilt, value, backend) for backend in ("native", "reference"))
        for i, (ours, theirs) in enumerate(zip(native_finite, exact, strict=True)):
            assert torch.equal(ours, theirs), f"argument {spoilt}, result {i}: {(ours != theirs).sum()} differ"


@pytest.mark.parametrize("activation", ["relu", "gelu_tanh", "silu"])  # torch's own gelu of inf is NaN, ours is inf
def test_padding_stays_out_of_real_rows(activation):
    """37 tokens fill a panel and part of another one, whose padding sees infinite weights."""
    w_in, b_in, w_out = torch.randn(13, 20), torch.randn(13), torch.randn(20, 13)
    w_in[4, 7] = torch.inf
    x = torch.randn(37, 20)
    x[:, 7] = x[:, 7].abs() + 1
    found = []
    for backend in ("native", "reference"):
        leaves = [t.clone().requires_grad_() for t in (x, w_in, b_in, w_out)]
        with macaron_ops.use_backend(backend):
            y = macaron_ops.ffn_step(*leaves, None, norm=None, activation=activation)
            found.append([y, *torch.autograd.grad(y.sum(), leaves)])
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours.isnan(), theirs.isnan()) and torch.equal(ours.isfinite(), theirs.isfinite())


@pytest.mark.parametrize("save", ["fast", "lean"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("operator", ["ffn_step", "attend_step"])
def test_gradients_of_bfloat16_weights_over_several_groups_of_tokens(operator, dtype, save):
    """Between two groups the halves of a sum lie apart. An infinity or a NaN of the first, of a middle or of the last
    group comes out of it, and infinities of opposite signs from either end are NaN."""
    x, grad = torch.randn(2, 20, 60, 16)
    first, middle, last = grad[0, 3], grad[10, 0], grad[19, 59]
    first[1], middle[2], last[3] = torch.inf, -torch.inf, torch.inf
    first[5], middle[6], last[7] = torch.nan, torch.nan, torch.nan
    first[9], last[9] = torch.inf, -torch.inf
    w_in, w_out = torch.randn(48, 16) / 4, torch.randn(16, 48 if operator == "ffn_step" else 16)
    heads = () if operator == "ffn_step" else (2,)
    found = []
    for backend in ("native", "reference"):
        leaves = [
            t.to(kind, copy=True).requires_grad_()
            for t, kind in ((x, dtype), (w_in, torch.bfloat16), (w_out, torch.bfloat16))
        ]
        with macaron_ops.use_backend(backend), torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.bfloat16):
            step = getattr(macaron_ops, operator)
            y = step(leaves[0], leaves[1], None, leaves[2], None, *heads, norm=None, save=save)
        found.append(torch.autograd.grad(y, leaves, grad.to(dtype)))
    for ours, theirs in zip(*found, strict=True):
        for kind in (torch.isnan, torch.isposinf, torch.isneginf):
            assert torch.equal(kind(ours), kind(theirs))


def attend(tokens, **options):
    """``attend_step`` of two heads with each backend: where its output and gradients are NaN, and where finite.

    The rotation of the token in the middle is NaN, and so are its query and its key, while its value is finite.
    """
    middle = tokens // 2
    x, w_qkv, w_out = torch.randn(tokens, 8), torch.randn(24, 8), torch.randn(8, 8)
    cos, sin = torch.ones(tokens, 2), torch.zeros(tokens, 2)
    cos[middle] = torch.nan
    found = []
    for backend in ("native", "reference"):
        leaves = [t.clone().requires_grad_() for t in (x, w_qkv, w_out)]
        floating = [m for m in options.values() if isinstance(m, torch.Tensor) and m.is_floating_point()]
        masks = [m.requires_grad_() for m in floating]
        with macaron_ops.use_backend(backend):
            y = macaron_ops.attend_step(leaves[0], leaves[1], None, leaves[2], None, 2, rotary=(cos, sin), **options)
            found.append([y, *torch.autograd.grad(y.sum(), leaves + masks)])
    return middle, found


@pytest.mark.parametrize("tokens", [7, 70])
@pytest.mark.parametrize("shape", ["one row", "one column", "per head", "padding"])
@pytest.mark.parametrize("added", [-torch.inf, torch.inf, torch.nan], ids=str)
def test_a_floating_mask_is_added(tokens, shape, added):
    """It hides nothing: NaN + -inf is NaN."""
    if shape == "padding":
        mask = torch.zeros(tokens)
        mask[tokens // 2 :: 3] = added
        options = {"key_padding_mask": mask}
    else:
        mask = torch.zeros(
            {"one row": (1, 1, tokens, 1), "one column": (1, 1, 1, tokens)}.get(shape, (2, tokens, tokens))
        )
        mask.view(-1)[mask.numel() // 2 :: 3] = added
        options = {"attn_mask": mask}
    _, (ours, theirs) = attend(tokens, **options)
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert torch.equal(a.isnan(), b.isnan()) and torch.equal(a.isfinite(), b.isfinite()), f"result {i}"


def test_floating_masks_of_opposite_infinities_are_nan():
    mask, padding = torch.zeros(1, 1, 6, 6), torch.zeros(6)
    mask[..., 2, 3], padding[3] = -torch.inf, torch.inf
    _, (ours, theirs) = attend(6, attn_mask=mask, key_padding_mask=padding)
    assert all(torch.equal(a.isnan(), b.isnan()) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("blocked", ["mask", "padding"])
def test_a_boolean_mask_hides_what_is_added(blocked):
    """A key that it blocks stays blocked, whatever a floating mask adds to the score."""
    tokens = 40
    x, w_qkv, w_out = torch.randn(tokens, 8), torch.randn(24, 8), torch.randn(8, 8)
    hidden = torch.arange(tokens) % 3 == 1
    boolean, floating = ("attn_mask", "key_padding_mask") if blocked == "mask" else ("key_padding_mask", "attn_mask")
    shapes = {"attn_mask": (tokens, tokens), "key_padding_mask": (tokens,)}
    y = []
    for added in (0.0, torch.inf, -torch.inf, torch.nan):
        masks = {boolean: hidden.expand(shapes[boolean]), floating: (hidden * 1.0).expand(shapes[floating]).clone()}
        masks[floating][masks[floating] > 0] = added
        with macaron_ops.use_backend("native"):
            y.append(macaron_ops.attend_step(x, w_qkv, None, w_out, None, 2, **masks))
    assert y[0].isfinite().all() and all(torch.equal(y[0], other) for other in y[1:])


@pytest.mark.parametrize("tokens", [7, 70])
@pytest.mark.parametrize("kind", ["causal", "cu_seqlens", "mask", "padding"])
def test_whoever_sees_a_key_that_is_not_finite_is_not(kind, tokens):
    """What becomes of the queries that do not see it is not promised."""
    query, key = torch.arange(tokens)[:, None], torch.arange(tokens)
    start, stop = tokens // 2 - 1, tokens // 2 + 3
    options, sees = {
        "causal": ({"causal": True}, query >= key),
        "cu_seqlens": (
            {"cu_seqlens": torch.tensor([0, start, stop, tokens], dtype=torch.int32)},
            ((query >= start) & (query < stop)) == ((key >= start) & (key < stop)),
        ),
        "mask": ({"attn_mask": (query + key) % 2 == 1}, (query + key) % 2 == 0),
        "padding": ({"key_padding_mask": key < 2}, (key >= 2).expand(tokens, tokens)),
    }[kind]
    middle, (ours, theirs) = attend(tokens, **options)
    rows = sees[:, middle]
    assert rows.any() and ours[0][rows].isnan().all() and theirs[0][rows].isnan().all()
