"""A goal is judged by medians of one group, over all it matches, and a run without its measurements leaves it out."""

import pytest

from macaron_ops.bench import goals
from macaron_ops.bench.goals import Goal, findings

FFN = {"suite": "ops", "dtype": "float32", "pass": "forward"}


@pytest.fixture
def judge(make_document, monkeypatch):
    def judge(goal, *rows):
        monkeypatch.setattr(goals, "GOALS", (goal,))
        return findings(make_document(*rows))

    return judge


def group(make_row, preset, eager, ours, products=None, **fields):
    """The rows of one group with these seconds."""
    seconds = {"eager": eager, "macaron_ops native": ours, "bare products": products}
    subject = f"ffn_step {preset}"
    return [make_row(name, t, subject=subject, **FFN | fields) for name, t in seconds.items() if t is not None]


def speed_goal(bound, **fields):
    return Goal("ffn_step", ("ops", "ffn_step *", "float32", "forward"), "macaron_ops native", "eager", bound, **fields)


def test_median_and_worst_over_the_presets(judge, make_row):
    rows = [
        *group(make_row, "a", eager=1.0, ours=1.25, products=1.0),
        *group(make_row, "b", eager=3.0, ours=2.0, products=1.0),
        *group(make_row, "c", eager=4.0, ours=2.0, products=1.5),
    ]
    (median,) = judge(speed_goal(1.2), *rows)
    assert (median.figure, median.met, median.share) == (1.5, True, 0.75)
    (worst,) = judge(speed_goal(1.0, of=goals.WORST), *rows)
    assert (worst.figure, worst.met) == (0.8, False)
    assert worst.cells() == (
        "ffn_step: macaron_ops native, forward in float32",
        "worst speed over eager",
        "0.80x (0.80x a to 2.00x c, 3 in all)",
        "at least 1.00x",
        "slower, missed",
        "75%",
    )


def test_a_ratio_is_taken_within_its_own_group(judge, make_row):
    rows = [
        *group(make_row, "a", eager=1.0, ours=1.0),
        *group(make_row, "a", eager=9.0, ours=9.0, dtype="bfloat16"),
        *group(make_row, "a", eager=9.0, ours=9.0, **{"pass": "forward+backward"}),
    ]
    (finding,) = judge(speed_goal(1.0), *rows)
    assert finding.figures == {"a": 1.0}
    assert finding.share is None


def test_other_shapes_failures_and_missing_denominators_are_not_judged(judge, make_row):
    goal = speed_goal(1.0, shape={"particles": 16384})
    assert judge(goal, *group(make_row, "a", 1.0, 1.0, shape={"particles": 4096})) == []
    assert len(judge(goal, *group(make_row, "a", 1.0, 1.0, shape={"particles": 16384, "batch": 1}))) == 1
    assert judge(speed_goal(1.0), *group(make_row, "a", None, 1.0)) == []
    assert judge(speed_goal(1.0), *group(make_row, "a", 1.0, 1.0, status="failed", reason="no memory")) == []


def test_memory_is_at_most_its_bound(judge, make_row):
    where = ("ops", "ffn_step *", "float32", "forward")
    eager, ours = group(make_row, "a", 1.0, 1.0)
    ours["memory"] = {"peak_bytes": 300_000_000, "activation_bytes": 512, "kept_bytes": None, "method": "test"}
    (ratio,) = judge(Goal("", where, "macaron_ops native", "eager", 0.4, goals.ACTIVATIONS), eager, ours)
    assert (ratio.figure, ratio.met) == (0.5, False)
    (peak,) = judge(Goal("", where, "macaron_ops native", None, 300e6, goals.BYTES), ours)
    assert peak.met
    assert peak.cells()[1:5] == ("median memory", "300 MB", "at most 300 MB", "met")


def test_a_share_of_the_copy_bandwidth_and_a_speed_as_launched(judge, make_row):
    where = ("ops", "layer_norm ??* MB", "float32", "forward")
    goal = Goal("rows", where, "macaron_ops native", None, 0.9, goals.COPY, of=goals.WORST)
    rows = [
        make_row("macaron_ops native", subject=f"layer_norm {size} MB", extra={"share_of_copy": share}, **FFN)
        for size, share in ((1, 0.2), (64, 0.93), (256, 0.88))
    ]
    (finding,) = judge(goal, *rows)
    assert (finding.figure, finding.met) == (0.88, False)  # one megabyte is not asked for
    assert finding.cells()[1:5] == (
        "worst share of copy bandwidth",
        "88% (88% layer_norm 256 MB to 93% layer_norm 64 MB, 2 in all)",
        "at least 90%",
        "missed",
    )
    eager, ours = group(make_row, "a", eager=4.0, ours=1.0)
    eager["extra"], ours["extra"] = {"launched": {"median": 6.0}}, {"launched": {"median": 8.0}}
    (launched,) = judge(speed_goal(1.0, figure=goals.LAUNCHED), eager, ours)
    assert launched.figure == 0.75 and launched.cells()[4] == "slower, missed"


def test_a_time(judge, make_row):
    where = ("ops", "ffn_step *", "float32", "forward")
    slow, fast = (Goal("", where, "macaron_ops native", None, bound, goals.TIME) for bound in (1.0, 1.5))
    (slow,) = judge(slow, *group(make_row, "a", eager=4.0, ours=1.5))
    assert (slow.figure, slow.met) == (1.5, False)
    (fast,) = judge(fast, *group(make_row, "a", eager=4.0, ours=1.5))
    assert fast.met and fast.cells()[1:5] == ("median time", "1.50 s", "at most 1.50 s", "met")


def test_goals_over_many_tokens_are_not_judged_by_few(judge, make_row):
    goal = speed_goal(1.0, tokens=16384)
    assert judge(goal, *group(make_row, "a", 1.0, 1.0, tokens=4096)) == []
    assert len(judge(goal, *group(make_row, "a", 1.0, 1.0, tokens=16384))) == 1


def test_every_goal_names_a_variant_and_suite_that_the_harness_measures():
    for goal in goals.GOALS:
        assert goal.where[0] in ("layers", "ops", "model", "ngpt")
        assert goal.where[3] in ("forward", "forward+backward")
        assert goal.variant.startswith((goals.NATIVE, goals.TRITON, goals.CUDA, goals.AUTO, goals.AFTER))
