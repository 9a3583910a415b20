"""Claim: a list of substeps is ONE autograd node that computes what the operators compute one by one, and saves only
what its policy says."""

import pytest
import torch

import macaron_ops
from macaron_ops import attend_step, ffn_step, normalize_step, parallel, split_layer, substep

D, HIDDEN, HEADS = 12, 20, 3


@pytest.fixture
def parameters():
    def leaf(*shape):
        return (torch.randn(*shape, dtype=torch.float64) / shape[-1] ** 0.5).requires_grad_()

    return {
        "first": [leaf(HIDDEN, D), leaf(HIDDEN), leaf(D, HIDDEN), leaf(D)],
        "attention": [leaf(3 * D, D), leaf(3 * D), leaf(D, D), leaf(D)],
        "second": [leaf(HIDDEN, D), leaf(HIDDEN), leaf(D, HIDDEN), leaf(D)],
    }


def leaves(parameters):
    return [p for group in parameters.values() for p in group]


def strang(p, **options):
    return [
        substep(ffn_step, *p["first"], **options),
        substep(attend_step, *p["attention"], HEADS, causal=True, **options),
        substep(ffn_step, *p["second"], activation="gelu", **options),
    ]


def one_by_one(x, p):
    x = ffn_step(x, *p["first"])
    x = attend_step(x, *p["attention"], HEADS, causal=True)
    return ffn_step(x, *p["second"], activation="gelu")


def value_and_grads(function, x, p):
    y = function(x)
    grad = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    return [y, *torch.autograd.grad(y, [x, *leaves(p)], grad)]


@pytest.fixture
def x():
    return torch.randn(2, 5, D, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("save", ["fast", "lean"])
def test_equals_the_operators_one_by_one(x, parameters, save):
    actual = value_and_grads(lambda x: split_layer(x, strang(parameters), save=save), x, parameters)
    expected = value_and_grads(lambda x: one_by_one(x, parameters), x, parameters)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("save", ["fast", "lean"])
def test_parallel_adds_the_increments(x, parameters, save):
    both = parallel(*strang(parameters)[:2])
    tail = strang(parameters)[2]

    def expected(x):
        a = ffn_step(x, *parameters["first"])
        b = attend_step(x, *parameters["attention"], HEADS, causal=True)
        y = x + (a - x) + (b - x)
        return ffn_step(y, *parameters["second"], activation="gelu")

    torch.testing.assert_close(
        value_and_grads(lambda x: split_layer(x, [both, tail], save=save), x, parameters),
        value_and_grads(expected, x, parameters),
    )


def test_one_autograd_node(x, parameters):
    y = split_layer(x, strang(parameters))
    targets = [node for node, _ in y.grad_fn.next_functions if node is not None]
    assert all(type(node).__name__ == "AccumulateGrad" for node in targets)
    assert len(targets) == 13


def test_shared_parameters_and_context(x, parameters):
    """A tensor that appears in several substeps gets the sum of its gradients."""
    p = parameters
    context = torch.randn(2, 4, D, dtype=torch.float64, requires_grad=True)
    steps = [substep(ffn_step, *p["first"])] * 2 + [substep(attend_step, *p["attention"], HEADS, context=context)] * 2

    def chained(x):
        x = ffn_step(ffn_step(x, *p["first"]), *p["first"])
        for _ in range(2):
            x = attend_step(x, *p["attention"], HEADS, context=context)
        return x

    for function in (
        lambda x: split_layer(x, steps),
        torch.compile(lambda x: split_layer(x, steps), backend="aot_eager"),
    ):
        y, expected = function(x), chained(x)
        torch.testing.assert_close(y, expected)
        wanted = [x, context, *p["first"], *p["attention"]]
        torch.testing.assert_close(
            torch.autograd.grad(y.square().sum(), wanted), torch.autograd.grad(expected.square().sum(), wanted)
        )


def test_x_as_its_own_context(x, parameters):
    p = parameters["attention"]
    y = split_layer(x, [substep(attend_step, *p, HEADS, norm=None, context=x)])
    expected = attend_step(x, *p, HEADS, norm=None)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(
        torch.autograd.grad(y.square().sum(), x), torch.autograd.grad(expected.square().sum(), x)
    )


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("save", ["fast", "lean"])
def test_a_retained_graph_is_run_again(parameters, save, backend):
    """What a step kept goes when it has run backward, and only where the graph goes."""
    status = macaron_ops.backends()[backend]
    if not status.usable:
        pytest.skip(status.reason)
    p = {name: [t.detach().float().requires_grad_() for t in group] for name, group in parameters.items()}
    x = torch.randn(2, 5, D, requires_grad=True)
    with macaron_ops.use_backend(backend):
        for _ in range(3):  # the third by a plan
            y = split_layer(x, strang(p), save=save)
            first, second = (torch.autograd.grad(y.sum(), [x, *leaves(p)], retain_graph=True) for _ in range(2))
            last = torch.autograd.grad(y.sum(), [x, *leaves(p)])
            assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(first, second, last, strict=True))
            with pytest.raises(RuntimeError, match="second time"):
                torch.autograd.grad(y.sum(), x)


def test_differentiable_twice(x, parameters):
    x = x[:1, :2].detach().requires_grad_()
    weight = parameters["first"][0]
    assert torch.autograd.gradgradcheck(lambda x: split_layer(x, strang(parameters)), (x,), fast_mode=True)
    p = {**parameters}

    def in_weight(w):
        p["first"] = [w, *parameters["first"][1:]]
        return split_layer(x, strang(p), save="lean")

    assert torch.autograd.gradgradcheck(in_weight, (weight,), fast_mode=True)


def test_second_derivatives_where_inputs_depend_on_each_other(x, parameters):
    """Weights shared by two layers, and a context computed from x: each path counts once."""
    p = parameters
    x = x[:1, :2].detach().requires_grad_()

    def shared(x):
        layer = [substep(ffn_step, *p["first"], activation="gelu")]
        return split_layer(split_layer(x, layer), layer)

    def own_context(x):
        return split_layer(x, [substep(attend_step, *p["attention"], HEADS, context=(2 * x).sin())])

    for function in (shared, own_context):
        wanted = [x, *(t for t in leaves(p) if t is not p["second"][0])]
        plain = torch.autograd.grad(function(x).square().sum(), wanted, allow_unused=True)
        graph = torch.autograd.grad(function(x).square().sum(), wanted, allow_unused=True, create_graph=True)
        torch.testing.assert_close(
            [g for g in graph if g is not None], [g for g in plain if g is not None], msg=function.__name__
        )
        assert torch.autograd.gradgradcheck(function, (x,), fast_mode=True)


def test_nothing_is_computed_below_the_first_trained_substep(parameters, monkeypatch):
    """With x and the first two substeps frozen, only the last one runs backward, and without an input gradient."""
    from macaron_ops.ops import run

    calls = []
    original = dict(run.BACKWARD)
    monkeypatch.setattr(
        run,
        "BACKWARD",
        {key: lambda *a, op=op: calls.append(a[1][0]) or op(*a) for key, op in original.items()},
    )
    for name in ("first", "attention"):
        for p in parameters[name]:
            p.requires_grad_(False)
    x = torch.randn(2, 5, D, dtype=torch.float64)
    split_layer(x, strang(parameters)).sum().backward()
    assert calls == [False]
    calls.clear()
    ffn, attention, trained = strang(parameters)
    split_layer(x, [ffn, parallel(attention, trained)]).sum().backward()
    assert calls == [False]


def saved_bytes(function, excluded):
    """Bytes that autograd holds between forward and backward, the inputs and parameters left out."""
    sizes = {}

    def pack(t):
        if all(t.untyped_storage().data_ptr() != e.untyped_storage().data_ptr() for e in excluded):
            sizes[t.untyped_storage().data_ptr()] = t.numel() * t.element_size()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = function()
    return sum(sizes.values()), y


def test_memory_policies(x, parameters):
    """lean keeps substep inputs and the attention output; fast also pre-activations and projections."""
    excluded = [x, *leaves(parameters)]
    tokens, width = 10, x.element_size()
    lean, _y = saved_bytes(lambda: split_layer(x, strang(parameters), save="lean"), excluded)
    assert lean == tokens * (2 * D + D) * width
    fast, _y = saved_bytes(lambda: split_layer(x, strang(parameters), save="fast"), excluded)
    assert fast == lean + tokens * (2 * HIDDEN + 3 * D) * width
    for p in parameters["first"] + parameters["attention"]:
        p.requires_grad_(False)
    frozen, _y = saved_bytes(lambda: split_layer(x.detach(), strang(parameters), save="fast"), excluded)
    assert frozen == tokens * (D + HIDDEN) * width  # the last substep's input and pre-activations
    with torch.no_grad():
        none, _y = saved_bytes(lambda: split_layer(x, strang(parameters)), excluded)
    assert none == 0


@pytest.mark.parametrize("stream", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("save", ["fast", "lean"])
def test_autocast_is_that_of_an_eager_layer(parameters, stream, save):
    """The products' parameters are cast as ``F.linear`` casts them, x and y keep the dtype of the residual stream."""
    p = {name: [t.detach().float().requires_grad_() for t in group] for name, group in parameters.items()}
    x = torch.randn(2, 5, D, dtype=stream, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = split_layer(x, strang(p), save=save)
        eager = x + torch.nn.functional.linear(x, torch.ones(D, D))
        assert y.dtype == eager.dtype == stream
        sphere = macaron_ops.sphere_attend_step(x, torch.tensor(0.1), 1.0, query=eager.bfloat16())
        assert sphere.dtype == stream
    y.sum().backward()
    assert all(t.grad.dtype == t.dtype for t in [x, *leaves(p)])
    rounded = {name: [t.detach().bfloat16().to(stream) for t in group] for name, group in p.items()}
    with macaron_ops.use_backend("reference"):  # which rounds no operand but the parameters
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = split_layer(x, strang(p), save=save)
        torch.testing.assert_close(y, split_layer(x.detach(), strang(rounded)), rtol=0, atol=0)


def test_autocast_saves_activations_in_its_dtype(parameters):
    p = {name: [t.detach().float().requires_grad_() for t in group] for name, group in parameters.items()}
    x = torch.randn(2, 5, D, requires_grad=True)
    kept = []
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append((t.shape[-1], t.dtype)) or t, lambda t: t):
            split_layer(x, strang(p))
    assert (HIDDEN, torch.bfloat16) in kept and (3 * D, torch.bfloat16) in kept
    assert (HIDDEN, torch.float32) not in kept and (3 * D, torch.float32) not in kept


def test_second_derivatives_do_not_hear_of_autocast(x, parameters):
    y = split_layer(x.float(), strang({n: [t.float() for t in group] for n, group in parameters.items()}))
    plain = torch.autograd.grad(y.sum(), x, retain_graph=True)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        graph = torch.autograd.grad(y.sum(), x, create_graph=True)[0]
    torch.testing.assert_close(graph.float(), plain.float())


def test_float32_norm_parameters_beside_a_narrower_x(parameters):
    """Mixed models keep their norms in float32; under autocast they are not rounded either."""
    weights = [t.detach().bfloat16() for t in parameters["first"]]
    x, norm_weight = torch.randn(4, D, dtype=torch.bfloat16), (1 + 1e-3 * torch.randn(D)).requires_grad_()
    assert (
        torch.autograd.grad(ffn_step(x, *weights, norm_weight=norm_weight).sum(), norm_weight)[0].dtype == torch.float32
    )
    with macaron_ops.use_backend("reference"):  # which rounds no operand of the products
        expected = ffn_step(x.float(), *(w.float() for w in weights), norm_weight=norm_weight).bfloat16()
        assert torch.equal(ffn_step(x, *weights, norm_weight=norm_weight), expected)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(ffn_step(x, *weights, norm_weight=norm_weight), expected)


def test_function_transforms_and_forward_mode(x, parameters):
    """They go through the definition: torch's rule for a custom node would give tangents of zero."""
    steps = strang({n: [t.detach() for t in group] for n, group in parameters.items()})
    x, v = x[:, :2].detach(), torch.randn(2, 2, D, dtype=torch.float64)

    def layer(x):
        return split_layer(x, steps)

    h = 1e-6
    difference = (layer(x + h * v) - layer(x - h * v)) / (2 * h)
    torch.testing.assert_close(torch.func.jvp(layer, (x,), (v,))[1], difference, rtol=1e-6, atol=1e-8)
    with torch.autograd.forward_ad.dual_level():
        dual = layer(torch.autograd.forward_ad.make_dual(x, v))
        tangent = torch.autograd.forward_ad.unpack_dual(dual).tangent
    torch.testing.assert_close(tangent, difference, rtol=1e-6, atol=1e-8)
    leaf = x.clone().requires_grad_()
    expected = torch.autograd.grad(layer(leaf).square().sum(), leaf)[0]
    torch.testing.assert_close(torch.func.grad(lambda x: layer(x).square().sum())(x), expected)
    torch.testing.assert_close(torch.vmap(layer)(x), layer(x))


def test_substeps_of_a_layer_draw_different_masks(parameters):
    """One seed a layer, a stream a substep: two equal FFN substeps with dropout of half their outputs differ."""
    p = parameters["first"]
    half = substep(ffn_step, *p, norm=None, step=1.0, residual_scale=0.0, dropout=0.5)
    x = torch.randn(2, 50, D, dtype=torch.float64)
    y = split_layer(x, [half, half])
    assert 0.15 < (y == 0).double().mean() < 0.85
    once = split_layer(x, [half])
    assert (once == 0).ne(y == 0).any()


def test_dropout_seeds_repeat(x, parameters):
    def layer(seed=None):
        return split_layer(x, strang(parameters, dropout=0.4, seed=seed))

    assert torch.equal(layer(3), layer(3))
    assert torch.equal(layer(3), layer(torch.tensor(3)))
    assert not torch.equal(layer(3), layer(4))
    torch.manual_seed(5)
    a, b = layer(), layer()
    assert not torch.equal(a, b)
    torch.manual_seed(5)
    assert torch.equal(a, layer())


def test_dropout_backward_uses_the_mask_of_the_forward_pass(x, parameters):
    x = x[:1, :3].detach().requires_grad_()
    options = dict(dropout=0.3, seed=9)
    for save in ("fast", "lean"):
        assert torch.autograd.gradcheck(lambda x, s=save: split_layer(x, strang(parameters, **options), save=s), (x,))


def test_checkpointing_draws_the_same_masks(x, parameters):
    def layer(x):
        return split_layer(x, strang(parameters, dropout=0.4))

    torch.manual_seed(1)
    plain = torch.autograd.grad(layer(x).sum(), x)[0]
    torch.manual_seed(1)
    y = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], plain)


def test_refusals(x, parameters):
    good = strang(parameters)
    with pytest.raises(ValueError, match="substeps: expected at least one"):
        split_layer(x, [])
    with pytest.raises(TypeError, match=r"substeps\[1\]: expected a Substep or Parallel; got function"):
        split_layer(x, [good[0], lambda x: x])
    with pytest.raises(ValueError, match="save: expected one of 'fast', 'lean'; got 'all'"):
        split_layer(x, good, save="all")
    with pytest.raises(TypeError, match="save: expected as argument of split_layer"):
        substep(ffn_step, save="lean")
    with pytest.raises(TypeError, match="operator: expected an operator"):
        substep(torch.relu)
    with pytest.raises(ValueError, match="substeps: expected at least two; got 1"):
        parallel(good[0])
    with pytest.raises(TypeError, match=r"substeps\[1\]: expected a Substep; got int"):
        parallel(good[0], 3)
    with pytest.raises(ValueError, match=r"substeps\[0\]: expected residual_scale 1; got 2.0"):
        parallel(substep(ffn_step, *parameters["first"], residual_scale=2.0), good[1])
    with pytest.raises(ValueError, match=r"substeps\[1\]: expected placement 'pre'"):
        parallel(good[0], substep(attend_step, *parameters["attention"], HEADS, placement="post"))
    with pytest.raises(ValueError, match=r"substeps\[0\]: expected ffn_step or attend_step"):
        parallel(substep(normalize_step, x, 0.1), good[0])
