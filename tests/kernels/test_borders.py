"""Claim: what the substeps of a layer hand to each other (``kernels/border.py``) changes no result beyond rounding,
none at all in the interpreter where the arithmetic is the same; it saves the launches that it should, and is left out
where it does not fit."""

import contextlib
import os

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck

import macaron_ops
from macaron_ops import attend_step, ffn_step, normalize_step, parallel, split_layer, substep
from macaron_ops.ops import run
from macaron_ops.ops.registry import BACKWARD, FORWARD
from macaron_ops.reference.norm import normalize
from tests import twins
from tests.rule import assert_by_rule, assert_draws_by_rule

TRITON = macaron_ops.backends()["triton"]
pytestmark = pytest.mark.skipif(not TRITON.usable, reason=f"triton: {TRITON.reason}")
F = 24
FLOAT32, BFLOAT16, FLOAT64 = torch.float32, torch.bfloat16, torch.float64
NORM, HIDDEN, OUT, D_HIDDEN = (
    "norm_forward",
    "hidden_forward_kernel",
    "linear_residual_kernel",
    "hidden_backward_kernel",
)
D_NORM, SUMS, PARTS, CORE = "norm_backward", "sums_kernel", "product_parts_kernel", "attention_forward_kernel"


class Layer:
    """A scheme such as "BAB" with its parameters, drawn in float64 and rounded to ``dtype``."""

    def __init__(self, scheme, width, dtype=FLOAT32, device="cpu", seed=0, dropout=0.0, **options):
        self.generator, self.place = torch.Generator().manual_seed(seed), {"dtype": dtype, "device": device}
        self.x, self.substeps, self.leaves = self.draw(2, 3, width), [], {}
        self.leaves["x"], self.grad = self.x, self.draw(2, 3, width).detach()
        for i, operator in enumerate(scheme):
            self.add(f"{operator}{i}", operator, width, {"dropout": dropout, "seed": 7 + i, **options})

    def draw(self, *shape, scale=1.0, shift=0.0):
        numbers = torch.randn(shape, generator=self.generator, dtype=FLOAT64) * scale + shift
        return numbers.to(**self.place).requires_grad_()

    def add(self, name, operator, width, options):
        inner = 3 * width if operator == "A" else F
        last = width if operator == "A" else inner
        shapes = {"w_in": (inner, width), "b_in": (inner,), "w_out": (width, last), "b_out": (width,)}
        own = {key: self.draw(*shape, scale=shape[-1] ** -0.5) for key, shape in shapes.items()}
        args, kwargs = list(own.values()), dict(options)
        if options.get("norm", "layer") is not None:
            own["norm_weight"], own["norm_bias"] = self.draw(width, shift=1.0), self.draw(width)
            kwargs |= {key: own[key] for key in ("norm_weight", "norm_bias")}
        if operator == "A":
            self.substeps.append((attend_step, [*args, 2 - width % 2], {"causal": True, **kwargs}))
        else:
            self.substeps.append((ffn_step, args, {"activation": "gelu", **kwargs}))
        self.leaves |= {f"{name} {key}": t for key, t in own.items()}

    def ours(self, save="fast"):
        return split_layer(self.x, [substep(f, *args, **kwargs) for f, args, kwargs in self.substeps], save=save)

    def eager(self):
        y = self.x
        for f, args, kwargs in self.substeps:
            y = getattr(twins, f.__name__)(y, *args, **kwargs)
        return y

    def results(self, call, wanted=None):
        y = call()
        leaves = {name: t for name, t in self.leaves.items() if wanted is None or name in wanted}
        return {"y": y.detach(), **dict(zip(leaves, torch.autograd.grad(y, leaves.values(), self.grad), strict=True))}


@contextlib.contextmanager
def closed():
    """Inside, layers are planned with nothing handed over."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "open_borders", lambda steps: (False,) * (len(steps) + 1))
        yield


def same(actual, expected):
    assert actual.keys() == expected.keys()
    assert {name for name in actual if not torch.equal(actual[name], expected[name])} == set()


def autocast(device, on):
    return torch.autocast(torch.device(device).type, dtype=BFLOAT16, enabled=on)


RULE = [
    ("BAB", 40, BFLOAT16, {"dropout": 0.3}),
    ("AB", 151, BFLOAT16, {"norm": "rms"}),
    ("BA", 72, FLOAT32, {"dropout": 0.3}),
    ("AA", 33, FLOAT32, {"norm": "sphere", "residual_scale": -1.5}),
    ("BB", 256, BFLOAT16, {"dropout": 0.3}),
    ("BA", 128, BFLOAT16, {}),
    ("BB", 136, "autocast", {"dropout": 0.3}),
    ("BB", 300, "autocast", {}),
    ("AB", 40, BFLOAT16, {"placement": "post", "dropout": 0.3}),
    ("BB", 136, BFLOAT16, {"norm": None, "dropout": 0.3}),
]


@pytest.mark.parametrize(("scheme", "width", "dtype", "options"), RULE, ids=str)
def test_rule(scheme, width, dtype, options, device):
    save = "lean" if "dropout" in options else "fast"

    def draw(seed):
        def layer(dtype):
            return Layer(scheme, width, dtype, device, seed, **options)

        mixed = dtype == "autocast"
        ours, exact = layer(FLOAT32 if mixed else dtype), layer(FLOAT64)
        for name, t in exact.leaves.items():
            t.data = ours.leaves[name].detach().double()
        exact.grad = ours.grad.double()
        with autocast(device, mixed):
            eager = ours.results(ours.eager)
            with macaron_ops.use_backend("triton"):
                actual = ours.results(lambda: ours.ours(save))
        wanted = exact.results(exact.eager)
        return {name: (actual[name], eager[name], wanted[name]) for name in wanted}

    assert_draws_by_rule(draw)


@pytest.mark.parametrize("save", ["fast", "lean"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(("scheme", "width", "mixed"), [("AB", 40, False), ("BB", 40, True), ("BB", 300, False)])
def test_the_same_bits_without_borders(scheme, width, mixed, dropout, save, device):
    """In float32, and where autocast narrows the operands: what is rounded is rounded in the same places. The norm in a
    product's epilogue adds in another order, which is why these layers have none. A GPU's compiler joins a product and
    a sum where it sees fit, and in a kernel that writes more perhaps others: there `test_rule` has to do."""
    if device.type != "cpu":
        pytest.skip("the bits are the interpreter's")
    layer = Layer(scheme, width, FLOAT32, device, dropout=dropout)
    with macaron_ops.use_backend("triton"), autocast(device, mixed):
        if width == 40:
            layer.x = layer.leaves["x"] = layer.x.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
        with closed():
            expected = layer.results(lambda: layer.ours(save))
        actual = layer.results(lambda: layer.ours(save))
    same(actual, expected)


SUBSETS = [
    *(["x"], ["B1 b_out"], ["A0 b_out"], ["B2 w_in", "A0 b_out"], ["B1 norm_weight", "B1 w_in"], ["B2 b_out"]),
    ["x", "A0 w_out", "B1 b_out", "B2 b_in"],
]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_subsets(dropout, device):
    """Of one plan other gradients are asked for: the same bits as without borders."""
    layer = Layer("ABB", 24, device=device, dropout=dropout)
    for _, _, kwargs in layer.substeps:  # a call with seeds that are numbers is not planned
        kwargs["seed"] = torch.tensor(7, device=device)
    with macaron_ops.use_backend("triton"):
        with closed():
            everything = layer.results(layer.ours)
        run.forget()
        for _ in range(2):
            layer.ours()
        for names in SUBSETS:
            same(layer.results(layer.ours, names), {name: everything[name] for name in ("y", *names)})
    (kept,) = run._remembered.values()
    assert kept.plan.borders == (False, True, True, False)
    run.forget()


def test_replays_compute_with_their_own_numbers(device):
    """A plan's third call and those after it: what is handed over is part of them."""

    def results(seed):
        layer = Layer("AB", 72, device=device, seed=seed, dropout=0.3)
        for _, _, kwargs in layer.substeps:
            kwargs["seed"] = torch.tensor(seed, device=device)
        return layer.results(layer.ours)

    run.forget()
    with macaron_ops.use_backend("triton"):
        again = [results(seed) for seed in (1, 2, 3)]
        (kept,) = run._remembered.values()
        replays = [r for b in kept.plan.backwards for plan in b._plans.values() for r in plan._replays.values()]
        assert len(replays) == 2 and all(replay.__name__ == "replay" for replay in replays)
        for seed, found in zip((1, 2, 3), again, strict=True):
            run.forget()
            same(found, results(seed))


def test_compiles_without_a_graph_break(device):
    torch.compiler.reset()
    layer = Layer("AB", 72, device=device, dropout=0.3)
    with macaron_ops.use_backend("triton"):
        expected = layer.results(layer.ours)
        compiled = torch.compile(layer.ours, fullgraph=True, backend="aot_eager")
        same(layer.results(compiled), expected)


def test_one_graph_for_all_lengths(device):
    counter = CompileCounterWithBackend("aot_eager")
    torch.compiler.reset()
    layer = Layer("AA", 24, device=device)
    steps = [substep(f, *args, **kwargs) for f, args, kwargs in layer.substeps]
    with macaron_ops.use_backend("triton"):
        compiled = torch.compile(lambda x: split_layer(x, steps), fullgraph=True, backend=counter)
        for length in (5, 9, 13):
            x = torch.randn(2, length, 24, device=device)
            torch.testing.assert_close(compiled(x), split_layer(x, steps))
    assert counter.frame_count == 2


@pytest.mark.parametrize("handed", [False, True], ids=["asked", "given"])
@pytest.mark.parametrize("tokens", [0, 3])
@pytest.mark.parametrize("operator", ["ffn_step", "attend_step"])
def test_opcheck(operator, tokens, handed, device):
    """The raw operators with what a neighbour asks for, with what it gave, and with both."""
    layer = Layer("B" if operator == "ffn_step" else "A", 72, device=device, dropout=0.2, seed=3)
    ((f, args, kwargs),) = layer.substeps
    bound = f.bind(torch.randn(1, tokens, 72, device=device), *args, **kwargs)
    inputs = [bound.x.detach(), *(t if t is None else t.detach() for t in bound.tensors)]
    given = torch.randn_like(inputs[0]) if handed else None
    ahead = (given, "layer", 1e-5, torch.randn(72, device=device), None, BFLOAT16)
    utils = ("test_schema", "test_faketensor")
    forward, backward = FORWARD["triton", operator], BACKWARD["triton", operator]
    opcheck(forward, (*inputs, *bound.options, "lean", *ahead), test_utils=utils)
    y, *saved, n = forward(*inputs, *bound.options, "lean", *ahead)
    assert n.shape == (y.shape if tokens else (0,)) and n.dtype == (BFLOAT16 if tokens else FLOAT32)
    needs = [t is not None and t.is_floating_point() for t in inputs]
    dropped = torch.randn(tokens, 72, device=device) if handed else None
    behind = (dropped, torch.tensor(5, device=device), 2, 0.25, 0.5, BFLOAT16, FLOAT32)
    call = (torch.randn_like(y), needs, *inputs, *saved, *bound.options, *behind)
    opcheck(backward, call, test_utils=utils)
    g, by_bias = backward(*call)[-2:]
    assert (tuple(g.shape), tuple(by_bias.shape)) == (((tokens, 72), (72,)) if tokens else ((0,), (0,)))


@pytest.mark.parametrize(
    ("width", "hidden", "dtype"),
    [(150, 24, BFLOAT16), (72, 3000, FLOAT32), (51, 24, BFLOAT16)],
    ids=["tile", "parts", "narrow"],
)
@pytest.mark.parametrize("norm", ["layer", "rms", "sphere"])
def test_the_next_norm_is_that_of_y_as_it_is_rounded(norm, width, hidden, dtype, device):
    """Of the product's own tile, of the pass that adds the parts of a long sum over few rows, and of the narrow FFN."""
    from macaron_ops.kernels import ffn_step as kernels
    from macaron_ops.kernels.border import Ahead

    def draw(*shape):
        return torch.randn(shape, device=device).to(dtype)

    w_in, w_out = draw(hidden, width) / width**0.5, draw(width, hidden) / hidden**0.5
    bound = ffn_step.bind(draw(3, width) + 30, w_in, draw(hidden), w_out, draw(width), activation="gelu")
    weight, bias = draw(width), draw(width)
    ahead = Ahead(None, norm, 1e-5, weight, bias, dtype)
    y, _, n = kernels.forward(bound.x, bound.tensors, bound.options, "none", ahead)
    eager, exact = (normalize(y.to(d), norm, weight.to(d), bias.to(d), 1e-5) for d in (FLOAT32, FLOAT64))
    assert_by_rule(norm, n, eager.to(dtype), exact)


recorded = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1",
    reason="launches are recorded in one thread, a GPU's backward pass is in another",
)


def launches(layer, save="fast", architecture="sm90", mixed=False):
    """``(forward's, backward's)`` kernels by name; nothing is started."""
    from macaron_ops.kernels.device import recording

    found = []
    with macaron_ops.use_backend("triton"), recording(architecture, 132) as launched:
        with autocast("cpu", mixed):
            y = layer.ours(save)
        found.append([launch.kernel.__name__ for launch in launched])
        launched.clear()
        torch.autograd.grad(y, layer.leaves.values(), layer.grad)
        found.append([launch.kernel.__name__ for launch in launched])
    return found


@recorded
def test_forward_launches():
    """A norm in the epilogue for rows of up to 256 channels; the narrow FFN, which normalises itself, asks for none."""
    attention = [OUT, CORE, OUT]
    for width, expected in {
        136: [NORM, HIDDEN, OUT, *attention, HIDDEN, OUT],
        300: [NORM, HIDDEN, OUT, NORM, *attention, NORM, HIDDEN, OUT],
        40: ["narrow_ffn_kernel", *attention, "narrow_ffn_kernel"],
    }.items():
        assert launches(Layer("BAB", width, BFLOAT16))[0] == expected
    twice = launches(Layer("AA", 40, BFLOAT16))[0]
    assert twice == [NORM, *attention, *attention]
    assert launches(Layer("AA", 40, BFLOAT16, placement="post"))[0] == 2 * attention
    assert launches(Layer("AA", 40, BFLOAT16, norm=None))[0] == 2 * attention


@recorded
@pytest.mark.parametrize("width", [136, 300])
def test_backward_launches(width):
    """One row kernel for each substep, none of which reads x for n alone, and with dropout or under autocast one more
    for the layer, where no substep comes after."""
    ffn = [D_HIDDEN, PARTS, OUT, D_NORM, PARTS, SUMS]
    for options, mixed, first in (
        ({}, False, []),
        ({"dropout": 0.3}, False, [D_NORM]),
        ({}, True, [D_NORM]),
    ):
        layer = Layer("BB", width, FLOAT32 if mixed else BFLOAT16, **options)
        assert launches(layer, mixed=mixed)[1] == [*first, *ffn, *ffn]
        lean = launches(layer, "lean", mixed=mixed)[1]
        again = [NORM, HIDDEN, *first, *ffn, NORM, HIDDEN, *ffn]
        assert lean == again
        with closed():
            apart = launches(layer, mixed=mixed)[1]
        assert apart == 2 * [*first, *ffn]


@recorded
def test_what_is_not_handed_over():
    """Where the one after normalises its output or nothing, there is no row kernel to be part of; where two read the
    same input, their gradients are added first; where a substep's own sum takes the place, it is not handed over."""

    def count(steps):
        layer = Layer("BBB", 136, BFLOAT16, dropout=0.3)
        layer.ours = lambda save: split_layer(layer.x, steps(layer), save=save)
        return launches(layer)[1].count(D_NORM)

    def changed(i, **options):
        def steps(layer):
            layer.substeps[i][2].update(options)
            return [substep(f, *args, **kwargs) for f, args, kwargs in layer.substeps]

        return steps

    def grouped(layer):
        a, b, c = (substep(f, *args, **kwargs) for f, args, kwargs in layer.substeps)
        return [a, parallel(b, c)]

    assert count(changed(0)) == 4
    assert count(changed(2, dropout=0.0)) == 4  # its own sum is in its last row kernel
    assert count(changed(1, dropout=0.0)) == 5  # it begins with no row kernel, and its last one has its own sum
    assert count(grouped) == 6


def test_other_backends_in_between(device):
    """A substep that runs elsewhere hands nothing over and gets nothing, and steps of other kinds neither."""
    layer = Layer("BAB", 72, device=device, dropout=0.3)
    u, scale = layer.draw(2, 3, 72), layer.draw(72)
    layer.leaves |= {"u": u, "scale": scale}
    layer.substeps.insert(2, (normalize_step, [u, scale], {"direction": "difference"}))
    before = run.select

    def results(elsewhere):
        with pytest.MonkeyPatch.context() as patch, macaron_ops.use_backend("triton"):
            patch.setattr(run, "select", lambda r: "reference" if r.operator in elsewhere else before(r))
            return layer.results(layer.ours)

    for elsewhere in ((), ("attend_step",), ("ffn_step", "normalize_step")):
        found = results(elsewhere)
        with closed():
            same(found, results(elsewhere)) if elsewhere else None
        for name, t in results(("ffn_step", "attend_step", "normalize_step")).items():
            torch.testing.assert_close(found[name], t, rtol=1e-3, atol=1e-4)


@pytest.mark.gpu
def test_cuda_graph_capture():
    """A layer's two passes replay inside a CUDA graph."""
    layer = Layer("BAB", 136, device="cuda", dropout=0.3)
    for _, _, kwargs in layer.substeps:
        kwargs["seed"] = torch.tensor(7, device="cuda")
    with macaron_ops.use_backend("triton"):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            expected = layer.results(layer.ours)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = layer.results(layer.ours)
        for t in captured.values():
            t.zero_()
        graph.replay()
        same(captured, expected)
