"""Claim: ``replace_layers`` changes the class of the layers it knows exactly and nothing else; what it leaves it
reports with a reason; ``restore_layers`` undoes it."""

import copy
import io
import os
import re
import subprocess
import sys

import pytest
import torch
import torch.nn.utils.prune
from torch import nn

import macaron_ops
from macaron_ops.nn import LieTrotterEncoderLayer, MacaronEncoderLayer
from tests.integrations.compare import same_state


def _layer(**kwargs) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, **kwargs)


def _reasons(report) -> list[str]:
    return [left.reason for left in report.left]


def test_importing_the_package_does_not_import_transformers():
    """Nor triton, where its kernels cannot run."""
    code = "import sys, macaron_ops; assert 'transformers' not in sys.modules; "
    code += "assert 'triton' not in sys.modules or macaron_ops.backends()['triton'].usable"
    for interpreted in ("0", "1"):
        subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "TRITON_INTERPRET": interpreted})


def test_only_the_class_changes_and_comes_back():
    model = nn.Sequential(nn.Linear(8, 8), _layer(), nn.TransformerDecoderLayer(8, 2, 16))
    state, before = same_state(model), [copy.copy(module.__dict__) for module in model.modules()]
    assert macaron_ops.replace_layers(model).replaced == [
        ("1", "TransformerEncoderLayer", "LieTrotterEncoderLayer"),
        ("2", "TransformerDecoderLayer", "LieTrotterDecoderLayer"),
    ]
    assert same_state(model) == state
    assert isinstance(model[1], nn.TransformerEncoderLayer)
    report = macaron_ops.restore_layers(model)
    assert [entry.after for entry in report.replaced] == ["TransformerEncoderLayer", "TransformerDecoderLayer"]
    assert [type(module) for module in model] == [nn.Linear, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer]
    assert same_state(model) == state
    assert [module.__dict__ for module in model.modules()] == before


def test_a_model_that_is_a_layer():
    layer = _layer()
    report = macaron_ops.replace_layers(layer)
    assert type(layer) is LieTrotterEncoderLayer
    assert report.replaced[0].name == "" and "(the model itself)" in str(report)


def test_a_shared_layer_appears_once():
    layer = _layer()
    assert len(macaron_ops.replace_layers(nn.ModuleList([layer, layer])).replaced) == 1


def test_twice_is_harmless_and_the_second_memory_policy_holds():
    model = nn.Sequential(_layer())
    macaron_ops.replace_layers(model)
    report = macaron_ops.replace_layers(model, save="lean")
    assert report.replaced == [] and _reasons(report) == ["replaced already"]
    assert model[0].save == "lean"
    assert len(macaron_ops.restore_layers(model).replaced) == 1
    assert macaron_ops.restore_layers(model).replaced == []


def test_layers_that_were_built_fused_stay_so():
    model = nn.Sequential(LieTrotterEncoderLayer(8, 2, 16), MacaronEncoderLayer(8, 2, 16))
    report = macaron_ops.replace_layers(model)
    assert report.replaced == [] and _reasons(report) == ["fused already: it was built so"]
    assert macaron_ops.restore_layers(model).replaced == []
    assert [type(module) for module in model] == [LieTrotterEncoderLayer, MacaronEncoderLayer]


def test_an_unknown_subclass_is_left_and_reported():
    class Mine(nn.TransformerEncoderLayer):
        pass

    class MineFused(LieTrotterEncoderLayer):
        pass

    model = nn.Sequential(Mine(8, 2), MineFused(8, 2))
    report = macaron_ops.replace_layers(model)
    assert [type(module) for module in model] == [Mine, MineFused]
    assert _reasons(report) == ["a subclass of TransformerEncoderLayer, which may do something else"] * 2


def test_a_class_of_the_same_name_is_another_class():
    fake = type("TransformerEncoderLayer", (nn.Linear,), {"__module__": nn.TransformerEncoderLayer.__module__})
    report = macaron_ops.replace_layers(nn.Sequential(fake(2, 2)))
    assert report.replaced == [] and report.left == []


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: setattr(m, "forward", m.forward), "forward of its own, which a change of class does not reach"),
        (lambda m: setattr(m.linear1, "forward", m.linear1.forward), "linear1 has a forward of its own"),
        (lambda m: m.linear2.register_forward_hook(print), "linear2 has a hook, print"),
        (lambda m: m.self_attn.register_forward_pre_hook(print), "self_attn has a hook, print"),
        (lambda m: m.norm1.register_full_backward_hook(print), "norm1 has a hook, print"),
        (lambda m: m.dropout1.register_full_backward_pre_hook(print), "dropout1 has a hook, print"),
        (lambda m: setattr(m, "linear1", type("LoraLinear", (nn.Linear,), {})(8, 16)), "linear1 is a .*LoraLinear"),
        (lambda m: setattr(m, "norm1", nn.RMSNorm(8)), "norm1 is a .*torch.nn.RMSNorm, not torch.nn.LayerNorm itself"),
        (lambda m: setattr(m, "norm2", None), "norm2 is a builtins.NoneType, not torch.nn.LayerNorm itself"),
        (lambda m: setattr(m, "self_attn", nn.MultiheadAttention(8, 2, add_bias_kv=True)), "self_attn has add_bias_kv"),
        (lambda m: setattr(m.self_attn, "out_proj", nn.Linear(8, 8)), "self_attn.out_proj is a torch.nn.Linear, not "),
        (lambda m: setattr(m, "activation", torch.tanh), "activation tanh has no fused form"),
        (lambda m: setattr(m, "activation", nn.ReLU), "activation ReLU has no fused form"),
        (lambda m: setattr(m, "activation", nn.ELU()), "activation ELU has no fused form"),
    ],
)
def test_what_a_fused_layer_would_skip_is_left_with_the_reason(change, reason):
    layer = _layer()
    change(layer)
    report = macaron_ops.replace_layers(layer)
    assert type(layer) is nn.TransformerEncoderLayer and len(report.left) == 1
    assert re.search(reason, report.left[0].reason)


def test_parametrized_submodules_are_replaced():
    layer, x = _layer(dropout=0.0), torch.randn(2, 3, 8)
    nn.utils.parametrizations.weight_norm(layer.linear1)
    expected = layer(x)
    assert len(macaron_ops.replace_layers(layer).replaced) == 1
    torch.testing.assert_close(layer(x), expected)


def test_a_parameter_of_another_class_is_left():
    class Quantised(torch.Tensor):
        pass

    layer = _layer()
    layer.linear1.weight = nn.Parameter(torch.randn(16, 8).as_subclass(Quantised))
    (reason,) = _reasons(macaron_ops.replace_layers(layer))
    assert reason.startswith("linear1.weight is a ") and reason.endswith("Quantised, not a plain parameter")


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda m: m.linear1.register_forward_hook(print), RuntimeError, "linear1 has a hook, print"),
        (lambda m: nn.utils.prune.l1_unstructured(m.linear1, "weight", 0.5), RuntimeError, "linear1 has a hook, "),
        (lambda m: m.self_attn.out_proj.register_forward_pre_hook(print), RuntimeError, "out_proj has a hook, print"),
        (
            lambda m: setattr(m, "linear2", Doubled(16, 8)),
            TypeError,
            "linear2: expected torch.nn.Linear; got .*Doubled",
        ),
    ],
)
def test_a_layer_that_changes_later_does_not_skip_the_change_in_silence(change, error, message, compiled):
    layer = _layer()
    macaron_ops.replace_layers(layer)
    change(layer)
    call = torch.compile(layer, backend="eager") if compiled else layer
    with pytest.raises(error, match=message):
        call(torch.randn(2, 3, 8))
    (left,) = macaron_ops.replace_layers(layer).left
    assert left.cls == "LieTrotterEncoderLayer" and type(layer) is nn.TransformerEncoderLayer


def test_a_replaced_layer_that_changed_is_restored_and_reported():
    layer = _layer()
    macaron_ops.replace_layers(layer)
    layer.linear1.register_forward_hook(lambda *_: None)
    report = macaron_ops.replace_layers(layer)
    assert type(layer) is nn.TransformerEncoderLayer
    assert [left.cls for left in report.left] == ["LieTrotterEncoderLayer"]
    assert "linear1 has a hook" in report.left[0].reason


def test_a_class_changed_once_more_is_not_restored_blindly():
    layer = _layer()
    macaron_ops.replace_layers(layer)
    layer.__class__ = type("Sharded", (LieTrotterEncoderLayer,), {})
    report = macaron_ops.restore_layers(layer)
    assert report.replaced == [] and _reasons(report) == ["its class was changed since it was replaced"]
    assert type(layer).__name__ == "Sharded"


def test_a_layer_wrapped_since_is_not_restored_blindly():
    layer = _layer()
    macaron_ops.replace_layers(layer)
    layer.forward = layer.forward
    for function in (macaron_ops.restore_layers, macaron_ops.replace_layers):
        (left,) = function(layer).left
        assert left.reason == "it has a forward of its own, which a change of class does not reach"
        assert type(layer) is LieTrotterEncoderLayer
    del layer.forward
    assert len(macaron_ops.restore_layers(layer).replaced) == 1


def test_families_are_chosen_by_name():
    model = nn.Sequential(_layer())
    assert macaron_ops.replace_layers(model, families=["bert"]).replaced == []
    assert len(macaron_ops.replace_layers(model, families="torch").replaced) == 1
    with pytest.raises(ValueError, match="families: expected names among 'torch', 'bert', .*; got 'gpt'"):
        macaron_ops.replace_layers(model, families=["torch", "gpt"])
    with pytest.raises(TypeError, match="families: expected names, a name or None; got 3"):
        macaron_ops.replace_layers(model, families=3)
    with pytest.raises(ValueError, match="families: expected names among .*; got \\['torch'\\]"):
        macaron_ops.replace_layers(model, families=[["torch"]])


def test_bad_input_is_refused_before_anything_changes():
    model = nn.Sequential(_layer())
    with pytest.raises(ValueError, match="save: expected one of 'fast', 'lean'; got 'slow'"):
        macaron_ops.replace_layers(model, save="slow")
    for function in (macaron_ops.replace_layers, macaron_ops.restore_layers):
        with pytest.raises(TypeError, match="model: expected a torch.nn.Module; got dict"):
            function({})
    assert type(model[0]) is nn.TransformerEncoderLayer


def test_the_report_is_a_table_that_folds_equal_layers():
    layers = nn.ModuleList([_layer() for _ in range(5)])
    layers[1].linear1.register_forward_hook(print)
    layers[4] = nn.Linear(2, 2)
    model = nn.ModuleDict({"encoder": layers, "other": nn.ModuleList([_layer(), _layer()])})
    report = macaron_ops.replace_layers(model)
    assert str(report) == "\n".join(
        [
            "replaced 5 layers, left 1 layer",
            "  encoder.{0,2,3}  TransformerEncoderLayer -> LieTrotterEncoderLayer",
            "  other.{0..1}     TransformerEncoderLayer -> LieTrotterEncoderLayer",
            "left as they are:",
            "  encoder.1  TransformerEncoderLayer  linear1 has a hook, print, which would be skipped",
        ]
    )
    assert "-&gt;" in report._repr_html_()


def test_nothing_to_do_is_said():
    assert str(macaron_ops.replace_layers(nn.Linear(2, 2))) == (
        "nothing replaced: the model has no layer of a known family"
    )
    assert str(macaron_ops.restore_layers(nn.Linear(2, 2))) == (
        "nothing restored: the model has no layer that was replaced"
    )


def test_copies_and_pickles_are_replaced_models_that_can_be_restored():
    model = nn.Sequential(_layer(dropout=0.0))
    x = torch.randn(2, 3, 8)
    original = model(x)
    macaron_ops.replace_layers(model, save="lean")
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert type(twin[0]) is LieTrotterEncoderLayer and twin[0].save == "lean"
        assert torch.equal(twin(x), model(x))
        macaron_ops.restore_layers(twin)
        assert torch.equal(twin(x), original)
    assert type(model[0]) is LieTrotterEncoderLayer
