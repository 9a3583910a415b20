"""Claim: a module that people describe to ``register_ffn`` is fused where the description is true, and left with the
reason where it is not; ``strict`` turns what is left into an error."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import macaron_ops
from macaron_ops.integrations import registered
from tests.integrations.compare import assert_same_function, same_state
from tests.rule import assert_draws_by_rule


class HalfStep(nn.Module):
    def __init__(self, d=12, hidden=20, p=0.0, act=None, norm=nn.LayerNorm):
        super().__init__()
        self.norm = norm(d)
        self.net = nn.Sequential(nn.Linear(d, hidden), act or nn.SiLU(), nn.Dropout(p), nn.Linear(hidden, d))
        self.drop = nn.Dropout(p)
        self.factor = 0.5

    def forward(self, x):
        return x + self.factor * self.drop(self.net(self.norm(x)))


class PostNorm(HalfStep):
    def forward(self, x):
        return self.norm(1.5 * x + 0.25 * self.drop(self.net(x)))


class Update(nn.Module):
    """Without a norm; its caller adds the residual."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2, self.activation = nn.Linear(12, 20, bias=False), nn.Linear(20, 12), F.gelu

    def forward(self, x):
        return self.fc2(self.activation(self.fc1(x)))


NET = {"norm": "norm", "linear1": "net.0", "activation": "net.1", "activation_dropout": "net.2", "linear2": "net.3"}
NET |= {"dropout": "drop"}
CASES = {
    "half-step": (HalfStep, {**NET, "step": 0.5}),
    "step of the module": (HalfStep, {**NET, "step": "factor"}),
    "post-norm": (PostNorm, {**NET, "step": 0.25, "residual_scale": 1.5, "placement": "post"}),
    "update": (Update, {"linear1": "fc1", "activation": "activation", "linear2": "fc2", "residual_scale": 0.0}),
}


@pytest.fixture(autouse=True)
def forget():
    yield
    registered.REGISTERED.clear()


def replaced(model: nn.Module) -> nn.Module:
    twin = copy.deepcopy(model)
    report = macaron_ops.replace_layers(twin, strict=True)
    assert len(report.replaced) == 1, report
    return twin


@pytest.mark.parametrize("case", CASES)
def test_the_same_function(case):
    cls, description = CASES[case]
    macaron_ops.register_ffn(cls, **description)
    for train in (True, False):
        model, x = nn.Sequential(nn.Linear(7, 12), cls()).double().train(train), torch.randn(2, 5, 7).double()
        twin = replaced(model)
        assert list(twin.state_dict()) == list(model.state_dict()) and twin[1].training is train
        assert not hasattr(model[1], "save")
        assert_same_function(model, twin, lambda m, x=x: m(x))
        state = same_state(twin)
        macaron_ops.restore_layers(twin)
        assert type(twin[1]) is cls and same_state(twin) == state and torch.equal(twin(x), model(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_narrow_dtypes_keep_the_rule(case, dtype):
    cls, description = CASES[case]
    macaron_ops.register_ffn(cls, **description)
    model = cls().to(torch.bfloat16)
    eager, truth = copy.deepcopy(model).to(dtype), copy.deepcopy(model).double()
    twin = replaced(eager)

    def draw(seed):
        x = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(seed)).bfloat16()
        found = []
        for m, d in ((twin, dtype), (eager, dtype), (truth, torch.float64)):
            m.zero_grad()
            y = m(x.to(d))
            (y * torch.linspace(-1, 1, y.numel()).view(y.shape).bfloat16().to(d)).sum().backward()
            found.append({"y": y.detach(), **{name: p.grad for name, p in m.named_parameters()}})
        return {name: tuple(f[name] for f in found) for name in found[0]}

    assert_draws_by_rule(draw)


def test_both_dropouts_are_where_they_were():
    macaron_ops.register_ffn(HalfStep, **NET, step=0.5)
    for path in ("net.2", "drop"):
        model, x = HalfStep().double().train(), torch.randn(3, 12).double()
        model.get_submodule(path).p = 1.0
        torch.testing.assert_close(replaced(model)(x), model(x))


WRONG = {
    "the step": (HalfStep, {**NET}, "computes something else than its description: they differ by"),
    "the residual": (Update, {**CASES["update"][1], "residual_scale": 1.0}, "computes something else"),
    "the placement": (HalfStep, {**NET, "step": 0.5, "placement": "post"}, "computes something else"),
    "the norm": (HalfStep, {**NET, "step": 0.5, "norm": None}, "computes something else"),
    "a path": (HalfStep, {**NET, "linear1": "net.9"}, "net.9 is a builtins.NoneType, not torch.nn.Linear itself"),
    "a dropout's path": (HalfStep, {**NET, "dropout": None}, "drop is a Dropout that its description does not name"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_description_that_is_not_true_is_left(wrong):
    cls, description, reason = WRONG[wrong]
    macaron_ops.register_ffn(cls, **description)
    model, state = cls(), None
    state, before = same_state(model), dict(vars(model))
    (left,) = macaron_ops.replace_layers(model).left
    assert reason in left.reason
    assert type(model) is cls and same_state(model) == state and vars(model) == before
    with pytest.raises(ValueError, match="strict: expected a model whose layers of known families are all replaced"):
        macaron_ops.replace_layers(model, strict=True)


def test_zeros_do_not_hide_what_a_module_computes():
    macaron_ops.register_ffn(HalfStep, **NET, step=1.0)
    model = HalfStep()
    nn.init.zeros_(model.net[3].weight), nn.init.zeros_(model.net[3].bias)
    (left,) = macaron_ops.replace_layers(model).left
    assert "computes something else" in left.reason
    assert not model.net[3].weight.any()


def test_what_cannot_be_tried_is_left():
    macaron_ops.register_ffn(HalfStep, **NET, step=0.5)
    (left,) = macaron_ops.replace_layers(HalfStep().to("meta")).left
    assert "on the meta device" in left.reason

    class TwoInputs(HalfStep):
        def forward(self, x, y):
            return super().forward(x) + y

    macaron_ops.register_ffn(TwoInputs, **NET, step=0.5)
    (left,) = macaron_ops.replace_layers(TwoInputs()).left
    assert "its forward cannot be tried on a tensor of shape (2, 3, 12): TypeError" in left.reason


def test_a_class_derived_from_a_registered_one_is_left():
    macaron_ops.register_ffn(HalfStep, **NET, step=0.5)
    (left,) = macaron_ops.replace_layers(PostNorm()).left
    assert left.reason == "a subclass of HalfStep, which may do something else"


def test_a_change_after_the_replacement_is_an_error():
    macaron_ops.register_ffn(HalfStep, **NET, step=0.5)
    model = HalfStep()
    macaron_ops.replace_layers(model)
    model.net[0].register_forward_hook(print)
    with pytest.raises(RuntimeError, match=r"net\.0 has a hook, print, which would be skipped.*replace_layers"):
        model(torch.randn(2, 12))


def test_copies_and_pickles_know_the_class_once_it_is_registered():
    macaron_ops.register_ffn(HalfStep, **NET, step=0.5)
    model, x, file = HalfStep(), torch.randn(2, 12), io.BytesIO()
    macaron_ops.replace_layers(model)
    torch.save(model, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), model(x))
    name = type(model).__name__
    vars(registered).pop(name), registered.REGISTERED.clear()
    with pytest.raises(AttributeError, match=name):
        _ = getattr(registered, name)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"cls": "HalfStep"}, TypeError, "cls: expected a class of modules; got 'HalfStep'"),
        ({"linear1": None}, TypeError, "linear1: expected the path of a submodule; got None"),
        ({"dropout": 0.1}, TypeError, "dropout: expected the path of a submodule; got 0.1"),
        ({"step": None}, TypeError, "step: expected a number"),
        ({"placement": "peri"}, ValueError, "placement: expected one of 'pre', 'post'"),
        ({"placement": "post", "norm": None}, ValueError, "placement: expected 'pre' where norm is None"),
    ],
)
def test_wrong_arguments_are_refused(change, error, message):
    with pytest.raises(error, match=message):
        macaron_ops.register_ffn(**{"cls": HalfStep, **NET, **change})
    assert not registered.REGISTERED


def test_strict_undoes_what_it_did_where_something_is_left():
    macaron_ops.register_ffn(HalfStep, **NET, step=0.5)
    model = nn.Sequential(HalfStep(), HalfStep())
    hook = model[1].net[0].register_forward_hook(print)
    with pytest.raises(ValueError, match="strict: .*replaced 1 layer, left 1 layer"):
        macaron_ops.replace_layers(model, strict=True)
    assert [type(m) for m in model] == [HalfStep, HalfStep]
    hook.remove()
    assert len(macaron_ops.replace_layers(model, strict=True).replaced) == 2
    assert len(macaron_ops.replace_layers(model, strict=True).left) == 2  # replaced already


def test_strict_refuses_a_model_with_nothing_to_replace():
    with pytest.raises(ValueError, match="strict: .*nothing replaced: the model has no layer of a known family"):
        macaron_ops.replace_layers(nn.Linear(2, 2), strict=True)
