"""Claim: the CUDA kernels keep the tolerance rule in the output and every gradient, compiled for the CPU and run there
in several orders of their threads, which leave no room for a missing barrier, and on a GPU."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings

import macaron_ops
from tests import twins
from tests.native.calls import Call, Drawn, check, values
from tests.native.calls import run as run_call
from tests.native.strategies import normalize_calls, sphere_calls
from tests.ops.cases import CASES, build
from tests.ops.test_numbers import run, upcast
from tests.rule import assert_by_rule, assert_draws_by_rule

NAMES = ("normalize_step", "sphere_attend_step")
OURS = [case for case in CASES if case.operator.__name__ in NAMES and "past-a-tile" not in case.name]
ORDERS = ("in-turn", "backward", "5")  # and "forward", which is what is meant where none is asked for
few = settings(max_examples=10, suppress_health_check=list(HealthCheck))


def assert_case_by_rule(case, dtype, device):
    twin = getattr(twins, case.operator.__name__)

    def draw(seed):
        args, kwargs = build(case, dtype, device, seed)
        generator = torch.Generator().manual_seed(seed + 1000)
        grad = torch.randn(args[0].shape, dtype=torch.float64, generator=generator).to(device, dtype)
        eager = run(twin, *build(case, dtype, device, seed), grad)
        exact = run(twin, tuple(upcast(a) for a in args), {name: upcast(v) for name, v in kwargs.items()}, grad)
        with macaron_ops.use_backend("cuda"):
            actual = run(case.operator, args, kwargs, grad)
        assert all(t.dtype == dtype for t in actual)
        results = enumerate(zip(actual, eager, exact, strict=True))
        return {f"output {i}": tuple(t.detach() for t in ts) for i, ts in results}

    assert_draws_by_rule(draw)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", OURS, ids=repr)
def test_rule(case, dtype, device):
    assert_case_by_rule(case, dtype, device)


@pytest.fixture(params=ORDERS)
def order(request, monkeypatch, device):
    if device.type == "cuda":
        pytest.skip("a GPU has an order of its own")
    monkeypatch.setenv("MACARON_OPS_THREAD_ORDER", request.param)


@pytest.mark.parametrize("case", OURS, ids=repr)
def test_every_order_of_threads(case, order, device):
    assert_case_by_rule(case, torch.float32, device)


# Each kind of row: a lane with one element, with a vector, with four; several warps; by vectors and not.
WIDTHS = [(5, 4), (200, 3), (512, 5), (1000, 3), (129, 5), (3001, 2), (4096, 2)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("direction", ["tangent", "difference", "ambient"])
@pytest.mark.parametrize(("width", "rows"), WIDTHS)
def test_rows(width, rows, direction, dtype, device):
    tensors = {"x": Drawn((rows, width), "unit", "x"), "u": Drawn((rows, width), role="x")}
    tensors["step"] = Drawn((width,), role="scale")
    check(Call("normalize_step", tensors, {"direction": direction}, dtype), "cuda", device)


@pytest.mark.parametrize(("width", "rows"), [(1000, 3), (3001, 2)])
def test_rows_in_every_order(width, rows, order, device):
    test_rows(width, rows, "tangent", "bfloat16", device)


def test_rows_of_a_slice(device):
    """Which begins where no vector does."""
    tensors = {name: Drawn((3, 64), kind, "x", "inside") for name, kind in (("x", "unit"), ("u", "normal"))}
    check(Call("normalize_step", tensors, {"step": 0.3}, "bfloat16"), "cuda", device)


@pytest.mark.parametrize("operator", NAMES)
@pytest.mark.parametrize("direction", ["tangent", "difference", "ambient"])
def test_rows_shorter_than_eps(direction, operator, device):
    """x + c v and u: they are divided by eps, and their gradients have no part along them."""
    tensors = {"x": Drawn((40, 3), role="x", scale=1e-14)}
    options = {"step": 0.3, "direction": direction}
    if operator == "normalize_step":
        tensors["u"] = Drawn((40, 3), role="x", scale=1e-14)
    else:
        options["beta"] = 2.0
    check(Call(operator, tensors, options), "cuda", device)


# -- particles -------------------------------------------------------------------------------------------------------


def particles(n, d, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(n, d, dtype=torch.float64, generator=generator), dim=-1).to(dtype)


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("d", [2, 3, 4, 7, 16])
def test_particles(d, given, device):
    """Over several tiles, with and without keys and values of their own."""
    tensors = {"x": Drawn((2, 150, d), "unit", "x")}
    if given:
        tensors |= {"query": Drawn((2, 150, 5)), "key": Drawn((2, 270, 5)), "value": Drawn((2, 270, d))}
    weighting = "unnormalized" if d == 4 else "softmax"
    check(Call("sphere_attend_step", tensors, {"step": 0.3, "beta": -1.5, "weighting": weighting}), "cuda", device)


@pytest.mark.parametrize("weighting", ["softmax", "unnormalized"])
def test_causal_particles(weighting, device):
    tensors = {"x": Drawn((300, 3), "unit", "x")}
    options = {"step": 0.3, "beta": 3.0, "causal": True, "weighting": weighting}
    check(Call("sphere_attend_step", tensors, options), "cuda", device)


def test_particles_in_every_order(order, device):
    tensors = {"x": Drawn((2, 70, 3), "unit", "x"), "beta": Drawn((), "positive", "scale")}
    check(Call("sphere_attend_step", tensors, {"step": 0.3, "causal": True}), "cuda", device)


@pytest.mark.parametrize("weighting", ["softmax", "unnormalized"])
def test_other_keys_in_every_order(weighting, order, device):
    """Over two tiles, of channels that are no whole vectors."""
    tensors = {"x": Drawn((37, 7), "unit", "x"), "query": Drawn((37, 5)), "key": Drawn((133, 5))}
    tensors["value"] = Drawn((133, 7))
    check(Call("sphere_attend_step", tensors, {"step": 0.3, "beta": -1.5, "weighting": weighting}), "cuda", device)


def test_a_million_particles(device):
    """That look at a few keys: offsets of rows, and the blocks of a launch, at this size."""
    x, key = particles(1 << 20, 3).to(device), particles(5, 3, seed=1).to(device)

    def run(operator, dtype):
        leaves = [t.to(dtype).requires_grad_() for t in (x, key, key)]
        y = operator(leaves[0], 0.3, 2.0, key=leaves[1], value=leaves[2])
        return [y.detach(), *torch.autograd.grad(y, leaves, x.flip(1).to(dtype))]

    with macaron_ops.use_backend("cuda"):
        ours = run(macaron_ops.sphere_attend_step, torch.float32)
    eager, exact = (run(twins.sphere_attend_step, dtype) for dtype in (torch.float32, torch.float64))
    for name, *found in zip(("y", "x", "key", "value"), ours, eager, exact, strict=True):
        assert_by_rule(name, *found)


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_all_pairs_of_a_million_particles(device):
    """The first and the last, against sums in float64."""
    x = particles(1 << 20, 3).to(device)
    with macaron_ops.use_backend("cuda"):
        y = macaron_ops.sphere_attend_step(x, 0.3, 2.0)
    some = torch.cat([x[:64], x[-64:]])
    wide, every = some.double(), x.double()
    u = torch.softmax(2.0 * wide @ every.T, -1) @ every
    v = u - (u * wide).sum(-1, keepdim=True) * wide
    exact = F.normalize(wide + 0.3 * v, dim=-1)
    torch.testing.assert_close(torch.cat([y[:64], y[-64:]]).double(), exact, rtol=1e-5, atol=1e-6)


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


@pytest.mark.parametrize("n", [40, 2100], ids=["eight warps an owner", "four owners a thread"])
@pytest.mark.parametrize("beta", [4.0, 60.0])
def test_concentrated_weights(n, beta, device):
    """A few neighbours of a particle have most of its weight: the gradients of scores cancel, and the largest score is
    far above that with the first key."""

    def draw(seed):
        x = particles(n, 3, seed=seed).to(device)
        found = [results(*how, beta) for how in (("cuda", x), ("eager", x), ("reference", x.double()))]
        return {name: triple for name, *triple in zip(("y", "gradient of x"), *found, strict=True)}

    assert_draws_by_rule(draw)


def gradients_of_scores(x, query, key, value):
    t = [s.detach().clone().requires_grad_() for s in (query, key)]
    beta = torch.tensor(1.5, dtype=x.dtype, device=x.device, requires_grad=True)
    with macaron_ops.use_backend("cuda"):
        y = macaron_ops.sphere_attend_step(x, 0.3, beta, query=t[0], key=t[1], value=value)
    return torch.autograd.grad(y, [*t, beta], torch.randn_like(y))


def test_one_key_has_no_gradient(device):
    """Its weight is 1 whatever its score."""
    x, one = particles(37, 3).to(device), particles(1, 3).to(device)
    assert not any(g.any() for g in gradients_of_scores(x, x, one, one))


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("weighting", ["softmax", "unnormalized"])
def test_special_values(weighting, value, device):
    """In x, a query, a key or a value: NaN and infinities go where the definition's go."""
    grad = torch.ones(21, 3, device=device)
    for spoilt in range(4):
        found = []
        for backend in ("cuda", "reference"):
            t = [particles(21, 3, seed=i).to(device) for i in range(4)]
            t[spoilt][10, 1] = value
            leaves = [s.requires_grad_() for s in t]
            with macaron_ops.use_backend(backend):
                y = macaron_ops.sphere_attend_step(
                    leaves[0], 0.3, 2.0, query=leaves[1], key=leaves[2], value=leaves[3], weighting=weighting
                )
            found.append([y, *torch.autograd.grad(y, leaves, grad)])
        for i, (ours, theirs) in enumerate(zip(*found, strict=True)):
            assert torch.equal(ours.isfinite(), theirs.isfinite()), f"argument {spoilt}, result {i}"


# -- any call --------------------------------------------------------------------------------------------------------


def test_the_same_bits_every_time(device):
    """No sum depends on the order in which blocks finish."""
    tensors = {"x": Drawn((600, 3), "unit", "x"), "step": Drawn((3,), role="scale"), "beta": Drawn((), role="scale")}
    call = Call("sphere_attend_step", tensors)
    found = values(call, 0)
    first, again = (run_call(call, found, "cuda", device) for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)


@few
@given(call=normalize_calls())
def test_any_normalize_step(device, call):
    check(call, "cuda", device)


@few
@given(call=sphere_calls().filter(lambda call: all(t.shape[-1:] <= (16,) for t in call.tensors.values())))
def test_any_sphere_attend_step(device, call):
    check(call, "cuda", device)
