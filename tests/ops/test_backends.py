"""Claim: the backend that runs is the one that was asked for, or the table's first that can; a refusal says why."""

import types

import pytest
import torch

import macaron_ops
from macaron_ops import BackendError
from macaron_ops.ops import dispatch as table
from macaron_ops.ops.run import forget
from tests.ops.cases import CASES, build

CALL = next(c for c in CASES if repr(c) == "ffn_step-relu")


def call(**options):
    args, kwargs = build(CALL, torch.float32)
    return macaron_ops.ffn_step(*args, **{**kwargs, **options})


@pytest.fixture
def triton_that_declines(monkeypatch):
    """A backend for the CPU whose only operator takes relu alone and is slow at gated ones: a table with a choice
    between it and the reference."""
    monkeypatch.setitem(table.UNUSABLE, "native", "a test without it")
    module = types.SimpleNamespace(
        why_not=lambda request: None if request.options.activation in ("relu", "swiglu") else "it knows relu alone",
        slower=lambda request: "gates are slow" if request.options.activation == "swiglu" else None,
    )
    rows = tuple(row._replace(devices=("cpu",)) if row.name == "triton" else row for row in table.BACKENDS)
    monkeypatch.setattr(table, "BACKENDS", rows)
    monkeypatch.setattr(table, "_BY_NAME", {row.name: row for row in rows})
    monkeypatch.setitem(table.OPERATORS_OF, "triton", ("ffn_step",))
    monkeypatch.setitem(table.UNUSABLE, "triton", None)
    monkeypatch.setitem(table.MODULES, ("triton", "ffn_step"), module)
    forget()


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """``installed(name, files)``: a package with these files, as a row of the table would find it."""
    monkeypatch.syspath_prepend(tmp_path)

    def install(name, files):
        (tmp_path / name).mkdir()
        for file, text in files.items():
            (tmp_path / name / file).write_text(text)
        return table._load(table.Backend(name, name, None, None, "a test"))

    return install


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


def test_a_backend_steps_aside_where_it_is_slower(triton_that_declines):
    """For the table alone: asked for by name it runs."""
    gated = {"activation": "swiglu", "w_in": torch.randn(80, 24), "b_in": None}
    args, kwargs = build(CALL, torch.float32)
    call = (args[0], gated["w_in"], None, *args[3:]), {**kwargs, "activation": "swiglu"}
    chosen = macaron_ops.explain(macaron_ops.ffn_step, *call[0], **call[1])
    assert chosen.backend == "reference" and ("triton", True, "gates are slow") in chosen.rows
    with macaron_ops.use_backend("triton"):
        assert macaron_ops.explain(macaron_ops.ffn_step, *call[0], **call[1]).backend == "triton"


def test_an_emulated_backend_runs_on_the_cpu_by_name_alone(triton_that_declines, monkeypatch):
    row = table._BY_NAME["triton"]._replace(devices=("cuda",))
    monkeypatch.setitem(table._BY_NAME, "triton", row)
    monkeypatch.setattr(table, "BACKENDS", tuple(row if r.name == "triton" else r for r in table.BACKENDS))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert explain(activation="relu").backend == "reference"
    with macaron_ops.use_backend("triton"):
        assert explain(activation="relu").backend == "triton"
        monkeypatch.setenv("TRITON_INTERPRET", "0")
        assert explain(activation="relu").backend is None


def test_a_package_is_found_by_its_files(installed):
    operators, modules, reason = installed("sound", {"__init__.py": "", "ffn_step.py": "forward = backward = None"})
    assert operators == ("ffn_step",) and list(modules) == [("sound", "ffn_step")] and reason is None


def test_a_package_that_is_unusable_says_why(installed):
    files = {"__init__.py": "def why_unusable():\n    return 'built for another torch'", "ffn_step.py": "1 / 0"}
    assert installed("unusable", files) == (("ffn_step",), {}, "built for another torch")


def test_a_package_that_does_not_load_is_a_reason_and_no_crash(installed):
    broken = installed("broken", {"__init__.py": "raise OSError('undefined symbol: aoti')"})
    assert broken == ((), {}, "broken does not load: undefined symbol: aoti")
    halves = installed("halves", {"__init__.py": "", "ffn_step.py": "1 / 0"})
    assert halves == (("ffn_step",), {}, "halves does not load: division by zero")
    assert installed("needy", {"__init__.py": "import nowhere"})[2] == "needy needs nowhere, which is not installed"
    absent = table._load(table.Backend("x", "macaron_ops.nowhere.cpu", None, None, ""))
    assert absent[2] == "this installation has no operator for it (nothing in macaron_ops.nowhere.cpu)"
    assert installed("empty", {"__init__.py": ""})[2] == "this installation has no operator for it (nothing in empty)"


def test_explaining_draws_no_seed():
    state = torch.get_rng_state()
    explain(dropout=0.5)
    assert torch.equal(torch.get_rng_state(), state)
    call(dropout=0.5)
    assert not torch.equal(torch.get_rng_state(), state)


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
    monkeypatch.delenv("MACARON_OPS_CUDA_ON_HOST", raising=False)
    monkeypatch.setitem(table.OPERATORS_OF, "cuda", ("ffn_step",))
    monkeypatch.setitem(table.UNUSABLE, "cuda", None)
    forget()
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
    assert text.startswith(f"ffn_step would run on: {explain().backend}")
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
