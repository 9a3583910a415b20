"""Claim: SplitLayer of every scheme is its substeps written out by hand, at the same number of matrix parameters, as
one autograd node that keeps what its memory policy says."""

import pytest
import torch

import macaron_ops
from macaron_ops.nn import AttendStep, SplitLayer
from macaron_ops.splitting import CATALOGUE, Splitting, integrate
from tests import twins
from tests.nn.tools import kept_bytes, output_and_grads, randomize, twin

D, H, F = 8, 4, 24
SCHEMES = {name: scheme for name, scheme in CATALOGUE.items() if scheme.is_real and not scheme.has_commutator}
COMPOSITIONS = {name: scheme for name, scheme in SCHEMES.items() if isinstance(scheme, Splitting)}
SUMS = {name: scheme for name, scheme in SCHEMES.items() if name not in COMPOSITIONS}


def sizes(name):
    """(D, H, F) that every scheme can divide among its stages."""
    a, b = SCHEMES[name].cost()
    return 4 * a, 2 * a, 6 * b


def step(stage, x, c, placement, attn_mask=None):
    """One stage in plain torch, with its parameters."""
    norm = {"norm_weight": stage.norm.weight, "norm_bias": stage.norm.bias, "step": c, "placement": placement}
    if isinstance(stage, AttendStep):
        matrices = (stage.in_proj.weight, stage.in_proj.bias, stage.out_proj.weight, stage.out_proj.bias)
        return twins.attend_step(x, *matrices, stage.num_heads, attn_mask=attn_mask, **norm)
    linears = (stage.linear1.weight, stage.linear1.bias, stage.linear2.weight, stage.linear2.bias)
    return twins.ffn_step(x, *linears, activation="gelu", **norm)


@pytest.mark.parametrize("placement", ["pre", "post"])
@pytest.mark.parametrize("name", COMPOSITIONS)
def test_compositions(name, placement, device):
    build = {"activation": "gelu", "placement": placement, "dtype": torch.float64, "device": device}
    layer = randomize(SplitLayer(*sizes(name), scheme=name, **build))
    x = torch.randn(2, 5, sizes(name)[0], dtype=torch.float64, device=device, requires_grad=True)
    future = torch.ones(5, 5, dtype=torch.bool, device=device).triu(1)
    y = x
    for stage, (operator, c) in zip(layer.stages, COMPOSITIONS[name].stages, strict=True):
        assert isinstance(stage, AttendStep) == (operator == "A")
        y = step(stage, y, c, placement, future)
    z = layer(x, causal=True)
    torch.testing.assert_close(z, y)
    wanted = [x, *layer.parameters()]
    torch.testing.assert_close(
        torch.autograd.grad(z.square().sum(), wanted), torch.autograd.grad(y.square().sum(), wanted)
    )


@pytest.mark.parametrize("name", SUMS)
def test_sums(name):
    layer = randomize(SplitLayer(*sizes(name), scheme=name, activation="gelu", dtype=torch.float64))
    x = torch.randn(2, 5, sizes(name)[0], dtype=torch.float64, requires_grad=True)
    stages = iter(layer.stages)
    y = 0
    for weight, term in SUMS[name].terms:
        z = x
        for operator, c in term:
            stage = next(stages)
            assert isinstance(stage, AttendStep) == (operator == "A")
            z = step(stage, z, c, "pre")
        y = y + weight * z
    assert next(stages, None) is None
    z = layer(x)
    torch.testing.assert_close(z, y)
    wanted = [x, *layer.parameters()]
    torch.testing.assert_close(
        torch.autograd.grad(z.square().sum(), wanted), torch.autograd.grad(y.square().sum(), wanted)
    )


@pytest.mark.parametrize("name", SCHEMES)
def test_shared_parameters_make_a_step_of_the_scheme(name):
    """Against ``integrate`` with the fields of the two modules, gradients too."""
    layer = randomize(SplitLayer(D, H, F, scheme=name, shared=True, step=0.3, activation="gelu", dtype=torch.float64))
    x = torch.randn(2, 5, D, dtype=torch.float64, requires_grad=True)
    attend, ffn = layer.stages
    fields = {"A": lambda x: step(attend, x, 1.0, "pre") - x, "B": lambda x: step(ffn, x, 1.0, "pre") - x}
    y, z = integrate(fields, x, 0.0, 0.3, 1, name, substep="euler"), layer(x)
    torch.testing.assert_close(z, y)
    wanted = [x, *layer.parameters()]
    torch.testing.assert_close(
        torch.autograd.grad(z.square().sum(), wanted), torch.autograd.grad(y.square().sum(), wanted)
    )


def test_a_scheme_of_ones_own():
    """Any table: three stages of B, one of them backwards, and one of A that does nothing."""
    scheme = Splitting("own", 1, (("B", 0.7), ("A", 1.0), ("B", -0.2), ("A", 0.0), ("B", 0.5)), "this test")
    layer = randomize(SplitLayer(D, H, F, scheme=scheme, activation="gelu", dtype=torch.float64))
    y = x = torch.randn(2, 5, D, dtype=torch.float64)
    for stage, (_, c) in zip(layer.stages, scheme.stages, strict=True):
        y = step(stage, y, c, "pre")
    torch.testing.assert_close(layer(x), y)


@pytest.mark.parametrize("name", SCHEMES)
def test_parameter_parity(name):
    d, h, f = sizes(name)
    matrices = [
        sum(p.numel() for p in SplitLayer(d, h, f, scheme=name, shared=shared).parameters() if p.dim() > 1)
        for shared in (False, True)
    ]
    assert matrices == [4 * d * d + 2 * d * f] * 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", ["lie_trotter_AB", "lie_trotter_BA", "strang_BAB", "strang_ABA", "parallel"])
def test_lean_equals_fast_and_keeps_less(name, dtype):
    build = {"scheme": name, "activation": "gelu", "dtype": dtype}
    fast = randomize(SplitLayer(32, H, 128, save="fast", **build))
    lean = twin(SplitLayer(32, H, 128, save="lean", **build), fast)
    x = torch.randn(2, 16, 32, dtype=dtype, requires_grad=True)
    results = [output_and_grads(layer, x) for layer in (lean, fast)]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    hidden_and_qkv = x.numel() * x.element_size() * (4 + 3)

    def saving():
        kept = [kept_bytes(lambda layer=layer: layer(x)) for layer in (lean, fast)]
        return kept[1] - kept[0]

    assert saving() >= hidden_and_qkv  # a kernel's fast may keep more, statistics of rows for one
    with macaron_ops.use_backend("reference"):
        assert saving() == hidden_and_qkv


def test_one_autograd_node():
    layer = SplitLayer(D, H, F)
    x = torch.randn(2, 5, D, requires_grad=True)
    y = layer(x)
    inputs = [node for node, _ in y.grad_fn.next_functions if node is not None]
    assert {type(node).__name__ for node in inputs} == {"AccumulateGrad"}


def test_dropout_seeds():
    layer = SplitLayer(D, H, F, dropout=0.3, attention_dropout=0.3, activation_dropout=0.3)
    x = torch.randn(2, 5, D)
    assert torch.equal(layer(x, seed=5), layer(x, seed=5))
    y = x
    for i, stage in enumerate(layer.stages):
        y = stage(y, seed=5 + i)
    torch.testing.assert_close(layer(x, seed=5), y)
    layer.eval()
    assert torch.equal(layer(x, seed=5), layer(x))


@pytest.mark.parametrize(("name", "shared"), [("strang_ABA", False), ("parallel", False), ("sws", True)])
def test_compiles_as_one_graph(name, shared):
    layer = randomize(SplitLayer(D, H, F, scheme=name, shared=shared, dtype=torch.float64))
    x = torch.randn(2, 5, D, dtype=torch.float64, requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(output_and_grads(compiled, x), output_and_grads(layer, x))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scheme": "strang"}, "scheme: expected one of 'lie_trotter_AB', .*; got 'strang'"),
        ({"scheme": None}, "scheme: expected one of"),
        ({"scheme": ["a"]}, r"scheme: expected one of .*; got \['a'\]"),
        ({"nhead": 3}, "nhead: expected a divisor of d_model = 8; got 3"),
        (
            {"nhead": 1, "scheme": "strang_ABA"},
            "nhead: expected a multiple of 2, .* A stages of 'strang_ABA'; got 1 .with shared=True",
        ),
        ({"dim_feedforward": 25}, "dim_feedforward: expected a multiple of 2, .* B stages of 'strang_BAB'; got 25"),
        ({"scheme": "parallel", "placement": "post"}, "placement: expected 'pre' for the scheme 'parallel'"),
        ({"scheme": "sws", "placement": "post"}, "placement: expected 'pre' for the scheme 'sws'"),
        ({"scheme": "complex3_strang2"}, "scheme: expected .* got 'complex3_strang2', which has complex coefficients"),
        ({"scheme": "chin4A"}, "scheme: expected .* got 'chin4A', which has a commutator of the fields"),
        ({"scheme": "sws", "nhead": 1}, "nhead: expected a multiple of 2, .* A stages of 'sws'; got 1"),
        ({"dropout": 1.2}, "dropout: expected a probability"),
        ({"save": "slow"}, "save: expected one of"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        SplitLayer(**{"d_model": D, "nhead": H, "dim_feedforward": F, **arguments})


def test_a_seed_is_an_integer():
    layer, x = SplitLayer(D, H, F, dropout=0.5), torch.randn(2, 5, D)
    assert torch.equal(layer(x, seed=torch.tensor(3)), layer(x, seed=3))
    with pytest.raises(TypeError, match="seed: expected an int, an int64 tensor .*; got 'a'"):
        layer(x, seed="a")
