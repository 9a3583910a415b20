"""Claim: Conformer layers of torchaudio, SpeechBrain and lucidrains, where they are installed, compute replaced what
they compute themselves. None of them is a dependency: without the package its tests skip."""

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


MAKERS = {
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
        moved = (v.to(kind) if torch.is_tensor(v) and v.is_floating_point() else v for v in inputs)
        y = module(*moved)
        return y[0] if isinstance(y, tuple) else y

    return layer.to(dtype), call


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", MAKERS)
def test_the_same_function(name, train):
    layer, call = made(name, torch.float64)
    layer.train(train)
    twin = copy.deepcopy(layer)
    state, before = same_state(twin), call(layer)
    (entry,) = macaron_ops.replace_layers(twin, strict=True).replaced
    assert entry.after == f"Fused{type(layer).__name__}" and same_state(twin) == state
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
    paths = [part.path for part in layer.parts if part.cls is nn.Dropout]
    assert len(paths) == 4
    macaron_ops.restore_layers(layer)
    for path in paths:
        layer.get_submodule(path).p = 1.0
        expected = call(layer)
        macaron_ops.replace_layers(layer)
        torch.testing.assert_close(call(layer), expected)
        macaron_ops.restore_layers(layer)
        layer.get_submodule(path).p = 0.0


def test_another_activation_is_left():
    layer, _ = speechbrain(activation=nn.GELU)
    (left,) = macaron_ops.replace_layers(layer).left
    assert left.reason.startswith("ffn_module1.1.ffn.1 is a torch.nn.GELU, not ")
    layer, _ = speechbrain()
    layer.ffn_module2[1].ffn[1].beta = 2.0
    (left,) = macaron_ops.replace_layers(layer).left
    assert left.reason == "ffn_module2 has a Swish with beta = 2.0, which is not fused"
