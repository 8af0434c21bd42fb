"""Intervals cover, planted differences are found, and nothing is claimed from too little."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from lrcompress.reporting.metric import Metric
from lrcompress.reporting.significance import _newcombe_interval, comparisons, holm, holm_levels


def windows(model: str, losses: np.ndarray, tokens: int = 100) -> Metric:
    samples = [[float(loss) * tokens, tokens] for loss in losses]
    value = float(np.exp(losses.mean()))
    return Metric(model, "token perplexity", value, "", False, {"data": "x"}, samples=samples)


def items(model: str, right: np.ndarray) -> Metric:
    samples = [[float(answer), 1] for answer in right]
    return Metric(model, "piqa acc", float(right.mean()), "", True, samples=samples)


def test_the_interval_covers_where_there_is_no_difference() -> None:
    generator = np.random.default_rng(1)
    covered, alarms = 0, 0
    for _ in range(1000):
        losses = generator.normal(3, 0.5, 60)
        noise = generator.normal(0, 0.05, 60)
        (result,) = comparisons([windows("dense", losses), windows("small", losses + noise)])
        covered += result.low <= 0 <= result.high
        alarms += result.verdict in {"better", "worse"}
    assert 930 <= covered <= 970
    assert 30 <= alarms <= 70


@pytest.mark.parametrize("changes", [0.05, 0.3])
def test_the_interval_of_accuracies_covers(changes: float) -> None:
    generator = np.random.default_rng(8)
    covered, alarms = 0, 0
    for _ in range(1000):
        right = generator.random(300) < 0.5
        flipped = generator.random(300) < changes
        pair = [items("dense", right), items("small", right ^ flipped)]
        (result,) = comparisons(pair)
        covered += result.low <= 0 <= result.high
        alarms += result.verdict in {"better", "worse"}
    assert 930 <= covered <= 970
    assert alarms <= 50


def test_few_equal_answers_show_nothing() -> None:
    pair = [items("dense", np.ones(100)), items("small", np.ones(100))]
    (few,) = comparisons(pair)
    assert few.verdict.startswith("not enough data: about ")
    assert few.low == -few.high < -0.03
    many = [items("dense", np.ones(1000)), items("small", np.ones(1000))]
    assert comparisons(many)[0].verdict == "no difference seen"


@pytest.mark.parametrize(("shift", "verdict"), [(0.05, "worse"), (-0.05, "better")])
def test_a_planted_difference_of_losses_is_found(shift: float, verdict: str) -> None:
    generator = np.random.default_rng(2)
    losses = generator.normal(3, 0.5, 60)
    changed = losses + shift + generator.normal(0, 0.05, 60)
    (result,) = comparisons([windows("dense", losses), windows("small", changed)])
    assert result.verdict == verdict
    assert result.low < shift < result.high
    assert result.difference == pytest.approx((changed - losses).mean())


def test_accuracies_are_judged_by_mcnemar() -> None:
    right = np.array([1] * 70 + [0] * 30)
    changed = np.array([1] * 50 + [0] * 20 + [1] * 5 + [0] * 25)
    (result,) = comparisons([items("dense", right), items("small", changed)])
    assert result.p_value == pytest.approx(stats.binomtest(5, 25).pvalue)
    assert result.difference == pytest.approx(-0.15)
    assert result.verdict == "worse"


def test_equal_and_nearly_equal_models_are_told_from_too_little_data() -> None:
    losses = np.random.default_rng(3).normal(3, 0.5, 200)
    noise = np.random.default_rng(4).normal(0, 0.02, 200)
    noise -= noise.mean()
    base = windows("dense", losses)
    (same,) = comparisons([base, windows("small", losses)])
    assert (same.verdict, same.p_value, same.low, same.high) == ("no difference seen", 1.0, 0, 0)
    (near,) = comparisons([base, windows("small", losses + noise)])
    assert near.verdict == "no difference seen"
    few = [windows(name, values[:8]) for name, values in (("dense", losses), ("s", losses + noise))]
    (unsure,) = comparisons(few)
    assert unsure.verdict.startswith("not enough data: about ")
    needed = int(unsure.verdict.split()[4].replace(",", ""))
    assert 8 < needed < 2000


def test_one_sample_decides_nothing() -> None:
    pair = [windows("dense", np.array([3.0])), windows("small", np.array([4.0]))]
    (result,) = comparisons(pair)
    assert result.verdict == "not enough data"


def test_fewer_samples_than_decide_are_never_asked_for() -> None:
    losses = np.array([2.0, 3.0])
    (result,) = comparisons(
        [windows("dense", losses), windows("small", losses + np.array([0.010, 0.012]))]
    )
    assert result.verdict == "not enough data: about 6 samples would decide"


def test_p_values_are_adjusted_for_all_rows() -> None:
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_levels_are_those_of_the_steps_of_holm() -> None:
    assert holm_levels([0.04, 0.001, 0.9, 0.01]) == pytest.approx([0.025, 0.0125, 0.025, 0.05 / 3])
    assert holm_levels([0.01, 0.02]) == pytest.approx([0.025, 0.05])
    assert holm_levels([0.01, 0.01]) == pytest.approx([0.025, 0.025])
    assert holm_levels([0.9, 0.8, 0.7]) == pytest.approx([0.05 / 3] * 3)
    assert holm_levels([]) == []


def _several(shifts: Sequence[float], count: int = 30) -> list[Metric]:
    """A first model, and a later one for each difference of the losses."""
    draw = np.random.default_rng(9)
    losses = draw.normal(3, 0.5, count)
    models = [windows("dense", losses)]
    noise = draw.normal(0, 0.05, count)
    noise -= noise.mean()
    return models + [windows(f"m{i}", losses + shift + noise) for i, shift in enumerate(shifts)]


def test_an_interval_excludes_zero_only_beside_a_verdict() -> None:
    standard_error = 0.05 / np.sqrt(30)
    (alone,) = comparisons(_several([2.4 * standard_error]))
    assert alone.verdict == "worse"
    assert alone.confidence == pytest.approx(0.95)
    assert alone.low > 0
    among = comparisons(_several([2.4 * standard_error] * 10))
    assert {result.verdict.split(":")[0] for result in among} == {"not enough data"}
    assert all(result.low <= 0 < result.high for result in among)
    assert [result.confidence for result in among] == pytest.approx([0.995] * 10)
    stretch = stats.norm.ppf(0.9975) / stats.norm.ppf(0.975)
    assert among[0].high - among[0].difference == pytest.approx(
        stretch * (alone.high - alone.difference)
    )
    assert among[0].worst == alone.worst


def test_what_was_rejected_before_does_not_widen_an_interval() -> None:
    first, second, last = comparisons(_several([0.2, -0.2, 0.0]))
    assert (first.verdict, second.verdict) == ("worse", "better")
    assert first.confidence == second.confidence == pytest.approx(1 - 0.05 / 3)  # equal p
    assert last.confidence == pytest.approx(0.95)
    assert last.low < 0 < last.high


def test_the_test_decides_on_which_side_of_zero_the_interval_ends() -> None:
    losses = np.array([2.0, 3.0, 2.5, 2.2, 2.9])
    gains = np.array([0.50, 0.52, 0.49, 0.51, 0.50])
    (few,) = comparisons([windows("dense", losses), windows("low", losses + gains)])
    assert few.p_value == pytest.approx(2 / 2**5)
    assert few.low == 0
    assert few.high > 0.5


def test_parts_of_a_group_are_adjusted_among_themselves() -> None:
    right = np.array([1] * 70 + [0] * 30)
    changed = np.array([1] * 61 + [0] * 9 + [1] * 1 + [0] * 29)
    names = [f"part{index} acc" for index in range(5)]
    pair = [items("dense", right), items("low", changed)]
    group = [replace(metric, name="g acc", parts=names) for metric in pair]
    parts = [replace(metric, name=name) for name in names for metric in pair]
    (alone,), (first, *others) = comparisons(group), comparisons([*group, *parts])
    assert first == alone
    assert first.verdict == "worse"
    assert [other.confidence for other in others] == pytest.approx([0.99] * 5)
    assert {other.verdict.split(":")[0] for other in others} == {"not enough data"}


def test_only_the_same_measurement_is_compared() -> None:
    losses = np.random.default_rng(5).normal(3, 0.5, 20)
    base, other = windows("dense", losses), windows("small", losses)
    assert comparisons([]) == ()
    assert comparisons([base]) == ()
    assert comparisons([base, replace(other, conditions={"data": "y"})]) == ()
    assert comparisons([base, replace(other, conditions={"data": "x", "stride": 4})]) == ()
    assert comparisons([base, windows("small", losses[:10])]) == ()
    assert comparisons([base, windows("small", losses, tokens=50)]) == ()
    assert comparisons([replace(base, samples=()), replace(other, samples=())]) == ()


def group(model: str, right: list[np.ndarray], by_size: bool) -> list[Metric]:
    """The metrics of a group and of its tasks, which have these answers."""
    weights = [1 if by_size else 1 / len(answers) for answers in right]
    samples = [
        [float(a) * w, w] for answers, w in zip(right, weights, strict=True) for a in answers
    ]
    value = sum(score for score, _ in samples) / sum(weight for _, weight in samples)
    tasks = [replace(items(model, a), name=f"part-{i} acc") for i, a in enumerate(right)]
    names = [task.name for task in tasks]
    whole = Metric(model, "all acc", value, "", True, samples=samples, parts=names)
    return [whole, *tasks]


def test_a_group_by_size_is_one_large_task() -> None:
    right = [np.array([1] * 40 + [0] * 10), np.array([1] * 30 + [0] * 20)]
    changed = [np.array([1] * 30 + [0] * 20), np.array([1] * 25 + [0] * 25)]
    result, *parts = comparisons([*group("dense", right, True), *group("small", changed, True)])
    whole = [items(m, np.concatenate(a)) for m, a in (("dense", right), ("small", changed))]
    (expected,) = comparisons(whole)
    assert result == replace(expected, metric="all acc")
    assert result.difference == pytest.approx(-15 / 100)
    assert [part.metric for part in parts] == ["part-0 acc", "part-1 acc"]


def test_in_a_group_of_equal_weights_each_task_counts_the_same() -> None:
    right = [np.ones(10), np.ones(40)]
    changed = [np.array([1] * 5 + [0] * 5), np.ones(40)]
    result, *_ = comparisons([*group("dense", right, False), *group("small", changed, False)])
    assert result.difference == pytest.approx(-0.25)  # half of the first task, of two
    assert result.low < -0.25 < result.high
    # the weights are worth 2**2 / (10 * 0.1**2 + 40 * 0.025**2) = 32 equal ones, 8 of them lost
    equal = [items("dense", np.ones(32)), items("small", np.array([1] * 24 + [0] * 8))]
    (expected,) = comparisons(equal)
    assert result.low == pytest.approx(expected.low)
    assert result.high == 0 > expected.high  # the test of the group does not reject 0
    assert result.p_value == pytest.approx(2 / 2**5, abs=0.02)  # 5 items changed, all to the worse


def test_the_interval_of_a_group_of_unequal_tasks_covers() -> None:
    generator = np.random.default_rng(9)
    weights = np.concatenate([np.full(size, 1 / size) for size in (30, 120, 60)])
    covered = 0
    for _ in range(1000):
        signs = generator.choice([-1, 0, 1], size=len(weights), p=[0.1, 0.8, 0.1])
        low, high = _newcombe_interval(signs * weights, weights, 0.95)
        covered += low <= 0 <= high
    assert 930 <= covered <= 970


def test_a_group_is_not_adjusted_for_its_parts() -> None:
    """Of 40 tasks none shows what all together do."""
    right = [np.array([1] * 20 + [0] * 20)] * 40
    changed = [np.array([1] * 18 + [0] * 22), *right[1:20], *[np.array([1] * 19 + [0] * 21)] * 20]
    result, *parts = comparisons([*group("dense", right, True), *group("small", changed, True)])
    assert result.p_value == pytest.approx(stats.binomtest(0, 22).pvalue)
    assert result.verdict == "worse"
    assert parts[0].p_value == 1.0
    assert all(part.verdict.startswith("not enough data") for part in parts)
    text = np.random.default_rng(10).normal(3, 0.5, 60)
    beside = [windows("dense", text), windows("small", text + 0.001)]
    again, *_ = comparisons(
        [*group("dense", right, True), beside[0], *group("small", changed, True), beside[1]]
    )
    assert again.p_value == 2 * result.p_value


def test_other_questions_of_a_task_are_not_compared() -> None:
    items = [[1.0, 1.0]] * 8
    first, second = (
        Metric(model, "quiz acc", 1.0, "", True, {"questions": mark}, samples=items)
        for model, mark in (("dense", "a"), ("low", "b"))
    )
    assert comparisons([first, second]) == ()
    assert len(comparisons([first, replace(second, conditions={"questions": "a"})])) == 1
