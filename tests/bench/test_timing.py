"""Timing: rounds are interleaved and fair, end when settled or spent, and tell medians and ratios. On a fake clock."""

import pytest

from macaron_ops.bench.timing import Budget, Timing, measure, percentile, speedup


class FakeClock:
    """Time passes only when a call is sampled: call `name` takes the next of its `seconds`, then the last for ever."""

    method, warmup_seconds = "fake", 0.0

    def __init__(self, **seconds):
        self.seconds = {name: list(values) for name, values in seconds.items()}
        self.time = 0.0
        self.order = []

    def sample(self, call, calls):
        name = call()
        values = self.seconds[name]
        value = values.pop(0) if len(values) > 1 else values[0]
        self.time += value * calls
        self.order.append((name, calls))
        return value

    def now(self):
        return self.time


def variants(*names):
    return {name: lambda name=name: name for name in names}


BUDGET = Budget(seconds=1.0, min_rounds=4, max_rounds=50, sample_seconds=0.1, warmup_calls=1)


def test_every_variant_is_sampled_once_a_round_and_each_round_starts_with_another():
    clock = FakeClock(a=[0.1], b=[0.1], c=[0.1])
    measure(variants("a", "b", "c"), clock, BUDGET)
    order = [name for name, _ in clock.order[3:]]  # after the warm-up
    assert order[:9] == ["a", "b", "c", "b", "c", "a", "c", "a", "b"]


def test_a_short_call_is_repeated_until_a_sample_is_long_enough():
    clock = FakeClock(short=[0.01], long=[0.5])
    timings = measure(variants("short", "long"), clock, BUDGET)
    assert timings["short"].calls == 10
    assert timings["long"].calls == 1


def test_a_call_that_takes_the_whole_budget_is_warmed_up_once():
    clock = FakeClock(slow=[2.0])
    measure(variants("slow"), clock, Budget(seconds=1.0, min_rounds=3, warmup_calls=5))
    assert len(clock.order) == 1 + 3


def test_rounds_end_when_every_median_has_settled():
    timings = measure(variants("steady"), FakeClock(steady=[0.1]), BUDGET)
    assert len(timings["steady"].samples) == BUDGET.min_rounds


def test_rounds_of_a_noisy_call_end_when_the_budget_is_spent():
    clock = FakeClock(noisy=[0.1, 0.2] * 100)
    timings = measure(variants("noisy"), clock, BUDGET)
    samples = timings["noisy"].samples
    assert len(samples) > BUDGET.min_rounds
    assert 1.0 <= sum(samples) <= 1.2


def test_at_least_min_rounds_however_slow_the_call():
    timings = measure(variants("slow"), FakeClock(slow=[30.0]), BUDGET)
    assert len(timings["slow"].samples) == BUDGET.min_rounds


def test_progress_never_goes_back_and_ends_within_one():
    shares = []
    measure(variants("noisy"), FakeClock(noisy=[0.1, 0.2] * 100), BUDGET, shares.append)
    assert shares == sorted(shares)
    assert 0 < shares[0] <= shares[-1] <= 1


def test_percentiles_are_linear_between_samples():
    assert percentile((3.0, 1.0, 2.0), 50) == 2.0
    assert percentile((0.0, 1.0), 20) == pytest.approx(0.2)
    assert percentile((5.0,), 80) == 5.0


def test_speedup_is_the_median_of_the_ratios_within_rounds():
    # The machine halves its speed after the first round; the ratio does not notice.
    fast, slow = Timing((1.0, 2.0, 2.0), 1), Timing((3.0, 6.0, 6.0), 1)
    ratio = speedup(of=fast, over=slow)
    assert ratio["median"] == ratio["p20"] == ratio["p80"] == 3.0


def test_an_exception_of_a_call_passes_through():
    def broken():
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        measure({"broken": broken}, FakeClock(), BUDGET)
