"""The results file round-trips, is valid at every moment, and a file that is not one is refused by name."""

import json
import re
from pathlib import Path

import pytest

from macaron_ops.bench import results
from macaron_ops.bench.results import Results, ResultsError

COMMITTED = Path(__file__).resolve().parents[2] / "bench" / "results"


def test_rows_round_trip(tmp_path, make_row, make_document):
    written = Results(tmp_path, make_document())
    written.add([make_row(), make_row("eager Strang", 2.0)])
    written.finish("complete")
    loaded = results.load(tmp_path)
    assert loaded == written.document
    assert loaded == results.load(tmp_path / "results.json")
    assert loaded["rows"][1]["time"]["percentiles"]["50"] == 2.0


@pytest.mark.parametrize("path", sorted(COMMITTED.glob("*.json")), ids=lambda path: path.stem)
def test_what_is_committed_says_where_it_was_measured(path):
    document = json.loads(path.read_text()) if path.stem.endswith("ffn-tiles") else results.load(path)
    assert document["environment"]["device"]["name"] and document["environment"]["versions"]["torch"]
    assert document.get("status", "complete") != "running"
    assert not re.search(r"[\s\"'(]/(tmp|home|root|work|Users)/", path.read_text())


def test_the_file_is_valid_after_every_group_and_after_an_interruption(tmp_path, make_row, make_document):
    running = Results(tmp_path, make_document(status="running"))
    running.write()
    assert results.load(tmp_path)["rows"] == []
    running.add([make_row()])
    assert results.load(tmp_path)["status"] == "running"
    running.finish("interrupted")
    assert len(results.load(tmp_path)["rows"]) == 1


def test_an_interruption_while_writing_leaves_the_file_before(tmp_path, make_row, make_document, monkeypatch):
    running = Results(tmp_path, make_document())
    running.add([make_row()])

    def interrupted(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        running.add([make_row("eager Strang")])
    assert [row["variant"] for row in results.load(tmp_path)["rows"]] == ["eager Lie-Trotter"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": "macaron_ops.bench/0"}, "schema is 'macaron_ops.bench/0', expected 'macaron_ops.bench/1'"),
        ({"status": "paused"}, "status is 'paused', expected one of running, complete, interrupted"),
        ({"rows": {}}, "field 'rows' is {}"),
        ({"rows": [3]}, r"rows\[0\]: expected an object, got int"),
    ],
)
def test_a_document_of_another_form_is_refused(make_document, change, message):
    with pytest.raises(ResultsError, match=message):
        results.validate(make_document() | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"variant": 7}, "field 'variant' is 7"),
        ({"status": "slow"}, "status is 'slow'"),
        ({"status": "failed", "reason": None}, "status 'failed' without a reason"),
        ({"time": {"median": float("nan")}}, "time.median is nan"),
        ({"time": {"median": 1.0, "p20": 0.0}}, "time.p20 is 0.0"),
    ],
)
def test_a_row_of_another_form_is_refused(make_document, make_row, change, message):
    with pytest.raises(ResultsError, match=message):
        results.validate(make_document(make_row() | change))


def test_a_missing_field_is_named_with_its_meaning(make_document, make_row):
    row = make_row()
    del row["tokens_per_s"]
    with pytest.raises(ResultsError, match=r"no field 'tokens_per_s' \(tokens / median time\)"):
        results.validate(make_document(row))


def test_a_row_that_was_not_timed_needs_no_numbers(make_document, make_row):
    row = {name: make_row()[name] for name in results.ROW_FIELDS} | {"status": "wrong", "reason": "off by 1"}
    results.validate(make_document(row))
    with pytest.raises(ResultsError):  # a timed one does
        results.validate(make_document(row | {"status": "ok"}))


def test_load_says_what_is_wrong_with_a_file(tmp_path):
    with pytest.raises(ResultsError, match="No such file"):
        results.load(tmp_path / "nowhere.json")
    (tmp_path / "text.json").write_text("not json")
    with pytest.raises(ResultsError, match=r"text\.json: not JSON"):
        results.load(tmp_path / "text.json")
    (tmp_path / "other.json").write_text(json.dumps({"a": 1}))
    with pytest.raises(ResultsError, match=r"other\.json: schema is None"):
        results.load(tmp_path / "other.json")
