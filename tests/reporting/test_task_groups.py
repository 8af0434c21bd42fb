"""Parts of groups of tasks follow their group, however deep, and no metric is lost."""

from __future__ import annotations

from lrcompress.reporting.metric import Metric
from lrcompress.reporting.tables import table
from lrcompress.reporting.task_groups import NO_PART, Place, places


def score(name: str, group: str = "", model: str = "dense") -> Metric:
    conditions = {"task_version": 1.0} | ({"group": group} if group else {})
    return Metric(model, name, 0.5, "", True, conditions)


METRICS = [
    Metric("dense", "parameters", 10, "", False),
    score("algebra acc", "stem"), score("algebra acc_norm", "stem"), score("law acc", "areas"),
    score("piqa acc"), score("stem acc", "areas"), score("areas acc"),
]  # fmt: skip


def test_parts_follow_their_group() -> None:
    assert places(METRICS) == {
        "parameters": NO_PART, "piqa acc": NO_PART, "areas acc": NO_PART,
        "law acc": Place("areas", 1), "stem acc": Place("areas", 1),
        "algebra acc": Place("areas", 2), "algebra acc_norm": Place("areas", 2),
    }  # fmt: skip
    assert [row.title for row in table(METRICS).rows] == list(places(METRICS))


def test_a_part_without_its_group_stands_by_itself() -> None:
    alone = [score("algebra acc", "stem"), score("piqa acc")]
    assert places(alone) == {"algebra acc": NO_PART, "piqa acc": NO_PART}


def test_groups_in_a_circle_are_not_lost() -> None:
    circle = [score("a acc", "b"), score("b acc", "a"), score("c acc", "c"), score("d acc")]
    assert set(places(circle).values()) == {NO_PART}
    assert len(places(circle)) == 4


def test_a_task_in_a_group_compares_with_the_task_alone() -> None:
    group = [score("stem acc"), score("algebra acc", "stem")]
    rows = table([*group, score("algebra acc", model="low")]).rows
    assert [row.place.depth for row in rows] == [0, 1]
    assert rows[1].ratios == ("1x",)
