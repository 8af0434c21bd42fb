"""Short names are the ends of long paths, and tell them apart."""

from __future__ import annotations

import pytest

from lrcompress.reporting.names import ShortNames

FOLDER = "/home/anna/experiments/compression"


def test_as_many_parts_as_tell_paths_apart() -> None:
    names = ShortNames.of(
        ["dense", f"factorized {FOLDER}/keep-0.8/model", f"factorized {FOLDER}/keep-0.9/model"]
    )
    assert names.shorten(f"factorized {FOLDER}/keep-0.8/model") == "factorized keep-0.8/model"
    assert names.shorten(f"{FOLDER}/keep-0.9/model: evaluation") == "keep-0.9/model: evaluation"
    assert names.shorten("dense") == "dense"
    assert names.shorten(f"{FOLDER}/keep-0.8/model-2") == f"{FOLDER}/keep-0.8/model-2"


def test_parts_between_are_left_out_unless_they_tell() -> None:
    far = [f"{FOLDER}/{keep}/seed-1/model" for keep in ("a", "b")]
    assert [*ShortNames.of(far).short_of.values()] == ["a/…/model", "b/…/model"]
    near = [f"{FOLDER}/{run}/model" for run in ("a/seed-1", "a/seed-2", "b/seed-1")]
    assert [*ShortNames.of(near).short_of.values()] == [
        "a/seed-1/model", "a/seed-2/model", "b/seed-1/model",
    ]  # fmt: skip


def test_a_path_that_is_the_end_of_another_stays_distinct() -> None:
    paths = ["/long/enough/to/be/shortened/model", "/be/shortened/model"]
    names = ShortNames.of(paths)
    assert names.shorten(paths[1]) == paths[1]
    assert names.shorten(paths[0]) == "to/…/model"
    other = [f"{FOLDER}/a", f"{FOLDER}/a/", FOLDER.replace("/", "\\") + "\\a"]
    assert [*ShortNames.of(other).short_of.values()] == ["a/"]


@pytest.mark.parametrize(
    ("name", "short"),
    [
        (f"token perplexity, {FOLDER}/our own text/test.txt", "token perplexity, test.txt"),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "HuggingFaceTB/SmolLM2-135M-Instruct"),
        ("/tmp/a/model", "/tmp/a/model"),
        ("finetuned runs/2026-11-29/keep-0.8/model", "finetuned model"),
        (r"dense C:\Users\anna\models\small\base", "dense base"),
        ("~/experiments/compression/dense", "dense"),
    ],
)
def test_long_paths_alone_are_shortened(name: str, short: str) -> None:
    assert ShortNames.of([name]).shorten(name) == short
