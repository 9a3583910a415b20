"""Claim: ``nn.TransformerEncoder``, ``nn.TransformerDecoder`` and ``nn.Transformer`` compute the same with replaced
layers, with every mask, in training and in eval."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import macaron_ops
from macaron_ops.nn import LieTrotterDecoderLayer, LieTrotterEncoderLayer
from tests.integrations.compare import assert_same_function, loss_and_grads, same_state
from tests.rule import assert_by_rule

D, HEADS, HIDDEN, BATCH, TOKENS, SOURCE = 12, 3, 20, 2, 5, 7
PAD = torch.tensor([[False] * SOURCE, [False] * 4 + [True] * 3])
CAUSAL = nn.Transformer.generate_square_subsequent_mask(TOKENS, dtype=torch.float64)
pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:enable_nested_tensor")


def transformer(**kwargs) -> nn.Transformer:
    return nn.Transformer(D, HEADS, 2, 2, HIDDEN, dropout=0.0, dtype=torch.float64, **kwargs)


def encoder(**kwargs) -> nn.TransformerEncoder:
    options = {"dropout": 0.0, "batch_first": True, "dtype": torch.float64, **kwargs}
    layer = nn.TransformerEncoderLayer(D, HEADS, HIDDEN, **options)
    return nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(D, dtype=options["dtype"]))


def fused(model: nn.Module, **kwargs) -> nn.Module:
    twin = copy.deepcopy(model)
    assert macaron_ops.replace_layers(twin, **kwargs).left == []
    return twin


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("norm_first", [True, False], ids=["pre", "post"])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_the_whole_transformer(train, norm_first, batch_first, bias, activation):
    model = transformer(norm_first=norm_first, batch_first=batch_first, bias=bias, activation=activation).train(train)
    src, tgt = (torch.randn(BATCH, n, D, dtype=torch.float64) for n in (SOURCE, TOKENS))
    src, tgt = (t if batch_first else t.transpose(0, 1) for t in (src, tgt))

    def call(m):
        masks = {"src_key_padding_mask": PAD, "memory_key_padding_mask": PAD, "tgt_mask": CAUSAL}
        return m(src, tgt, tgt_is_causal=True, **masks)

    twin = fused(model)
    assert [type(layer) for layer in twin.encoder.layers] == [LieTrotterEncoderLayer] * 2
    assert [type(layer) for layer in twin.decoder.layers] == [LieTrotterDecoderLayer] * 2
    assert list(same_state(twin)) == list(same_state(model))
    assert_same_function(model, twin, call)
    before = call(model)
    macaron_ops.restore_layers(twin)
    assert torch.equal(call(twin), before)


@pytest.mark.parametrize(
    "masks",
    [
        {},
        {"src_key_padding_mask": PAD},
        {"src_key_padding_mask": torch.where(PAD, -1.5, 0.0).double()},
        {"mask": torch.randn(SOURCE, SOURCE, dtype=torch.float64)},
        {"mask": torch.randn(BATCH * HEADS, SOURCE, SOURCE, dtype=torch.float64)},
        {"mask": torch.ones(SOURCE, SOURCE).triu(1).bool()},
        {"mask": torch.ones(SOURCE, SOURCE).triu(1).bool(), "is_causal": True},
        {"mask": torch.ones(SOURCE, SOURCE).triu(1).bool(), "src_key_padding_mask": PAD},
    ],
    ids=["none", "padding", "added padding", "added", "added per head", "bool", "causal", "bool and padding"],
)
@pytest.mark.parametrize("save", ["fast", "lean"])
def test_masks_of_the_encoder(masks, save):
    model, x = encoder().train(), torch.randn(BATCH, SOURCE, D, dtype=torch.float64)
    twin = fused(model, save=save)
    assert_same_function(model, twin, lambda m: m(x, **masks))
    model.eval(), twin.eval()
    with torch.no_grad():  # torch's own fast path, with nested tensors where there is padding
        torch.testing.assert_close(twin(x, **masks), model(x, **masks))


def test_unbatched_input():
    model, x = encoder(), torch.randn(SOURCE, D, dtype=torch.float64)
    assert_same_function(model, fused(model), lambda m: m(x))


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_autocast(train, device):
    exact, x = encoder().to(device).train(train), torch.randn(BATCH, SOURCE, D, device=device)
    model = copy.deepcopy(exact).float()
    y, grads = loss_and_grads(exact, lambda m: m(x.double()).double())
    with torch.autocast(device.type, dtype=torch.bfloat16):
        eager_y, eager_grads = loss_and_grads(model, lambda m: m(x))
        fused_y, fused_grads = loss_and_grads(fused(copy.deepcopy(model)), lambda m: m(x))
    assert fused_y.dtype == eager_y.dtype == torch.float32
    assert_by_rule("y", fused_y.bfloat16(), eager_y, y)
    for name, grad in grads.items():
        assert_by_rule(name, fused_grads[name].bfloat16(), eager_grads[name], grad)


def test_compile_without_graph_breaks():
    model, x = fused(encoder()), torch.randn(BATCH, SOURCE, D, dtype=torch.float64)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    y, grads = loss_and_grads(model, lambda m: m(x))
    compiled_y, _ = loss_and_grads(compiled, lambda m: m(x))
    torch.testing.assert_close(compiled_y, y)
    torch.testing.assert_close({name: p.grad for name, p in model.named_parameters()}, grads)


@pytest.mark.inductor
def test_compile_with_the_default_backend():
    model, x = fused(encoder()).eval(), torch.randn(BATCH, SOURCE, D, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), model(x))


def test_copies_and_pickles():
    model, x = fused(transformer()), torch.randn(TOKENS, BATCH, D, dtype=torch.float64)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert torch.equal(twin(x, x), model(x, x))
        assert len(macaron_ops.restore_layers(twin).replaced) == 4


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_repeats_the_same_dropout(reentrant):
    model = fused(encoder(dropout=0.3)).train()
    x = torch.randn(BATCH, SOURCE, D, dtype=torch.float64, requires_grad=True)
    results = []
    for call in (lambda m: m(x), lambda m: checkpoint(m, x, use_reentrant=reentrant)):
        torch.manual_seed(1)
        results.append(loss_and_grads(model, call))
    (y, grads), (y_checkpointed, grads_checkpointed) = results
    assert torch.equal(y, y_checkpointed)
    assert all(torch.equal(grads[name], grads_checkpointed[name]) for name in grads)


def test_the_optimiser_goes_on_and_the_state_loads_into_an_unpatched_model():
    model, x = encoder(), torch.randn(BATCH, SOURCE, D, dtype=torch.float64)
    twin = copy.deepcopy(model)
    optimisers = [torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (model, twin)]
    losses = [[], []]
    for step in range(6):
        if step == 3:
            macaron_ops.replace_layers(twin)
        for m, optimiser, values in zip((model, twin), optimisers, losses, strict=True):
            optimiser.zero_grad()
            loss = (m(x) - x).square().mean()
            loss.backward()
            optimiser.step()
            values.append(loss.detach())
    torch.testing.assert_close(losses[1], losses[0])
    assert losses[0][-1] < losses[0][0]
    model.load_state_dict(twin.state_dict())
    torch.testing.assert_close(model(x), twin(x))


def test_hooks_of_the_layer_itself_are_kept():
    model, x = encoder(), torch.randn(BATCH, SOURCE, D, dtype=torch.float64)
    calls = []
    for layer in model.layers:
        layer.register_forward_hook(lambda module, args, output: calls.append(type(module)))
    macaron_ops.replace_layers(model)
    model(x)
    assert calls == [LieTrotterEncoderLayer] * 2
