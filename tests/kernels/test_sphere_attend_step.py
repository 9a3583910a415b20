"""Claim: the step of particles in Triton keeps the tolerance rule over several blocks of queries and keys, with and
without matrix products, and where few weights are most of a row; what no score can move has a gradient of exactly 0;
NaN and infinities go where the definition's go; and a call launches the passes that it needs, in linear memory."""

import pytest
import torch
import torch.nn.functional as F

import macaron_ops
from macaron_ops.reference.sphere_attend_step import Options, Tensors
from tests import twins
from tests.native.calls import Call, Drawn, check
from tests.rule import assert_draws_by_rule

TRITON = macaron_ops.backends()["triton"]
if not TRITON.usable:
    pytest.skip(f"triton: {TRITON.reason}", allow_module_level=True)

from macaron_ops.kernels import sphere_attend_step as kernels  # noqa: E402
from macaron_ops.kernels.device import recording  # noqa: E402

PASSES = ("forward", "rows_backward", "points", "queries", "keys")


def particles(n, d, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(n, d, dtype=torch.float64, generator=generator), dim=-1).to(dtype)


def results(backend, x, beta, **options):
    """y and the gradient in x, for a gradient of y that is the same in every dtype."""
    x = x.detach().requires_grad_()
    if backend == "eager":
        y = twins.sphere_attend_step(x, 0.3, beta, **options)
    else:
        with macaron_ops.use_backend(backend):
            y = macaron_ops.sphere_attend_step(x, 0.3, beta, **options)
    grad = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).bfloat16()
    return y.detach(), torch.autograd.grad(y, x, grad.to(y))[0]


@pytest.mark.parametrize("d", [3, 17])
def test_two_blocks_of_causal_particles(d, device):
    tensors = {"x": Drawn((150, d), "unit", "x")}
    check(Call("sphere_attend_step", tensors, {"step": 0.3, "beta": 3.0, "causal": True}), "triton", device)


@pytest.mark.parametrize("d", [3, 17])
def test_concentrated_weights(d, device):
    """A few neighbours of a particle have most of its weight: the gradients of scores cancel."""

    def draw(seed):
        x = particles(100, d, seed=seed).to(device)
        found = [results(*how, 60.0) for how in (("triton", x), ("eager", x), ("reference", x.double()))]
        return {name: triple for name, *triple in zip(("y", "gradient of x"), *found, strict=True)}

    assert_draws_by_rule(draw)


@pytest.mark.parametrize("weighting", ["softmax", "unnormalized"])
def test_points_at_one_look(weighting, device):
    """bfloat16 points among themselves, over several blocks, with a learned beta."""
    tensors = {"x": Drawn((2, 150, 17), "unit", "x"), "beta": Drawn((), "positive", "x", scale=3.0)}
    check(Call("sphere_attend_step", tensors, {"step": 0.3, "weighting": weighting}, "bfloat16"), "triton", device)


@pytest.mark.parametrize(("d", "dtype"), [(3, torch.float32), (17, torch.bfloat16)])
def test_points_of_other_lengths_than_one(d, dtype, device):
    """Up to 14: no one shift keeps the weights of all in range, and those of some rows are summed again."""

    def draw(seed):
        x = (particles(150, d, torch.float64, seed) * torch.linspace(0.1, 14, 150)[:, None]).to(device, dtype)
        found = [results(*how, 4.0) for how in (("triton", x), ("eager", x), ("reference", x.double()))]
        return {name: triple for name, *triple in zip(("y", "gradient of x"), *found, strict=True)}

    assert_draws_by_rule(draw)


def gradients_of_scores(x, query, key, value):
    t = [s.detach().clone().requires_grad_() for s in (query, key)]
    beta = torch.tensor(1.5, dtype=x.dtype, device=x.device, requires_grad=True)
    with macaron_ops.use_backend("triton"):
        y = macaron_ops.sphere_attend_step(x, 0.3, beta, query=t[0], key=t[1], value=value)
    return torch.autograd.grad(y, [*t, beta], torch.randn_like(y))


@pytest.mark.parametrize("d", [3, 33])
def test_one_key_has_no_gradient(d, device):
    """Its weight is 1 whatever its score."""
    x, one = particles(37, d).to(device), particles(1, d).to(device)
    assert not any(g.any() for g in gradients_of_scores(x, x, one, one))


def test_equal_values_have_no_gradient_of_scores(device):
    x, key, one = (particles(n, 3, seed=i).to(device) for i, n in enumerate((37, 37, 1)))
    assert not any(g.any() for g in gradients_of_scores(x, x, key, one.expand(37, 3)))


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize(("d", "weighting"), [(3, "softmax"), (17, "unnormalized")])
def test_special_values(d, weighting, value, device):
    """In x, a query, a key or a value."""
    grad = torch.ones(21, d, device=device)
    for spoilt in range(4):
        found = []
        for backend in ("triton", "reference"):
            t = [particles(21, d, seed=i).to(device) for i in range(4)]
            t[spoilt][10, 1] = value
            leaves = [s.requires_grad_() for s in t]
            with macaron_ops.use_backend(backend):
                y = macaron_ops.sphere_attend_step(
                    leaves[0], 0.3, 2.0, query=leaves[1], key=leaves[2], value=leaves[3], weighting=weighting
                )
            found.append([y, *torch.autograd.grad(y, leaves, grad)])
        for i, (ours, theirs) in enumerate(zip(*found, strict=True)):
            assert torch.equal(ours.isfinite(), theirs.isfinite()), f"argument {spoilt}, result {i}"


# -- launches, seen without running one ------------------------------------------------------------------------------


def launches_of(
    needs=(), *, given=(), save="fast", weighting="softmax", width=64, n=65536, dtype=torch.bfloat16, causal=False
):
    """``(forward's, backward's)`` launches, for the gradients named in ``needs``."""
    x = torch.empty((n, width), dtype=dtype, device="meta")
    tensors = Tensors(*(torch.empty_like(x) if name in given else None for name in Tensors._fields[:3]), None, None)
    if "beta_tensor" in needs:
        tensors = tensors._replace(beta_tensor=torch.empty((), dtype=dtype, device="meta"))
    options = Options(0.3, 4.0, weighting, "tangent", causal, 1e-12)
    with recording("sm90", 132) as forward:
        _, saved = kernels.forward(x, tensors, options, save)
    with recording("sm90", 132) as backward:
        if needs:
            kernels.backward(x, [name in needs for name in ("x", *Tensors._fields)], x, tensors, saved, options)
    return forward, backward, saved


def passes(launches):
    return [next(name for name in PASSES if name in launch.kernel.__name__) for launch in launches]


def test_passes():
    forward, backward, saved = launches_of(("x",))
    assert passes(forward) == ["forward"] and passes(backward) == ["rows_backward", "points", "queries", "keys"]
    assert sum(s.numel() for s in saved) == 65536 * (64 + 2)
    assert all(t.numel() <= 65536 * 64 for one in backward for t in one.arguments if isinstance(t, torch.Tensor))
    assert not any(s.numel() for s in launches_of(save="none")[2])


@pytest.mark.parametrize(
    ("needs", "weighting", "expected"),
    [
        (("x",), "softmax", []),
        (("query",), "softmax", ["queries"]),
        (("beta_tensor",), "softmax", ["queries"]),
        (("key",), "softmax", ["queries", "keys"]),  # settles d
        (("key",), "unnormalized", ["keys"]),
        (("value",), "softmax", ["keys"]),
    ],
)
def test_frozen_subsets(needs, weighting, expected):
    _, backward, _ = launches_of(needs, given=("query", "key", "value"), weighting=weighting)
    assert passes(backward) == ["rows_backward", *expected]


def test_points_are_loaded_once_and_looked_at_once():
    """Of points among themselves one block is key and value, and nothing is settled in a loop of its own."""
    for given, same, settle in (((), True, "after"), (("query",), True, "before"), (("value",), False, "before")):
        forward, backward, _ = launches_of(("x",), given=given)
        queries = backward[passes(backward).index("queries")]
        assert forward[0].constants["SAME"] is same
        assert (queries.constants["SAME"], queries.constants["SETTLE"]) == (same, settle)


@pytest.mark.parametrize(
    ("fixed", "at_one_look", "how"),
    [
        (True, True, {}),
        (True, True, {"weighting": "unnormalized"}),
        (True, False, {"width": 256}),
        (True, False, {"given": ("value",)}),
        (True, False, {"causal": True}),
        (True, False, {"width": 3, "dtype": torch.float32}),
        (False, False, {"given": ("query",)}),
        (False, False, {"dtype": torch.float16}),
        (False, False, {"dtype": torch.float32}),
    ],
)
def test_what_scores_without_a_maximum_and_one_look_are_for(fixed, at_one_look, how):
    forward, backward, _ = launches_of(("x",), **how)
    assert forward[0].constants["FIXED"] is fixed and ("points" in passes(backward)) is at_one_look


def test_few_particles_take_smaller_tiles():
    for n, d, dtype in ((4096, 3, torch.float32), (8192, 64, torch.bfloat16)):
        assert launches_of(width=d, n=n, dtype=dtype)[0][0].programs >= 128


def test_refusals(device):
    x = torch.zeros(2, 257, device=device)
    with macaron_ops.use_backend("triton"):
        with pytest.raises(macaron_ops.BackendError, match="not torch.float64"):
            macaron_ops.sphere_attend_step(x.double(), 0.3, 2.0)
        with pytest.raises(macaron_ops.BackendError, match="at most 256 channels, not 257"):
            macaron_ops.sphere_attend_step(x, 0.3, 2.0)
