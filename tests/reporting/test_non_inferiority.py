"""A loss has to be shown to be within its limit, by the whole interval."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from lrcompress.reporting.metric import Metric
from lrcompress.reporting.non_inferiority import EVERY, non_inferiority_failures
from lrcompress.reporting.significance import comparisons
from lrcompress.runtime.errors import InputError
from tests.reporting.test_significance import group, items, windows

LOSSES = np.random.default_rng(6).normal(3, 0.5, 60)
NOISE = np.random.default_rng(7).normal(0.02, 0.05, 60)
PAIR = [windows("dense", LOSSES), windows("small", LOSSES + NOISE)]


def failed(metrics: list[Metric], limit: float | dict[str, float]) -> list[str]:
    limits = limit if isinstance(limit, dict) else {EVERY: limit}
    return [failure.comparison.metric for failure in non_inferiority_failures(metrics, limits)]


def test_the_whole_interval_has_to_be_within_the_limit() -> None:
    (result,) = comparisons(PAIR)
    assert result.worst == pytest.approx(np.expm1(result.high))
    assert failed(PAIR, result.worst + 1e-9) == []
    assert failed(PAIR, result.worst - 1e-9) == ["token perplexity, x"]
    right = np.array([1] * 70 + [0] * 30)
    (lost,) = comparisons([items("dense", right), items("small", right[::-1])])
    assert lost.worst == -lost.low > 0


def test_too_little_data_fails() -> None:
    alone = [windows("dense", LOSSES[:1]), windows("small", LOSSES[:1])]
    assert failed(alone, 0.5) == ["token perplexity, x"]
    assert failed([items("dense", np.ones(100)), items("small", np.ones(100))], 0.01)
    assert not failed([items("dense", np.ones(1000)), items("small", np.ones(1000))], 0.01)


def test_what_cannot_be_compared_is_refused() -> None:
    right = np.array([1] * 70 + [0] * 30)
    task, another = items("dense", right), items("small", right)
    another = replace(another, conditions={"num_fewshot": 5})
    with pytest.raises(InputError, match="'piqa acc' was measured in another way on 'dense'"):
        failed([PAIR[0], task, PAIR[1], another], 0.5)
    assert failed([PAIR[0], task, PAIR[1], another], {"x": 10.0}) == []
    with pytest.raises(InputError, match="needs a first model"):
        failed(PAIR[:1], 0.01)


def grouped(worse: int) -> list[Metric]:
    """A text; a group of a task of 600 items, of which the later model gets `worse` fewer, and one
    of 10 items."""
    of_task = {"task_version": 1.0}
    right = [np.array([1] * 300 + [0] * 300), np.array([1] * 5 + [0] * 5)]
    lost = [np.array([1] * (300 - worse) + [0] * (300 + worse)), right[1]]
    first, second = (
        [replace(metric, conditions=of_task) for metric in group(model, answers, True)]
        for model, answers in (("dense", right), ("small", lost))
    )
    return [PAIR[0], *first, PAIR[1], *second]


def test_a_group_stands_for_its_parts() -> None:
    """Ten items could never show a loss of at most 5 %."""
    assert failed(grouped(2), 0.05) == []
    assert failed(grouped(2), {"all": 0.05}) == []
    assert failed(grouped(30), {"all": 0.05}) == ["all acc"]
    assert failed(grouped(30), {"all": 0.05, EVERY: 10.0}) == ["all acc"]
    assert failed(grouped(30), {"all acc": 10.0, EVERY: 0.001}) == ["token perplexity, x"]


def test_a_part_can_be_named() -> None:
    assert failed(grouped(2), {"part-1": 0.05}) == ["part-1 acc"]
    assert failed(grouped(2), {"part-0": 0.05}) == []
    assert failed(grouped(2), {"part-1": 0.05, EVERY: 0.05}) == ["part-1 acc"]


def test_a_name_that_fits_nothing_is_refused() -> None:
    with pytest.raises(InputError, match=r"max_loss names 'mmlu', and nothing of that name.*all"):
        failed(grouped(2), {"mmlu": 0.05, EVERY: 0.05})
    without = [replace(metric, samples=[]) if metric.parts else metric for metric in grouped(2)]
    with pytest.raises(InputError, match="names 'all', and nothing of that name is a mean"):
        failed(without, {"all": 0.05})
