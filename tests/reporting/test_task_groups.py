"""Parts of groups of tasks follow their group, however deep, and no metric is lost."""

from __future__ import annotations

from lrcompress.reporting.metric import Metric
from lrcompress.reporting.tables import table
from lrcompress.reporting.task_groups import NO_PART, Place, places


def score(name: str, *parts: str, model: str = "dense") -> Metric:
    return Metric(model, name, 0.5, "", True, {"task_version": 1.0}, parts=parts)


METRICS = [
    Metric("dense", "parameters", 10, "", False),
    score("algebra acc"), score("algebra acc_norm"), score("law acc"), score("piqa acc"),
    score("stem acc", "algebra acc"), score("stem acc_norm", "algebra acc_norm"),
    score("areas acc", "stem acc", "law acc"), score("areas acc_norm", "stem acc_norm"),
]  # fmt: skip


def test_parts_follow_their_group() -> None:
    assert [*places(METRICS).items()] == [
        ("parameters", NO_PART), ("piqa acc", NO_PART),
        ("areas acc", NO_PART), ("law acc", Place("areas", 1)),
        ("stem acc", Place("areas", 1)), ("algebra acc", Place("areas", 2)),
        ("areas acc_norm", NO_PART), ("stem acc_norm", Place("areas", 1)),
        ("algebra acc_norm", Place("areas", 2)),
    ]  # fmt: skip
    assert [row.title for row in table(METRICS).rows] == list(places(METRICS))
    assert table(METRICS).groups == ("areas",)


def test_groups_in_a_circle_are_not_lost() -> None:
    circle = [score("a acc", "b acc"), score("b acc", "a acc"), score("c acc", "c acc")]
    assert set(places([*circle, score("d acc")]).values()) == {NO_PART}
    assert len(places([*circle, score("d acc")])) == 4


def test_a_task_in_a_group_compares_with_the_task_alone() -> None:
    group = [score("stem acc", "algebra acc"), score("algebra acc")]
    rows = table([*group, score("algebra acc", model="low")]).rows
    assert [row.place.depth for row in rows] == [0, 1]
    assert rows[1].ratios == ("1x",)
