"""What a kept result depends on: inputs, versions, and the number of each stage that made it."""

from __future__ import annotations

from pathlib import Path

import pytest

from lrcompress.checkpoint import fingerprints
from lrcompress.checkpoint.fingerprints import STAGES, digest
from tests import stages


@pytest.mark.parametrize("stage", sorted(STAGES))
def test_a_changed_stage_needs_a_decision(stage: str) -> None:
    assert stages.current()[stage] == stages.recorded()[stage], (
        f"the code of the stage {stage!r} has changed since its number was set: raise it in "
        "STAGES of lrcompress/checkpoint/fingerprints.py if equal inputs may now give other "
        "results; then, or if they cannot, run `make stages`"
    )


def test_every_stage_has_sources_that_exist() -> None:
    assert stages.SOURCES.keys() == STAGES.keys()
    for patterns in stages.SOURCES.values():
        for pattern in patterns:
            assert any(Path("lrcompress").glob(pattern)), pattern


@pytest.mark.parametrize("stage", sorted(STAGES))
def test_a_raised_number_makes_kept_results_stale(
    stage: fingerprints.Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {name: digest(["inputs"], name) for name in STAGES}
    monkeypatch.setitem(STAGES, stage, STAGES[stage] + 1)
    after = {name: digest(["inputs"], name) for name in STAGES}
    assert [name for name in STAGES if before[name] != after[name]] == [stage]


def test_inputs_and_stages_decide() -> None:
    assert digest([1], "factorize") == digest([1], "factorize")
    assert digest([1], "factorize") != digest([2], "factorize")
    assert digest([1], "factorize") != digest([1], "factorize", "evaluate")
