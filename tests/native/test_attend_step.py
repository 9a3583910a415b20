"""Claim: the native attention step is the reference's at every border of its blocks, with every kind of mask, in linear
memory, and its forward pass gives the same bits whatever the number of threads."""

import os
import subprocess
import sys

import pytest
import torch

import macaron_ops

pytestmark = pytest.mark.skipif(
    not macaron_ops.backends()["native"].usable, reason="the native library cannot be used here"
)
DTYPES = [torch.float32, torch.bfloat16]


def call_of(tokens, *, batch=2, d=24, heads=2, head_dim=8, kv_heads=None, keys=None, dtype=torch.float32, **options):
    """Arguments of a call: ``(args, kwargs)``."""
    kv = (kv_heads or heads) * head_dim

    def draw(*shape, scale=1.0):
        return (torch.randn(*shape, dtype=torch.float64) * scale).to(dtype)

    weights = tuple(draw(rows, d, scale=d**-0.5) for rows in (heads * head_dim, kv, kv))
    biases = tuple(draw(rows) for rows in (heads * head_dim, kv, kv))
    x = draw(batch, tokens, d) if batch else draw(tokens, d)
    if keys is not None:
        options["context"] = draw(batch, keys, d)
    args = (x, weights, biases, draw(d, heads * head_dim, scale=(heads * head_dim) ** -0.5), draw(d), heads)
    return args, {"norm_weight": draw(d), "norm_bias": draw(d), "num_kv_heads": kv_heads, **options}


def leaves_of(args, kwargs):
    given = [*args, *(value for name, value in kwargs.items() if name != "rotary")]
    flat = [t for a in given for t in (a if isinstance(a, tuple) else (a,))]
    return [t for t in flat if isinstance(t, torch.Tensor) and t.is_floating_point()]


def run(backend, args, kwargs, gradients=True):
    """y and the gradients of everything that can have one, for a gradient of y that depends on its shape alone."""
    leaves = leaves_of(args, kwargs)
    for leaf in leaves:
        leaf.requires_grad_(gradients)
    with macaron_ops.use_backend(backend):
        y = macaron_ops.attend_step(*args, **kwargs)
    if not gradients:
        return [y]
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(y.shape, dtype=torch.float64, generator=generator).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]


def upcast(value):
    if isinstance(value, tuple):
        return tuple(upcast(v) for v in value)
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return value
    return value.detach().double()


def assert_same(args, kwargs, gradients=True):
    """Rounding is many times smaller than what one key too many, or one too few, would change."""
    actual = run("native", args, kwargs, gradients)
    exact = run("reference", upcast(args), {name: upcast(v) for name, v in kwargs.items()}, gradients)
    eps = torch.finfo(args[0].dtype).eps
    largest = [max([1.0, *e.abs().flatten().tolist()]) for e in exact]
    for i, (a, e) in enumerate(zip(actual, exact, strict=True)):
        # b_k's gradient is 0, because a softmax does not see it: what cancels there is as large as b_v's.
        scale = largest[i] if largest[i] > 1.0 else max(largest[i : i + 2])
        atol = (300 if eps < 1e-3 else 12) * eps * scale
        torch.testing.assert_close(a.double(), e, rtol=0, atol=atol, msg=lambda m, i=i: f"output {i}: {m}")


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("tokens", [1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 96, 97, 129, 200])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_borders_of_blocks(tokens, causal, dtype):
    assert_same(*call_of(tokens, dtype=dtype, causal=causal))


@pytest.mark.parametrize(("tokens", "keys"), [(1, 1), (3, 130), (70, 1), (33, 64), (40, 257), (5, 513), (70, 600)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_as_many_keys_as_you_like(tokens, keys, dtype):
    assert_same(*call_of(tokens, keys=keys, dtype=dtype))


@pytest.mark.parametrize("save", ["fast", "lean"])
@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (1, 17), (12, 33)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_key_has_all_of_the_weight(batch, tokens, save, dtype):
    """No score moves a softmax of one: the backward pass finds the forward pass's bits, and gradients of exactly 0.

    Queries are lanes in one pass and rows in the other, and panels of tokens begin elsewhere."""
    args, kwargs = call_of(tokens, batch=batch, d=40, heads=2, head_dim=33, keys=1, dtype=dtype, save=save)
    q, k, _ = args[1]
    gradients = dict(zip(map(id, leaves_of(args, kwargs)), run("native", args, kwargs)[1:], strict=True))
    assert not gradients[id(q)].any() and not gradients[id(k)].any()


@pytest.mark.parametrize("head_dim", [1, 3, 5, 16, 33, 64, 80])
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_heads_of_any_width(head_dim, heads, dtype):
    """Also odd ones, whose pairs of bf16 lie in two heads."""
    assert_same(*call_of(35, d=17, heads=heads, head_dim=head_dim, dtype=dtype))


@pytest.mark.parametrize("batch", [1, 5, 33])
@pytest.mark.parametrize("tokens", [1, 3, 20, 48])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sequences_that_begin_inside_a_panel(batch, tokens, dtype):
    assert_same(*call_of(tokens, batch=batch, dtype=dtype))


def test_several_groups_of_sequences():
    """More tokens than a backward pass takes at a time, with a context of another length."""
    assert_same(*call_of(40, batch=50, keys=24))
    assert_same(*call_of(300, batch=5, kv_heads=1))


@pytest.mark.parametrize("placement", ["pre", "post"])
@pytest.mark.parametrize("save", ["fast", "lean"])
@pytest.mark.parametrize(("batch", "tokens"), [(9, 63), (7, 129), (5, 255), (3, 600)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_groups_that_begin_inside_a_panel(batch, tokens, save, placement, dtype):
    """Of what the heads attended to, which is saved in panels of all sequences."""
    args, kwargs = call_of(tokens, batch=batch, dtype=dtype, placement=placement, save=save)
    assert_same(args, kwargs)


@pytest.mark.parametrize("save", ["fast", "lean"])
@pytest.mark.parametrize("tokens", [64, 256])
def test_memory_depends_on_no_remainder(tokens, save):
    """Sequences that do not fill panels take hardly more scratch memory than those that do."""
    peaks = []
    for length in (tokens, tokens - 1):
        args, kwargs = call_of(length, batch=32, d=64, heads=2, head_dim=32, save=save)
        torch.ops.macaron_ops_cpu.scratch_peak()  # starts its mark anew
        run("native", args, kwargs)
        peaks.append(torch.ops.macaron_ops_cpu.scratch_peak())
    assert peaks[1] <= 3 * peaks[0]


def test_no_keys_at_all():
    assert_same(*call_of(5, keys=0))


@pytest.mark.parametrize("tokens", [40, 150])
def test_causal_is_the_triangle(tokens):
    """Blocks that are skipped contribute what masked ones would: nothing, to the bit."""
    args, kwargs = call_of(tokens)
    triangle = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
    skipped = run("native", args, {**kwargs, "causal": True})
    masked = run("native", args, {**kwargs, "attn_mask": triangle})
    assert torch.equal(skipped[0], masked[0])
    for a, b in zip(skipped, masked, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("borders", [[0, 0, 5, 5, 6, 40, 103, 103], [0, 64, 128, 200], [0, 130], [0, *range(1, 70)]])
def test_packed_sequences(borders, causal):
    """Each sequence as if it were alone; empty ones change nothing."""
    args, kwargs = call_of(borders[-1], batch=0, causal=causal)
    packed = {**kwargs, "cu_seqlens": torch.tensor(borders, dtype=torch.int32)}
    assert_same(args, packed)
    y = run("native", args, packed, gradients=False)[0]
    for start, stop in zip(borders, borders[1:], strict=False):
        alone = run("native", (args[0][start:stop].detach(), *args[1:]), kwargs, gradients=False)[0]
        torch.testing.assert_close(y[start:stop], alone)


@pytest.mark.parametrize("borders", [[0, 8, 3_000_000], [0, 8], [1, 16], [0, 12, 8, 16]])
def test_borders_that_nobody_saw_before(borders):
    """What a graph computes is not checked in Python, and the kernel writes where borders say."""
    args, kwargs = call_of(16, batch=0)
    computed = torch.compile(lambda cu: macaron_ops.attend_step(*args, **kwargs, cu_seqlens=cu), backend="eager")
    with macaron_ops.use_backend("native"), pytest.raises((RuntimeError, ValueError), match="borders that rise from 0"):
        computed(torch.tensor(borders, dtype=torch.int32))
    parameter = torch.nn.Parameter(torch.tensor(borders, dtype=torch.int32), requires_grad=False)
    with pytest.raises(ValueError, match="borders that rise from 0 to T = 16"):
        macaron_ops.attend_step(*args, **kwargs, cu_seqlens=parameter)


def test_a_row_that_sees_nothing_gives_the_bias_alone():
    args, kwargs = call_of(70)
    blocked = torch.zeros(70, 70, dtype=torch.bool)
    blocked[3] = blocked[64:] = True
    kwargs["attn_mask"] = blocked
    assert_same(args, kwargs)
    y = run("native", args, kwargs, gradients=False)[0]
    torch.testing.assert_close(y[:, 3], args[0][:, 3] + args[4])
    everything = {**kwargs, "attn_mask": None, "key_padding_mask": torch.ones(2, 70, dtype=torch.bool)}
    assert all(g.isfinite().all() for g in run("native", args, everything))
    below = {**kwargs, "attn_mask": torch.full((70, 70), -torch.inf)}  # added instead of blocked
    torch.testing.assert_close(run("native", args, below, gradients=False)[0], args[0] + args[4])


MASKS = {
    "bool": lambda b, h, t, s: torch.rand(b, h, t, s) < 0.3,
    "added": lambda b, h, t, s: torch.randn(b, h, t, s),
    "per-query": lambda b, h, t, s: torch.randn(b, 1, t, 1).expand(b, 1, t, 1),
    "per-key": lambda b, h, t, s: torch.randn(1, 1, 1, s),
    "of-all-heads": lambda b, h, t, s: torch.randn(b, 1, t, s),
    "of-all-sequences": lambda b, h, t, s: torch.randn(1, h, t, s),
    "transposed": lambda b, h, t, s: torch.randn(s, t, h, b).permute(3, 2, 1, 0),
    "every-other": lambda b, h, t, s: torch.randn(b, h, t, 2 * s)[..., ::2],
    "expanded": lambda b, h, t, s: torch.randn(1, 1, t, s).expand(b, h, t, s),
}


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masks_of_any_strides(kind, dtype):
    mask = MASKS[kind](2, 2, 70, 40)
    mask = mask if mask.dtype == torch.bool else mask.to(dtype)
    args, kwargs = call_of(70, keys=40, dtype=dtype)
    kwargs["attn_mask"] = mask.detach()
    kwargs["key_padding_mask"] = torch.arange(40).expand(2, 40) > 35
    assert_same(args, kwargs)


def test_everything_at_once():
    args, kwargs = call_of(70, heads=4, kv_heads=2, causal=True, placement="post", step=0.5, residual_scale=1.2)
    kwargs |= {
        "rotary": (torch.randn(70, 3), torch.randn(70, 3)),
        "qk_scale": torch.randn(8),
        "attn_mask": torch.randn(1, 4, 70, 70),
        "key_padding_mask": torch.randn(2, 70),
        "dropout": 0.3,
        "attention_dropout": 0.4,
        "seed": torch.tensor(2**62 + 12345),
    }
    for save in ("fast", "lean"):
        assert_same(args, {**kwargs, "save": save})
    assert_same(args, {**kwargs, "num_kv_heads": 2, "scale": 0.0})
    assert_same(args, {**kwargs, "num_kv_heads": 2, "scale": -0.5})


def test_one_scale_per_head():
    args, kwargs = call_of(70, heads=3, kv_heads=3)
    assert_same(args, {**kwargs, "qk_scale": torch.randn(3, 8)})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("batch", "tokens"), [(1, 16), (1, 70), (3, 33), (12, 33), (8, 64), (40, 20), (2, 300)])
def test_threads_do_not_change_a_bit(batch, tokens, dtype):
    dropped = {"dropout": 0.1, "attention_dropout": 0.1, "seed": 3}
    args, kwargs = call_of(tokens, batch=batch, d=40, heads=4, head_dim=10, dtype=dtype, **dropped)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(run("native", args, kwargs))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert torch.equal(results[0][0], other[0])
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["x", "w_q", "b_v", "w_out"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_inf_go_where_they_would(value, where, dtype):
    args, kwargs = call_of(37, dtype=dtype, norm="rms", norm_bias=None)
    {"x": args[0][1], "w_q": args[1][0], "b_v": args[2][2], "w_out": args[3]}[where].view(-1)[5] = value
    for tensor, expected in zip(run("native", args, kwargs), run("reference", args, kwargs), strict=True):
        assert torch.equal(tensor.isnan(), expected.isnan())


LONG = """
import resource, torch, macaron_ops
torch.set_num_threads(1)
tokens, d = {tokens}, 16
draw = lambda *shape: torch.randn(shape, requires_grad=True)
args = draw(tokens, d), draw(3 * d, d), draw(3 * d), draw(d, d), draw(d), 2
with macaron_ops.use_backend("native"):
    macaron_ops.attend_step(args[0][:64], *args[1:]).sum().backward()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    macaron_ops.attend_step(*args, causal=True).sum().backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_is_linear_in_the_tokens():
    """One row of scores per token of 12000 would take 576 MB a head."""
    done = subprocess.run(
        [sys.executable, "-c", LONG.format(tokens=12000)], capture_output=True, text=True, env={**os.environ}
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 60_000  # kB
