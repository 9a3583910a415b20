"""Claim: the backend that runs is the one that was asked for, or the table's first that can; a refusal says why."""

import types

import pytest
import torch

import macaron_ops
from macaron_ops import BackendError
from macaron_ops.ops import dispatch as table
from tests.ops.cases import CASES, build

CALL = next(c for c in CASES if repr(c) == "ffn_step-relu")


def call(**options):
    args, kwargs = build(CALL, torch.float32)
    return macaron_ops.ffn_step(*args, **{**kwargs, **options})


@pytest.fixture
def triton_that_declines(monkeypatch):
    """A backend for the CPU whose only operator takes relu alone: a table with a real choice."""
    declining = types.SimpleNamespace(
        why_not=lambda request: None if request.options.activation == "relu" else "it knows relu alone"
    )
    rows = tuple(row._replace(devices=("cpu",)) if row.name == "triton" else row for row in table.BACKENDS)
    monkeypatch.setattr(table, "BACKENDS", rows)
    monkeypatch.setattr(table, "_BY_NAME", {row.name: row for row in rows})
    monkeypatch.setitem(table.OPERATORS_OF, "triton", ("ffn_step",))
    monkeypatch.setitem(table._MODULES, ("triton", "ffn_step"), declining)
    monkeypatch.setattr(table, "_HAS_TRITON", True)


def explain(**options):
    args, kwargs = build(CALL, torch.float32)
    return macaron_ops.explain(macaron_ops.ffn_step, *args, **{**kwargs, **options})


def test_the_first_row_that_can_is_chosen(triton_that_declines):
    assert explain(activation="relu").backend == "triton"
    declined = explain(activation="gelu")
    assert declined.backend == "reference"
    assert ("triton", False, "it knows relu alone") in declined.rows


def test_asking_for_the_reference_wins_over_the_table(triton_that_declines):
    with macaron_ops.use_backend("reference"):
        chosen = explain(activation="relu")
        assert chosen.backend == "reference"
        assert ("triton", True, "'reference' was asked for") in chosen.rows
    assert explain(activation="relu").backend == "triton"


def test_a_named_backend_that_cannot_is_an_error(triton_that_declines):
    with macaron_ops.use_backend("triton"):
        with pytest.raises(BackendError, match="ffn_step: backend 'triton' was asked for, but it knows relu alone"):
            call(activation="gelu")
        assert explain(activation="gelu").backend is None


def test_operator_that_a_backend_lacks(triton_that_declines):
    x = torch.randn(4, 3)
    with macaron_ops.use_backend("triton"), pytest.raises(BackendError, match="it has no normalize_step"):
        macaron_ops.normalize_step(x, x, 0.1)


def test_device_that_a_backend_lacks(monkeypatch):
    monkeypatch.setitem(table.OPERATORS_OF, "cuda", ("ffn_step",))
    with macaron_ops.use_backend("cuda"), pytest.raises(BackendError, match="it runs on cuda, x is on cpu"):
        call()


def test_environment_variable(monkeypatch):
    monkeypatch.setenv("MACARON_OPS_BACKEND", "reference")
    assert explain().backend == "reference"
    monkeypatch.setenv("MACARON_OPS_BACKEND", "fastest")
    with pytest.raises(BackendError, match="MACARON_OPS_BACKEND: expected one of .*reference.*'fastest'"):
        call()


def test_context_wins_over_environment(monkeypatch):
    monkeypatch.setenv("MACARON_OPS_BACKEND", "fastest")
    with macaron_ops.use_backend("reference"):
        assert explain().backend == "reference"


def test_unknown_name():
    with (
        pytest.raises(ValueError, match="name: expected one of .*'reference'; got 'eager'"),
        macaron_ops.use_backend("eager"),
    ):
        pass


def test_an_error_inside_restores_the_choice():
    with pytest.raises(ZeroDivisionError), macaron_ops.use_backend("reference"):
        raise ZeroDivisionError
    assert table._asked_for is None


def test_callable_activation_is_for_the_definition(triton_that_declines):
    args, kwargs = build(CALL, torch.float64)
    with macaron_ops.use_backend("reference"):
        expected = macaron_ops.ffn_step(*args, **{**kwargs, "activation": "relu"})
    torch.testing.assert_close(macaron_ops.ffn_step(*args, **{**kwargs, "activation": torch.relu}), expected)
    explained = explain(activation=torch.relu)
    assert explained.backend == "reference" and "Python function" in str(explained)
    with macaron_ops.use_backend("triton"):
        assert explain(activation=torch.relu).backend is None
        with pytest.raises(BackendError, match="taken by the definition only"):
            call(activation=torch.relu)


def test_explain_reads_as_a_table():
    text = str(explain())
    assert text.startswith("ffn_step would run on: reference")
    for name in ("cuda", "triton", "native", "reference"):
        assert name in text


def test_explain_refuses_what_is_no_operator():
    with pytest.raises(TypeError, match="operator: expected an operator such as macaron_ops.ffn_step"):
        macaron_ops.explain(torch.relu, torch.ones(2))


def test_status_names_every_backend():
    statuses = macaron_ops.backends()
    assert list(statuses) == ["cuda", "triton", "native", "reference"]
    assert statuses["reference"].usable and "attend_step" in statuses["reference"].operators
    for status in statuses.values():
        assert status.reason
