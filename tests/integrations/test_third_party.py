"""Claim: layers of torchaudio, SpeechBrain, ESPnet, NeMo and lucidrains, where they are installed, compute replaced
what they compute themselves. None of them is a dependency: without the package its tests skip."""

import copy

import pytest
import torch
from torch import nn

import macaron_ops
from tests.integrations.compare import assert_same_function, loss_and_grads, same_state
from tests.rule import assert_draws_by_rule

D = 12


def torchaudio(**options) -> tuple[nn.Module, tuple]:
    module = pytest.importorskip("torchaudio.models.conformer")
    layer = module.ConformerLayer(D, 20, 3, 3, **options)
    return layer, (torch.randn(7, 2, D), torch.tensor([[False] * 7, [False] * 4 + [True] * 3]))


def speechbrain(**options) -> tuple[nn.Module, tuple]:
    module = pytest.importorskip("speechbrain.lobes.models.transformer.Conformer")
    layer = module.ConformerEncoderLayer(D, 20, 3, 3, attention_type="regularMHA", **options)
    padding = torch.tensor([[False] * 7, [False] * 4 + [True] * 3])
    return layer, (torch.randn(2, 7, D), None, padding)


def lucidrains(**options) -> tuple[nn.Module, tuple]:
    module = pytest.importorskip("conformer.conformer")
    layer = module.ConformerBlock(dim=D, dim_head=4, heads=3, ff_mult=2, conv_kernel_size=3, **options)
    return layer, (torch.randn(2, 7, D),)


def espnet(relative: bool = False, branches: bool = False, **options) -> tuple[nn.Module, tuple]:
    """A layer of a Conformer's or E-Branchformer's encoder, with its masks and positions."""
    module = pytest.importorskip("espnet.nets.pytorch_backend.conformer.encoder_layer")
    attention = pytest.importorskip("espnet.nets.pytorch_backend.transformer.attention")
    from espnet.nets.pytorch_backend.conformer.convolution import ConvolutionModule
    from espnet.nets.pytorch_backend.conformer.swish import Swish
    from espnet.nets.pytorch_backend.transformer.positionwise_feed_forward import PositionwiseFeedForward

    kind = "RelPositionMultiHeadedAttention" if relative else "MultiHeadedAttention"
    attend = getattr(attention, kind)(3, D, 0.0)
    ffns = [PositionwiseFeedForward(D, 20, 0.0, options.get("activation", Swish())) for _ in range(2)]
    if branches:
        branchformer = pytest.importorskip("espnet2.asr.encoder.e_branchformer_encoder")
        cgmlp = branchformer.ConvolutionalGatingMLP(D, 16, 3, 0.0, False, "identity")
        layer = branchformer.EBranchformerEncoderLayer(D, attend, cgmlp, *ffns, 0.0)
    else:
        others = {name: value for name, value in options.items() if name != "activation"}
        layer = module.EncoderLayer(D, attend, *ffns, ConvolutionModule(D, 3, Swish()), 0.0, **others)
    mask = torch.tensor([[[True] * 7], [[True] * 4 + [False] * 3]])
    x = torch.randn(2, 7, D)
    return layer, ((x, torch.randn(1, 13, D)) if relative else x, mask)


def nemo(**options) -> tuple[nn.Module, tuple]:
    module = pytest.importorskip("nemo.collections.asr.parts.submodules.conformer_modules")
    layer = module.ConformerLayer(D, 20, n_heads=3, conv_kernel_size=3, dropout=0.0, dropout_att=0.0, **options)
    padding = torch.tensor([[False] * 7, [False] * 4 + [True] * 3])
    attend = padding[:, None, :] | padding[:, :, None]
    positions = torch.randn(1, 13, D) if layer.self_attention_model == "rel_pos" else None
    return layer, (torch.randn(2, 7, D), attend, positions, padding)


def x_transformers(**options) -> tuple[nn.Module, tuple]:
    package = pytest.importorskip("x_transformers")
    encoder = package.Encoder(dim=D, depth=1, heads=3, attn_dim_head=4, macaron=True, **options)
    return encoder, (torch.randn(2, 7, D),)


MAKERS = {
    "espnet": espnet,
    "espnet, relative positions": lambda **o: espnet(relative=True, **o),
    "espnet, branches": lambda **o: espnet(branches=True, **o),
    "espnet, branches, relative positions": lambda **o: espnet(branches=True, relative=True, **o),
    "nemo": nemo,
    "nemo, no relative positions": lambda **o: nemo(self_attention_model="abs_pos", use_bias=False, **o),
    "x-transformers": x_transformers,
    "torchaudio": torchaudio,
    "torchaudio, convolution first": lambda **o: torchaudio(convolution_first=True, use_group_norm=True, **o),
    "speechbrain": speechbrain,
    "lucidrains": lucidrains,
}


def made(name: str, dtype: torch.dtype, **options) -> tuple[nn.Module, callable]:
    layer, inputs = MAKERS[name](**options)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter)).copy_(parameter.bfloat16())

    def call(module: nn.Module):
        kind = next(module.parameters()).dtype

        def moved(value):
            if isinstance(value, tuple):
                return tuple(map(moved, value))
            return value.to(kind) if torch.is_tensor(value) and value.is_floating_point() else value

        y = module(*moved(inputs))
        while isinstance(y, tuple):
            y = y[0]
        return y

    return layer.to(dtype), call


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", MAKERS)
def test_the_same_function(name, train):
    layer, call = made(name, torch.float64)
    layer.train(train)
    twin = copy.deepcopy(layer)
    state, before = same_state(twin), call(layer)
    replaced = macaron_ops.replace_layers(twin, strict=True).replaced
    assert len(replaced) == (2 if name == "x-transformers" else 1) and same_state(twin) == state
    assert all(entry.after == f"Fused{type(layer.get_submodule(entry.name)).__name__}" for entry in replaced)
    assert_same_function(layer, twin, call)
    layer.load_state_dict(twin.state_dict())
    macaron_ops.restore_layers(twin)
    assert type(twin) is type(layer) and same_state(twin) == state
    assert train or torch.equal(call(twin), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MAKERS)
def test_narrow_dtypes_keep_the_rule(name, dtype):
    def draw(seed):
        torch.manual_seed(seed)
        layer, call = made(name, dtype)
        layer.eval()
        twin, truth = copy.deepcopy(layer), copy.deepcopy(layer).double()
        macaron_ops.replace_layers(twin, strict=True)
        found = [{"y": y, **grads} for y, grads in (loss_and_grads(m, call) for m in (twin, layer, truth))]
        nothing = {n for n, g in found[2].items() if g.abs().max() < 1e-12}  # what only rounding fills
        return {n: tuple(f[n] for f in found) for n in found[0] if n not in nothing}

    assert_draws_by_rule(draw)


@pytest.mark.parametrize("name", MAKERS)
def test_every_read_dropout_is_where_it_was(name):
    layer, call = made(name, torch.float64)
    layer.train()
    macaron_ops.replace_layers(layer, strict=True)
    fused = [m for m in layer.modules() if hasattr(m, "replaced_class")]
    dropouts = [m.get_submodule(part.path) for m in fused for part in m.parts if part.cls is nn.Dropout]
    assert len(dropouts) == {"torchaudio": 5, "espnet": 3, "nemo": 3, "x-transformers": 2}.get(
        name.partition(",")[0], 4
    )
    macaron_ops.restore_layers(layer)
    for dropout in dropouts:
        dropout.p = 1.0
        expected = call(layer)
        macaron_ops.replace_layers(layer)
        torch.testing.assert_close(call(layer), expected)
        macaron_ops.restore_layers(layer)
        dropout.p = 0.0


def test_dropout_of_torchaudios_attention_weights_is_where_it_was():
    layer, call = made("torchaudio", torch.float64)
    layer.self_attn.dropout = 1.0  # no token is attended to, and no number is random
    expected = call(layer.train())
    macaron_ops.replace_layers(layer, strict=True)
    torch.testing.assert_close(call(layer), expected)
    assert not torch.allclose(call(layer.eval()), expected)


def test_another_activation_is_left():
    layer, _ = speechbrain(activation=nn.GELU)
    (left,) = macaron_ops.replace_layers(layer).left
    assert left.reason.startswith("ffn_module1.1.ffn.1 is a torch.nn.GELU, not ")
    layer, _ = speechbrain()
    layer.ffn_module2[1].ffn[1].beta = 2.0
    (left,) = macaron_ops.replace_layers(layer).left
    assert left.reason == "ffn_module2 has a Swish with beta = 2.0, which is not fused"


@pytest.mark.parametrize(
    ("make", "options", "reason"),
    [
        (espnet, {"normalize_before": False}, "normalize_before is False: a norm after the residual sum is not fused"),
        (espnet, {"concat_after": True}, "concat_after: attention that is concatenated with its input is not known"),
        (espnet, {"stochastic_depth_rate": 0.1}, "stochastic_depth_rate = 0.1: layers that are skipped at random are "),
        (espnet, {"activation": nn.ReLU()}, "feed_forward_macaron.activation is a torch.nn.ReLU, not "),
        (x_transformers, {"ff_glu": True}, "ff.0 is a x_transformers.x_transformers.GLU, not "),
        (x_transformers, {"ff_post_act_ln": True}, "ff.1 is a x_transformers.x_transformers.LayerNorm, not "),
        (x_transformers, {"ff_sublayer_dropout": 0.1}, "ff: expected a Linear, an activation, a Dropout and a Linear"),
        (x_transformers, {"ff_relu_squared": True}, "ff.0.1 ReluSquared has no fused form"),
    ],
)
def test_what_the_operator_does_not_have_is_left(make, options, reason):
    layer, _ = make(**options)
    report = macaron_ops.replace_layers(layer)
    assert not report.replaced and all(left.reason.startswith(reason) for left in report.left) and report.left


def test_a_cache_of_espnet_runs_the_layer_itself():
    layer, (x, mask) = espnet()
    layer.eval()
    expected = layer(x, mask, cache=x[:, :-1])
    macaron_ops.replace_layers(layer, strict=True)
    found = layer(x, mask, cache=x[:, :-1])
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_adapters_of_nemo_are_left():
    layer, _ = nemo()
    layer.adapter_layer = nn.ModuleDict({"one": nn.Linear(D, D)})
    (left,) = macaron_ops.replace_layers(layer).left
    assert left.reason == "it has adapters, which are not fused"
