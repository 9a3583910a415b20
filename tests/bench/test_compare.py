"""A regression is flagged when it is past the noise of both runs, and only then."""

import pytest

from macaron_ops.bench.compare import IMPROVEMENT, REGRESSION, SAME, compare


@pytest.mark.parametrize(
    ("old", "new", "verdict"),
    [
        ((1.0, 0.05), (1.2, 0.05), REGRESSION),
        ((1.0, 0.05), (1.05, 0.05), SAME),
        ((1.0, 0.50), (1.2, 0.05), SAME),  # the old run was too noisy to tell
        ((1.0, 0.05), (1.2, 0.50), SAME),  # the new one is
        ((1.0, 0.05), (0.8, 0.05), IMPROVEMENT),
        ((1.0, 0.05), (1.0, 0.05), SAME),
    ],
)
def test_verdict(make_document, make_row, old, new, verdict):
    found = compare(make_document(make_row("a", *new)), make_document(make_row("a", *old)))
    assert [change.verdict for change in found.changes] == [verdict]
    assert found.changes[0].ratio == pytest.approx(new[0] / old[0])


def test_only_the_same_measurement_is_compared(make_document, make_row):
    new = make_document(make_row("a"), make_row("b"), make_row("a", shape={"batch": 4}))
    old = make_document(make_row("a"), make_row("b", **{"pass": "forward+backward"}))
    found = compare(new, old)
    assert len(found.changes) == 1
    assert len(found.only_new) == 2
    assert len(found.only_old) == 1


def test_a_row_without_a_time_is_not_compared(make_document, make_row):
    found = compare(make_document(make_row(status="failed", reason="out of memory")), make_document(make_row()))
    assert not found.changes


def test_a_regression_is_told_in_words(make_document, make_row):
    found = compare(make_document(make_row("eager Strang", 2.0)), make_document(make_row("eager Strang", 1.0)))
    text = str(found.regressions[0])
    assert text.startswith("regression: layers wmt-base float32 forward eager Strang: 2,000 ms") or "2000 ms" in text
    assert "2.00x the time" in text
    assert found.summary() == "1 measurements in both runs: 1 regression, 0 improvement, 0 within noise."


def test_another_machine_is_warned_of(make_document, make_row):
    new, old = make_document(make_row()), make_document(make_row())
    old["environment"] = {"device": {"name": "another"}, "device_type": "cuda", "versions": {"torch": "2.13"}}
    warnings = compare(new, old).warnings
    assert "device was another, is a machine" in warnings
    assert "torch was 2.13, is 2.11" in warnings
    assert not compare(new, new).warnings
