"""The points of a sweep go stale with the stages that make them, and no others."""

from __future__ import annotations

from pathlib import Path

import pytest

from lrcompress.checkpoint import fingerprints
from lrcompress.config import ModelSettings
from lrcompress.config.recipe import Recipe
from lrcompress.workflows.sweep.folder import SweepFolder
from lrcompress.workflows.sweep.point import SweepPoint


def test_a_new_factorizer_leaves_the_dense_point(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = SweepFolder(Recipe(model=ModelSettings(source="model")), tmp_path / "out")
    folder.claim()
    made: list[str] = []

    def measure() -> None:
        def point(variant: str) -> SweepPoint:
            made.append(variant)
            return SweepPoint(variant, 1.0, 1.0, 0.0, None, "", ())

        folder.dense_point("dense", ["inputs"], lambda: point("dense"))
        folder.dense_point("dense int8", ["inputs"], lambda: point("dense int8"))
        folder.point("svd", 0.5, ["inputs"], lambda: point("svd"))

    measure()
    measure()
    assert made == ["dense", "dense int8", "svd"]
    monkeypatch.setitem(fingerprints.STAGES, "factorize", 1000)
    measure()
    assert made[3:] == ["svd"]
    monkeypatch.setitem(fingerprints.STAGES, "evaluate", 1000)
    measure()
    assert made[4:] == ["dense", "dense int8", "svd"]
    assert {path.name for path in (tmp_path / "out" / "points").iterdir()} == {
        "dense.json",
        "dense int8-1.json",
        "svd-0.5.json",
    }
