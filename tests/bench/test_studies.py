"""Claim: the studies of the suite `schemes` measure what their texts say, and each is in the report with pictures."""

import copy
import dataclasses
import json
from pathlib import Path

import pytest

from macaron_ops.bench import plots, report, results, studies
from macaron_ops.bench.options import Options
from macaron_ops.bench.session import earlier, plan
from macaron_ops.bench.studies import constants, minilm, orders, training, work
from macaron_ops.splitting import CATALOGUE

QUICK = Options(effort="quick")
COMMITTED = Path(__file__).parents[2] / "bench" / "results" / "2026-11-26-cpu-amd-epyc-avx2-2-cores-schemes.json"


def test_orders():
    """Euler substeps keep every splitting at order 1 but Lie-Richardson; exact ones bring out the scheme's own."""
    data = orders.run(QUICK)
    for row in data["rows"]:
        order = CATALOGUE[row["scheme"]].order if row["scheme"] in CATALOGUE else None
        assert abs(row["flat"]["euler"] - (2 if row["scheme"] == "lie_richardson2" else 1)) < 0.2
        assert order is None or abs(row["flat"]["exact"] - order) < 0.1
    head, *rows = orders.table(data)
    assert head[5:] == ("euler", "exact", "sphere, exact") and all(len(row) == len(head) for row in rows)
    json.dumps(data, allow_nan=False)


def test_error_constants():
    """At equal step Strang is more accurate, at equal cost BAB is about even, Heun is better."""
    found = constants.run(QUICK)["ratios"]
    medians = {what: ratio["50"] for what, ratio in found.items()}
    assert 0.4 < medians["Strang BAB, equal step"] < 0.9
    assert 0.7 < medians["Strang BAB, equal cost"] < 1.4
    assert 0.7 < medians["half-width FFNs (Macaron), equal step and cost"] < 1.4
    assert medians["Heun unsplit, equal cost"] < 0.5
    assert 0.2 < found["Strang BAB, equal cost"]["below_1"] < 0.8


def test_work(monkeypatch):
    monkeypatch.setattr(work, "PAIRS", (("strang_BAB", "midpoint"), ("unsplit", "rk4")))
    strang, unsplit = work.run(QUICK)["curves"]
    assert strang["evaluations"] == [24, 48, 96, 192] and unsplit["evaluations"] == [32, 64, 128, 256]
    assert strang["errors"] == sorted(strang["errors"], reverse=True)
    assert min(strang["seconds"]) > 0


def test_both_schemes_train(monkeypatch):
    monkeypatch.setattr(training, "SEEDS", (0,))
    monkeypatch.setattr(training, "_STEPS", {"quick": 20})
    data = training.run(QUICK)
    parameters = []
    for runs in data["curves"].values():
        (found,) = runs
        assert found["losses"][-1] < 3.6 < found["losses"][0]
        parameters.append(found["parameters"])
    assert abs(parameters[0] / parameters[1] - 1) < 0.01


def test_a_real_model(monkeypatch):
    pytest.importorskip("transformers")
    if not minilm.model.importlib.util.find_spec(minilm.model.PACKAGE):
        pytest.skip(f"{minilm.model.PACKAGE} is not installed")
    part = copy.deepcopy(minilm.model.load_model())
    part.encoder.layer = part.encoder.layer[3:5]  # two layers that few steps resolve
    monkeypatch.setattr(minilm.model, "load_model", lambda: part)
    monkeypatch.setattr(minilm, "_SENTENCES", {"quick": 1})
    data = minilm.run(QUICK)
    assert [layer["layer"] for layer in data["layers"]] == ["encoder.layer.0", "encoder.layer.1"]
    for layer in data["layers"]:
        middle = {measure: found["50"] for measure, found in layer["errors"].items()}
        assert middle["strang_exact"] < middle["lie_trotter_exact"] < middle["lie_trotter"]
        assert layer["resolved"] <= 1e-3
    assert len(data["sentence"]["tokens"]) == len(data["sentence"]["lie_trotter"][0]) == data["tokens"]


def test_every_study_is_in_the_report():
    document = results.load(COMMITTED)
    page = report.render(document, [])
    drawn = plots.study_plots(document)
    assert [study.name for study, _ in studies.found(document)] == [study.name for study in studies.STUDIES]
    for study, data in studies.found(document):
        assert f"<h2>{study.title}</h2>" in page
        assert all(len(row) == len(study.table(data)[0]) for row in study.table(data))
    assert len(drawn) == 6
    assert all(plot.caption.split(":")[0] in page.replace("&#x27;", "'") for plot in drawn)


def test_a_filter_chooses_studies_and_a_resumed_run_keeps_them(tmp_path):
    options = dataclasses.replace(QUICK, filters=("schemes/work", "schemes/orders"))
    assert plan(["schemes"], options) == []
    names = [study.name for study in studies.wanted(["schemes"], options, {})]
    assert names == ["orders", "work"]
    assert [study.name for study in studies.wanted(["schemes"], options, {"orders": {}})] == ["work"]
    assert studies.wanted(["layers"], QUICK, {}) == []
    assert earlier(tmp_path, options) == {}
