"""Claim: a call that was planned before computes, bit for bit, what it computes when it is planned anew, whatever else
was called in between; what is not plain eager code is never planned; a plan keeps no tensor alive."""

import gc
import threading
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import macaron_ops
from macaron_ops import attend_step, ffn_step, split_layer, substep
from macaron_ops.ops import run
from tests.ops.cases import CASES, build

USABLE = [name for name in ("native", "reference") if macaron_ops.backends()[name].usable]
FFN = next(case for case in CASES if repr(case) == "ffn_step-gelu")
NAMES = ("x", "w_in", "b_in", "w_out", "b_out")


@pytest.fixture(autouse=True)
def no_plans():
    run.forget()


def planned() -> int:
    return len(run._remembered)


def results(call):
    """The output and, where it has some, the gradients of ``call()``, which returns (y, leaves)."""
    y, leaves = call()
    if not y.requires_grad:
        return [y]
    return [y, *torch.autograd.grad(y, leaves, torch.ones_like(y) / 3, allow_unused=True)]


def same(actual, expected):
    return all(a is b or torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def leaves_of(args, kwargs):
    found = [t for a in (*args, *kwargs.values()) for t in (a if isinstance(a, tuple) else (a,))]
    return [t for t in found if isinstance(t, torch.Tensor) and t.is_floating_point()]


@pytest.mark.parametrize("trained", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("backend", USABLE)
@pytest.mark.parametrize("case", CASES, ids=repr)
def test_a_planned_call_computes_the_same(case, backend, trained):
    def call(seed):
        args, kwargs = build(case, torch.float32, seed=seed)
        constants = kwargs.get("rotary", ())
        leaves = [t for t in leaves_of(args, kwargs) if trained and all(t is not c for c in constants)]
        for t in leaves:
            t.requires_grad_()
        return case.operator(*args, **kwargs), leaves

    with macaron_ops.use_backend(backend):
        again = [results(lambda seed=seed: call(seed)) for seed in (1, 2, 3)]
        assert planned() == (0 if "dropout" in repr(case) or "everything" in repr(case) else 1)  # seeds that are ints
        for seed, result in zip((1, 2, 3), again, strict=True):
            run.forget()
            assert same(result, results(lambda seed=seed: call(seed)))


def changed(**changes):
    """``ffn_step``'s arguments with some changed, and all it may depend on beside them."""
    args, kwargs = build(FFN, torch.float32)
    return {**dict(zip(NAMES, args, strict=True)), **kwargs, **changes}


X = changed()["x"]
W = changed()["w_in"]
AROUND = torch.randn(X.numel() + 1)
MUTATIONS = {
    "nothing": {},
    "shape": {"x": X[:, :3].clone()},
    "one more dimension": {"x": X[None].clone()},
    "strides": {"x": torch.randn(7, 2, 24).transpose(0, 1)},
    "strides of a weight": {"w_in": torch.randn(24, 40).T},
    "gaps": {"b_in": torch.randn(80)[::2]},
    "expanded": {"x": torch.randn(24).expand(2, 7, 24)},
    "offset": {"x": AROUND[1:].view(X.shape)},
    "dtype": {name: t.bfloat16() for name, t in changed().items() if isinstance(t, torch.Tensor)},
    "float64": {name: t.double() for name, t in changed().items() if isinstance(t, torch.Tensor)},
    "norm in float32": {name: t.bfloat16() for name, t in changed().items() if name in NAMES},
    "no bias": {"b_in": None},
    "no other bias": {"b_out": None},
    "no norm_weight": {"norm_weight": None},
    "no norm": {"norm": None, "norm_weight": None, "norm_bias": None},
    "norm": {"norm": "rms"},
    "eps": {"eps": 1e-2},
    "activation": {"activation": "relu"},
    "function": {"activation": torch.sin},
    "gated": {"activation": "swiglu", "w_in": torch.randn(80, 24), "b_in": torch.randn(80)},
    "step": {"step": 0.25},
    "the same number elsewhere": {"residual_scale": 0.25},
    "whole step": {"step": 1},
    "no step": {"step": 0.0},
    "minus no step": {"step": -0.0},
    "residual": {"residual_scale": 2.0},
    "placement": {"placement": "post"},
    "seed without dropout": {"seed": 3},
    "dropout": {"dropout": 0.5, "seed": 3},
    "another seed": {"dropout": 0.5, "seed": 4},
    "seed as a tensor": {"dropout": 0.5, "seed": torch.tensor(5)},
    "other dropout": {"activation_dropout": 0.5, "seed": 3},
    "lean": {"save": "lean"},
    "the same tensor twice": {"b_out": changed()["norm_bias"], "norm_bias": "b_out"},
    "negated": {"x": torch._neg_view(X.clone())},
    "empty": {"x": torch.zeros(0, 24)},
}
CONTEXTS = {
    "": lambda: torch.enable_grad(),
    "no_grad": lambda: torch.no_grad(),
    "inference_mode": lambda: torch.inference_mode(),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "autocast float16": lambda: torch.autocast("cpu", dtype=torch.float16),
    "reference": lambda: macaron_ops.use_backend("reference"),
}


def outcome(mutation, context, trained):
    """Everything that a call gives, its refusal too; its tensors are new ones each time."""
    arguments = changed(**MUTATIONS[mutation])
    if arguments["norm_bias"] == "b_out":
        arguments["norm_bias"] = arguments["b_out"]
    leaves = []
    for name, value in arguments.items():
        if name in trained and isinstance(value, torch.Tensor):
            arguments[name] = value.detach().requires_grad_()
            leaves.append(arguments[name])
    try:
        with CONTEXTS[context]():
            y = ffn_step(**arguments)
        return [t for t in results(lambda: (y, leaves)) if t is not None]
    except (TypeError, ValueError, RuntimeError) as error:
        return f"{type(error)} {error}"


@pytest.mark.parametrize("trained", [(), ("w_in", "b_out"), ("x", *NAMES)], ids=["", "some", "all"])
def test_no_fact_is_missing_from_a_signature(trained):
    """All mutations in all contexts, each met after all others were planned, and with the last planned first."""
    cases = [(m, c) for m in MUTATIONS for c in CONTEXTS]
    expected = {}
    for case in cases:
        run.forget()
        expected[case] = outcome(*case, trained)
    for order in (cases, cases[::-1]):
        run.forget()
        for case in 3 * order:  # met, planned, recalled
            actual, wanted = outcome(*case, trained), expected[case]
            if isinstance(wanted, str):
                assert actual == wanted, case
            else:
                assert [t.dtype for t in actual] == [t.dtype for t in wanted] and same(actual, wanted), case
    assert planned() > len(cases) // 2


def test_the_environment_is_looked_at(monkeypatch):
    expected = {}
    for name in ("reference", USABLE[0]):
        run.forget()
        monkeypatch.setenv("MACARON_OPS_BACKEND", name)
        expected[name] = ffn_step(**changed())
    for name in 2 * ("reference", USABLE[0]):
        monkeypatch.setenv("MACARON_OPS_BACKEND", name)
        assert torch.equal(ffn_step(**changed()), expected[name])
    monkeypatch.setenv("MACARON_OPS_BACKEND", "fastest")
    with pytest.raises(macaron_ops.BackendError, match="MACARON_OPS_BACKEND"):
        ffn_step(**changed())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": True}, "seed: expected an int"),
        ({"b_out": 0.0}, "b_out: expected a tensor or None"),
        ({"step": True}, "step: expected a number"),
        ({"w_in": W[:, :5].contiguous()}, "w_in: expected shape"),
        ({"w_in": W.double()}, "w_in: expected the dtype of x"),
        ({"w_in": W.to("meta")}, "w_in: expected a tensor on the device of x"),
        ({"w_in": W.to_sparse()}, "w_in: expected a dense strided tensor"),
        ({"w_in": W.to_mkldnn()}, "w_in: expected a dense strided tensor"),
        ({"x": torch.nested.nested_tensor([X[0]])}, "x: expected a dense strided tensor"),
        ({"save": "all"}, "save: expected one of"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_differs_from_a_planned_call_is_refused(change, message):
    planned_call = changed(step=1, seed=1)
    for _ in range(2):
        ffn_step(**planned_call)
    with pytest.raises((TypeError, ValueError), match=message):
        ffn_step(**planned_call | change)


def test_borders_are_read_in_every_call():
    x, w = torch.randn(9, 4), torch.randn(4, 4)
    w_qkv, borders = torch.randn(12, 4), torch.tensor([0, 3, 9], dtype=torch.int32)
    for _ in range(3):
        attend_step(x, w_qkv, None, w, None, 2, cu_seqlens=borders)
    assert planned() == 1
    borders[1] = 10
    with pytest.raises(ValueError, match="cu_seqlens: expected borders that rise"):
        attend_step(x, w_qkv, None, w, None, 2, cu_seqlens=borders)


def test_a_planned_call_draws_its_own_seed():
    def calls():
        torch.manual_seed(7)
        return torch.stack([ffn_step(**changed(dropout=0.5)) for _ in range(4)])

    anew, again = calls(), calls()
    assert planned() == 1 and torch.equal(anew, again)
    assert not torch.equal(again[1], again[2])


def test_aliases_are_a_fact():
    """Two weights that are one tensor get one gradient, and are told from two equal ones."""

    def gradients(shared):
        first = changed()["w_in"].requires_grad_()
        second = first if shared else first.detach().clone().requires_grad_()
        rest = [t for name, t in changed().items() if name in NAMES[2:]]
        y = split_layer(X, [substep(ffn_step, first, *rest), substep(ffn_step, second, *rest)])
        return torch.autograd.grad(y.sum(), [first] if shared else [first, second])

    for _ in range(3):
        (both,), (one, two) = gradients(True), gradients(False)
        torch.testing.assert_close(both, one + two)
    assert planned() == 2


def test_a_plan_keeps_no_tensor():
    for trained in (False, True):
        arguments = changed(x=X.clone().requires_grad_(trained))
        for _ in range(3):
            y = ffn_step(**arguments)
        dead = [weakref.ref(t) for t in (y, *(t for t in arguments.values() if isinstance(t, torch.Tensor)))]
        del y, arguments
        gc.collect()
        assert all(ref() is None for ref in dead)
    assert planned() == 2


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))


def test_whoever_looks_on_sees_the_raw_operators():
    """After a plan was made and used: a mode sees one operator, transforms see through it, a compiler traces it."""
    arguments = changed()
    with macaron_ops.use_backend("reference"):
        for _ in range(3):
            expected = ffn_step(**arguments)
        with Seen() as seen:
            ffn_step(**arguments)
        assert seen.names == ["macaron_ops::reference_ffn_step_forward"]
        rows = torch.func.vmap(lambda x: ffn_step(**{**arguments, "x": x}))(X)
        torch.testing.assert_close(rows, expected)
        traced = torch.jit.trace(lambda x: ffn_step(**{**arguments, "x": x}), X, check_trace=False)
        assert "macaron_ops::reference_ffn_step_forward" in str(traced.graph)
        meta = ffn_step(**{n: t.to("meta") if isinstance(t, torch.Tensor) else t for n, t in arguments.items()})
        assert meta.device.type == "meta"


def test_threads_share_plans():
    calls = [changed(x=torch.randn(2, n, 24)) for n in (3, 4, 5, 6)]
    expected = [ffn_step(**call) for call in calls]
    run.forget()
    wrong = []

    def work(first):
        for i in range(200):
            at = (first + i) % len(calls)
            if i % 50 == first:
                run.forget()
            if not torch.equal(ffn_step(**calls[at]), expected[at]):
                wrong.append(at)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_the_newest_plans_are_kept(monkeypatch):
    monkeypatch.setattr(run, "_MOST", 5)
    for n in range(1, 14):
        for _ in range(2):
            ffn_step(**changed(x=torch.randn(n, 24)))
        kept = [m for m in range(1, 14) if any(torch.Size((m, 24)) in key for key in run._remembered)]
        assert kept == list(range(max(n - 4, 1), n + 1)) and len(run._met) <= 5


def test_what_comes_once_is_not_planned(monkeypatch):
    """And takes no other's place."""
    monkeypatch.setattr(run, "_MOST", 5)
    for _ in range(2):
        ffn_step(**changed())
    for n in range(1, 14):
        ffn_step(**changed(x=torch.randn(n, 24)))
    assert planned() == 1 and any(X.shape in key for key in run._remembered)
