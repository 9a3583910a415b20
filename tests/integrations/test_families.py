"""Claim: a replaced model of each family is the original one: outputs and all gradients in every dtype and mode by the
tolerance rule, the same ``state_dict``; it comes back, and what it learned loads into an unpatched model."""

import copy

import pytest
import torch
from torch import nn

import macaron_ops
from macaron_ops.integrations import FAMILIES
from tests.integrations.compare import loss_and_grads, same_state
from tests.integrations.tiny_models import MODELS, keep_float64, tiny
from tests.rule import assert_draws_by_rule

transformers = pytest.importorskip("transformers")


def replaced(model: nn.Module, name: str) -> nn.Module:
    twin = copy.deepcopy(model)
    report = macaron_ops.replace_layers(twin)
    spec = MODELS[name]
    assert [(r.before, r.after) for r in report.replaced] == [(spec.layer, f"Fused{spec.layer}")] * spec.count
    return twin


def exact(model: nn.Module) -> nn.Module:
    """The model in float64, with norms that do not round to float32 in between."""
    model = copy.deepcopy(model).double()
    for module in model.modules():
        if "variance_epsilon" in vars(module):
            module.forward = lambda x, m=module: nn.functional.rms_norm(x, x.shape[-1:], m.weight, m.variance_epsilon)
    return model


def run(model: nn.Module, inputs: dict):
    """The last hidden states and gradients of all parameters."""
    dtype = next(model.parameters()).dtype
    inputs = {k: v.to(dtype) if torch.is_tensor(v) and v.is_floating_point() else v for k, v in inputs.items()}
    return loss_and_grads(model, lambda m: m(**inputs)[0])


def judged_together(grads: dict) -> dict[str, list[str]]:
    """The parameters whose gradients are judged as one. Those that are 0, as a key's bias has because a softmax does
    not see it, stand beside the other biases of their module: what cancels in them is as large."""
    largest = max(g.abs().max() for g in grads.values())
    zero = {name.rsplit(".", 2)[0] for name, g in grads.items() if g.abs().max() < 1e-9 * largest}
    groups: dict[str, list[str]] = {}
    for name in grads:
        module = name.rsplit(".", 2)[0]
        groups.setdefault(f"{module}: biases" if module in zero and name.endswith("bias") else name, []).append(name)
    return groups


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_the_same_function_and_gradients(name, dtype, monkeypatch):
    """In train and in eval mode, by turns; padded where the model takes a mask."""
    keep_float64(monkeypatch)
    model = tiny(name)
    truth, eager = exact(model), copy.deepcopy(model).to(dtype)
    fused = replaced(eager, name)
    groups = judged_together(run(truth.train(), MODELS[name].inputs())[1])

    def draw(seed):
        torch.manual_seed(seed)
        train = seed % 2 == 0
        inputs = MODELS[name].inputs()
        inputs |= {k: v.bfloat16() for k, v in inputs.items() if torch.is_tensor(v) and v.is_floating_point()}
        y, grads = run(truth.train(train), inputs)
        (eager_y, eager_grads), (fused_y, fused_grads) = (run(m.train(train), inputs) for m in (eager, fused))
        assert fused_grads.keys() == eager_grads.keys() and fused_y.dtype == dtype
        found = {
            group: tuple(torch.cat([g[p].flatten() for p in names]) for g in (fused_grads, eager_grads, grads))
            for group, names in groups.items()
        }
        return {**found, "y": (fused_y, eager_y, y)}

    assert_draws_by_rule(draw)


@pytest.mark.parametrize("name", MODELS)
def test_only_the_classes_change_and_come_back(name):
    model, inputs = tiny(name).eval(), MODELS[name].inputs()
    before, y = same_state(model), model(**inputs)[0]
    classes = [type(m) for m in model.modules()]
    report = macaron_ops.replace_layers(model)
    assert len(report.replaced) == MODELS[name].count
    assert same_state(model) == before
    trained = model(**inputs)[0]
    assert not torch.equal(trained, y)  # another order of the sums, or the layers were not run
    unpatched = tiny(name).eval()
    unpatched.load_state_dict(model.state_dict())
    torch.testing.assert_close(unpatched(**inputs)[0], trained)
    macaron_ops.restore_layers(model)
    assert [type(m) for m in model.modules()] == classes and same_state(model) == before
    assert torch.equal(model(**inputs)[0], y)


def test_every_family_is_tested():
    tested = {spec.layer for spec in MODELS.values()}
    for family in FAMILIES:
        if family.layers and family.layers[0].startswith("transformers.") and family.name not in ("bert", "unfused"):
            missing = {path.rpartition(".")[2] for path in family.layers} - tested
            assert not missing, family.name
