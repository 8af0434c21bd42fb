"""The titles of columns: distinct, and no longer than they have to be."""

from __future__ import annotations

from lrcompress.reporting import tables
from lrcompress.reporting.metric import Metric


def _speed(model: str, rounds: list[float], **conditions: object) -> Metric:
    value = sorted(rounds)[len(rounds) // 2]
    return Metric(model, "decode, batch 8", value, "tokens/s", True, conditions, rounds=rounds)


def test_speeds_of_rounds_are_compared_round_by_round() -> None:
    """The machine was half as fast in the second round: the ratio of medians would be 0.6."""
    metrics = [_speed("dense", [10, 5, 10]), _speed("factorized", [12, 6, 5])]
    (row,) = tables.table(metrics).rows
    assert row.ratios == ("1.2x (0.5–1.2)",)
    other = [_speed("dense", [10, 5, 10], version=1), _speed("factorized", [12, 6, 5], version=2)]
    assert tables.table(other).rows[0].ratios == ("not comparable",)


def test_columns_of_one_kind_get_names() -> None:
    dense = ["a/base", "b/small"]
    assert tables.labels(["dense", "factorized"], dense) == ["dense", "factorized"]
    assert tables.labels(["dense", "dense"], dense) == ["dense base", "dense small"]
    assert tables.labels(["dense", "finetuned", "finetuned"], ["m", "a/model", "b/model"]) == [
        "dense", "finetuned a/model", "finetuned b/model",
    ]  # fmt: skip
    assert tables.labels(["dense", "dense"], ["m", "m"]) == ["dense m 1", "dense m 2"]
