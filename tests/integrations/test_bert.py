"""Claim: a fused layer of the BERT family computes what transformers' own computes, in every mode in which a model
runs it; what it cannot do is an error or a reason, never another result."""

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn

import macaron_ops
from macaron_ops.integrations import bert, foreign
from tests.integrations.compare import assert_same_function, loss_and_grads, same_state
from tests.rule import assert_by_rule

transformers = pytest.importorskip("transformers")

# Layer class: (configuration, model), and what a tiny one needs besides the sizes.
MODELS = {
    "BertLayer": ("BertConfig", "BertModel", {}),
    "BertGenerationLayer": ("BertGenerationConfig", "BertGenerationEncoder", {}),
    "CamembertLayer": ("CamembertConfig", "CamembertModel", {}),
    "Data2VecTextLayer": ("Data2VecTextConfig", "Data2VecTextModel", {}),
    "ElectraLayer": ("ElectraConfig", "ElectraModel", {"embedding_size": 24}),
    "ErnieLayer": ("ErnieConfig", "ErnieModel", {}),
    "RobertaLayer": ("RobertaConfig", "RobertaModel", {}),
    "RoCBertLayer": ("RoCBertConfig", "RoCBertModel", {"enable_pronunciation": False, "enable_shape": False}),
    "XLMRobertaLayer": ("XLMRobertaConfig", "XLMRobertaModel", {}),
}
SIZES = {
    "vocab_size": 50,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "max_position_embeddings": 40,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
KEEP = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])  # the second of the two sequences is padded


def tiny(layer: str = "BertLayer", attention: str = "sdpa", **kwargs) -> nn.Module:
    """A random model in float64; LayerNorms and biases are random too."""
    config, model, extra = MODELS[layer]
    config = getattr(transformers, config)(**{**SIZES, **extra, **kwargs})
    model = getattr(transformers, model)._from_config(config, attn_implementation=attention).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def ids() -> torch.Tensor:
    return torch.randint(5, 50, (2, 7))


def fused(model: nn.Module, **kwargs) -> nn.Module:
    twin = copy.deepcopy(model)
    assert len(macaron_ops.replace_layers(twin, **kwargs).replaced) == model.config.num_hidden_layers
    return twin


@pytest.mark.parametrize("layer", MODELS)
def test_every_class_with_padding(layer):
    model, x = tiny(layer).eval(), ids()
    twin = fused(model)
    state = same_state(twin)
    layers = [module for module in twin.modules() if hasattr(module, "replaced_class")]
    assert [type(module).__name__ for module in layers] == [f"Fused{layer}"] * 2
    assert list(state) == list(model.state_dict())
    before = model(x, KEEP).last_hidden_state
    assert_same_function(model, twin, lambda m: m(x, KEEP).last_hidden_state)
    macaron_ops.restore_layers(twin)
    assert same_state(twin) == state and type(layers[0]).__name__ == layer
    assert torch.equal(twin(x, KEEP).last_hidden_state, before)


def test_the_families_classes_are_all_tested():
    assert {path.rpartition(".")[2] for path in bert.FAMILY.layers} == set(MODELS)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("save", ["fast", "lean"])
@pytest.mark.parametrize("keep", [None, KEEP], ids=["dense", "padded"])
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_modes_masks_and_memory_policies(attention, save, keep, train):
    model, x = tiny(attention=attention).train(train), ids()
    assert_same_function(model, fused(model, save=save), lambda m: m(x, keep).last_hidden_state)


@pytest.mark.parametrize(
    "mask",
    [
        torch.rand(2, 1, 7, 7) > 0.3,
        (torch.rand(2, 3, 7, 7) > 0.3).logical_or(torch.eye(7, dtype=torch.bool)),
        torch.randn(2, 1, 7, 7, dtype=torch.float64),
        torch.randn(1, 1, 1, 7, dtype=torch.float64),
    ],
    ids=["bool", "bool per head", "added", "added to every query"],
)
def test_masks_that_a_layer_may_get(mask):
    model, x = tiny(), torch.randn(2, 7, 24, dtype=torch.float64)
    layer, twin = model.encoder.layer[0], fused(model).encoder.layer[0]
    torch.testing.assert_close(twin(x, mask), layer(x, mask))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_sequence_of_padding_alone(attention):
    model, x = tiny(attention=attention).eval(), ids()
    keep = torch.stack([KEEP[0], torch.zeros_like(KEEP[0])])
    torch.testing.assert_close(fused(model)(x, keep)[0], model(x, keep)[0])


def test_a_mask_that_is_no_tensor_is_refused():
    with pytest.raises(TypeError, match="attention_mask: expected a tensor of 4 dimensions or None; got dict"):
        fused(tiny()).encoder.layer[0](torch.randn(1, 2, 24, dtype=torch.float64), {})


@pytest.mark.parametrize(
    "activation",
    ["gelu", "gelu_python", "gelu_new", "gelu_pytorch_tanh", "gelu_python_tanh", "relu", "silu", "swish"],
)
def test_fused_activations(activation):
    model, x = tiny(hidden_act=activation), ids()
    assert_same_function(model, fused(model), lambda m: m(x, KEEP).last_hidden_state)


def test_hidden_states_keep_working():
    model, x = tiny().eval(), ids()
    expected = model(x, KEEP, output_hidden_states=True).hidden_states
    for twin in (fused(model), fused(tiny())):  # recording hooks already there, or not yet
        twin.load_state_dict(model.state_dict())
        actual = twin(x, KEEP, output_hidden_states=True).hidden_states
        assert len(actual) == 3
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, e)


def test_attentions_are_refused_and_come_back():
    model, x = tiny(attention="eager").eval(), ids()
    expected = model(x, KEEP, output_attentions=True).attentions
    twin = fused(model)
    with pytest.raises(ValueError, match="output_attentions: expected None or False.*got True.*restore_layers"):
        twin(x, KEEP, output_attentions=True)
    twin.config.output_attentions = True
    with pytest.raises(ValueError, match="output_attentions"):
        twin(x, KEEP)
    torch.testing.assert_close(twin(x, KEEP, output_attentions=False)[0], model(x, KEEP)[0])
    macaron_ops.restore_layers(twin)
    for a, e in zip(twin(x, KEEP).attentions, expected, strict=True):
        assert torch.equal(a, e)


@pytest.mark.parametrize("head", ["BertForMaskedLM", "BertForSequenceClassification", "BertForTokenClassification"])
def test_attentions_are_refused_through_every_head(head):
    config = transformers.BertConfig(**SIZES)
    model = getattr(transformers, head)._from_config(config, attn_implementation="eager").eval()
    macaron_ops.replace_layers(model)
    with pytest.raises(ValueError, match="output_attentions"):
        model(ids(), KEEP, output_attentions=True)


@pytest.mark.parametrize("name", ["past_key_values", "is_causal", "position_bias"])
def test_arguments_that_would_change_the_function_are_refused(name):
    layer = fused(tiny()).encoder.layer[0]
    with pytest.raises(ValueError, match=f"{name}: expected None or False"):
        layer(torch.randn(1, 2, 24, dtype=torch.float64), **{name: True})


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("save", ["fast", "lean"])
def test_gradient_checkpointing_repeats_the_same_dropout(reentrant, save):
    model, x = fused(tiny(hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.3), save=save).train(), ids()
    results = []
    for enable in (False, True):
        if enable:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(1)
        results.append(loss_and_grads(model, lambda m: m(x, KEEP).last_hidden_state))
    (y, grads), (y_checkpointed, grads_checkpointed) = results
    assert torch.equal(y, y_checkpointed)
    assert grads.keys() == grads_checkpointed.keys()
    assert all(torch.equal(grads[name], grads_checkpointed[name]) for name in grads)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable:FutureWarning")
def test_checkpointing_that_was_on_before():
    model, x = tiny().train(), ids()
    model.gradient_checkpointing_enable()
    assert_same_function(model, fused(model), lambda m: m(x, KEEP).last_hidden_state)


def test_each_dropout_follows_its_own_module():
    model, x = fused(tiny(hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5)).train(), ids()
    exact = copy.deepcopy(model).eval()(x).last_hidden_state
    assert not torch.equal(model(x).last_hidden_state, model(x).last_hidden_state)
    model.embeddings.eval()
    for layer in model.encoder.layer:
        layer.output.eval(), layer.attention.output.eval()
    assert not torch.equal(model(x).last_hidden_state, exact)
    for layer in model.encoder.layer:
        layer.attention.self.eval()
    assert torch.equal(model(x).last_hidden_state, exact)


def test_each_dropout_has_its_own_probability(monkeypatch):
    layer = fused(tiny(hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.3)).encoder.layer[0].train()
    layer.output.dropout.p = 0.1
    seen = []
    monkeypatch.setattr(bert, "split_layer", lambda x, substeps, save: seen.extend(s.kwargs for s in substeps) or x)
    layer(torch.randn(1, 3, 24, dtype=torch.float64))
    assert (seen[0]["dropout"], seen[0]["attention_dropout"], seen[1]["dropout"]) == (0.2, 0.3, 0.1)


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_autocast(train, device):
    exact, x, keep = tiny().to(device).train(train), ids().to(device), KEEP.to(device)
    model = copy.deepcopy(exact).float()
    call = lambda m: m(x, keep).last_hidden_state  # noqa: E731
    y, grads = loss_and_grads(exact, call)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        eager_y, eager_grads = loss_and_grads(model, call)
        fused_y, fused_grads = loss_and_grads(fused(model), call)
    assert fused_y.dtype == eager_y.dtype == torch.float32
    assert_by_rule("y", fused_y.bfloat16(), eager_y, y)
    for name, grad in grads.items():
        assert_by_rule(name, fused_grads[name].bfloat16(), eager_grads[name], grad)


@pytest.mark.parametrize("whole", [True, False], ids=["model", "layer"])
def test_compile_without_graph_breaks(whole):
    model = fused(tiny())
    x = ids() if whole else torch.randn(2, 7, 24, dtype=torch.float64)
    model = model if whole else model.encoder.layer[0]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")

    call = lambda m: m(x, KEEP).last_hidden_state if whole else m(x)  # noqa: E731
    y, grads = loss_and_grads(model, call)
    compiled_y, _ = loss_and_grads(compiled, call)
    torch.testing.assert_close(compiled_y, y)
    torch.testing.assert_close({name: dict(model.named_parameters())[name].grad for name in grads}, grads)


def test_a_compiled_model_sees_that_it_was_replaced_and_restored():
    model, x = tiny().eval(), ids()
    compiled = torch.compile(model, backend="eager")
    before = compiled(x).last_hidden_state
    macaron_ops.replace_layers(model)
    replaced = compiled(x).last_hidden_state
    assert torch.equal(replaced, model(x).last_hidden_state) and not torch.equal(replaced, before)
    macaron_ops.restore_layers(model)
    assert torch.equal(compiled(x).last_hidden_state, before)


def test_a_pickled_model_loads_in_a_process_that_knows_nothing(tmp_path):
    model, x = fused(tiny()).eval(), ids()
    torch.save((model, x, model(x).last_hidden_state), tmp_path / "model.pt")
    code = (
        "import sys, torch\n"
        "model, x, y = torch.load(sys.argv[1], weights_only=False)\n"
        "assert type(model.encoder.layer[0]).__name__ == 'FusedBertLayer'\n"
        "assert torch.equal(model(x).last_hidden_state, y)\n"
        "import macaron_ops; macaron_ops.restore_layers(model)\n"
        "assert type(model.encoder.layer[0]).__name__ == 'BertLayer'\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "model.pt")], check=True)


def test_a_checkpoint_loads_into_an_unpatched_model(tmp_path):
    model, x = fused(tiny()).eval(), ids()
    model.save_pretrained(tmp_path)
    loaded = transformers.BertModel.from_pretrained(tmp_path, dtype=torch.float64).eval()
    torch.testing.assert_close(loaded(x).last_hidden_state, model(x).last_hidden_state)


def test_the_optimiser_goes_on():
    model, x = tiny(), ids()
    twin = copy.deepcopy(model)
    optimisers = [torch.optim.AdamW(m.parameters(), lr=1e-3) for m in (model, twin)]
    losses = [[], []]
    for step in range(6):
        if step == 3:
            macaron_ops.replace_layers(twin)
        for m, optimiser, values in zip((model, twin), optimisers, losses, strict=True):
            optimiser.zero_grad()
            loss = m(x, KEEP).last_hidden_state[..., ::2].square().mean()
            loss.backward()
            optimiser.step()
            values.append(loss.detach())
    torch.testing.assert_close(losses[1], losses[0])
    assert losses[0][-1] < losses[0][0]


DECODER = "config.is_decoder: causal attention with a cache is not fused"
FLEX = "attn_implementation 'flex_attention': the masks of 'sdpa' and 'eager' are known"


@pytest.mark.parametrize(
    ("kwargs", "reason"),
    [
        ({"is_decoder": True}, DECODER),
        ({"is_decoder": True, "add_cross_attention": True}, DECODER),
        ({"chunk_size_feed_forward": 2}, "chunk_size_feed_forward = 2: the fused layer runs its FFN whole"),
        ({"hidden_act": "quick_gelu"}, "activation QuickGELUActivation has no fused form"),
        ({"hidden_act": "tanh"}, "activation Tanh has no fused form"),
        ({"attention": "flex_attention"}, FLEX),
    ],
)
def test_configurations_that_stay(kwargs, reason):
    model = tiny(**kwargs)
    report = macaron_ops.replace_layers(model)
    assert report.replaced == [] and {left.reason for left in report.left} == {reason}
    assert len(report.left) == 2


class Adapter(nn.Linear):
    """What LoRA does to a model: another Linear in the place of one."""


CHANGES = {
    "attention.self.query is a .*Adapter": lambda m: setattr(m.attention.self, "query", Adapter(24, 24)),
    "attention.self is a .*Sequential": lambda m: setattr(m.attention, "self", nn.Sequential()),
    "attention.output has a hook": lambda m: m.attention.output.register_forward_hook(print),
    "intermediate.dense has a forward of its own": lambda m: setattr(m.intermediate.dense, "forward", print),
    "activation has a hook": lambda m: m.intermediate.intermediate_act_fn.register_forward_pre_hook(print),
    "activation Tanh has no fused form": lambda m: setattr(m.intermediate, "intermediate_act_fn", nn.Tanh()),
    "chunk_size_feed_forward = 3": lambda m: setattr(m, "chunk_size_feed_forward", 3),
    "attention.self.is_causal": lambda m: setattr(m.attention.self, "is_causal", True),
    "attn_implementation 'flash_attention_2'": lambda m: setattr(
        m.attention.self.config, "_attn_implementation", "flash_attention_2"
    ),
}


@pytest.mark.parametrize("reason", CHANGES)
def test_a_changed_layer_is_left(reason):
    layer = tiny().encoder.layer[0]
    CHANGES[reason](layer)
    (left,) = macaron_ops.replace_layers(layer).left
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(left.reason)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("reason", CHANGES)
def test_a_layer_that_changes_later_does_not_skip_the_change_in_silence(reason, compiled):
    layer, x = fused(tiny()).encoder.layer[0], torch.randn(1, 3, 24, dtype=torch.float64)
    CHANGES[reason](layer)
    torch.compiler.reset()
    call = torch.compile(layer, backend="eager") if compiled else layer
    with pytest.raises(RuntimeError, match=f"FusedBertLayer: {reason}"):
        call(x)
    (left,) = macaron_ops.replace_layers(layer).left
    assert left.cls == "FusedBertLayer" and type(layer).__name__ == "BertLayer"


def test_layers_of_an_older_transformers_are_left(monkeypatch):
    monkeypatch.setattr(foreign, "_OLDEST", (99, 0))
    reasons = {left.reason for left in macaron_ops.replace_layers(tiny()).left}
    assert reasons == {f"transformers {transformers.__version__}: the layers of 99.0 and later are known"}


def test_a_subclass_is_left():
    class MyLayer(transformers.models.bert.modeling_bert.BertLayer):
        pass

    layer = MyLayer(transformers.BertConfig(**SIZES))
    (left,) = macaron_ops.replace_layers(layer).left
    assert type(layer) is MyLayer and left.reason == "a subclass of BertLayer, which may do something else"


def test_a_fused_class_that_does_not_exist():
    with pytest.raises(AttributeError, match="has no attribute 'FusedSwinLayer'"):
        _ = bert.FusedSwinLayer
