"""The titles of columns: distinct, and no longer than they have to be."""

from __future__ import annotations

from lrcompress.reporting import tables


def test_columns_of_one_kind_get_names() -> None:
    dense = ["a/base", "b/small"]
    assert tables.labels(["dense", "factorized"], dense) == ["dense", "factorized"]
    assert tables.labels(["dense", "dense"], dense) == ["dense base", "dense small"]
    assert tables.labels(["dense", "finetuned", "finetuned"], ["m", "a/model", "b/model"]) == [
        "dense", "finetuned a/model", "finetuned b/model",
    ]  # fmt: skip
    assert tables.labels(["dense", "dense"], ["m", "m"]) == ["dense m 1", "dense m 2"]
