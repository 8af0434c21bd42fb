"""Seconds and memory of stages: nested, repeated, and recorded only where asked for."""

from __future__ import annotations

import time

import pytest
import torch

from lrcompress.runtime import stage_costs
from lrcompress.runtime.stage_costs import expect_memory, recording, stage, stages_until_now


def test_an_inner_stage_is_not_charged_to_the_outer_one() -> None:
    with recording() as costs:
        for _ in range(2):
            with stage("factors"):
                time.sleep(0.02)
                with stage("pivots"):
                    time.sleep(0.2)
        content = costs.to_dict()
    assert list(content) == ["factors", "pivots"]
    assert 0.04 <= content["factors"]["seconds"] < 0.2
    assert content["pivots"]["seconds"] >= 0.4
    assert content["pivots"]["cpu_seconds"] < 0.2


def test_an_outer_stage_has_the_peak_of_those_inside() -> None:
    with recording() as costs:
        with stage("factors"), stage("pivots"):
            held = torch.ones(16 * 2**20)  # 64 MiB
        del held
        with stage("saving"):
            pass
    if costs.by_stage["saving"].memory is None:
        pytest.skip("this system does not tell peaks of memory")
    peaks = {name: cost.memory or 0 for name, cost in costs.by_stage.items()}
    assert peaks["factors"] == peaks["pivots"]
    assert peaks["pivots"] > peaks["saving"] + 2**25


def test_a_stage_that_fails_ends() -> None:
    with recording() as costs:
        with pytest.raises(ValueError, match="wrong"), stage("probes"):
            raise ValueError("wrong")
        time.sleep(0.05)
        with stage("saving"):
            pass
    assert costs.by_stage["probes"].seconds < 0.05


def test_an_interruption_at_the_start_of_a_stage_stays_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(stage_costs, "peak_memory", interrupted)
    with recording(), pytest.raises(KeyboardInterrupt), stage("gradients"):
        pass


def test_nothing_is_recorded_outside() -> None:
    with stage("loading"):
        assert stages_until_now() == {}
    with recording() as outer, stage("loading"), recording() as inner:
        assert inner is outer
        assert list(stages_until_now()["stages"]) == ["loading"]


def test_the_estimate_stands_beside_the_highest_peak() -> None:
    expect_memory(1)
    with recording() as costs:
        with stage("loading"):
            assert "memory" not in stages_until_now()
        expect_memory(5)
        costs.by_stage["loading"].memory = 3
        with stage("text"):
            pass
        costs.by_stage["text"].memory = 7
        assert stages_until_now()["memory"] == {"estimated": 5, "measured": 7}
