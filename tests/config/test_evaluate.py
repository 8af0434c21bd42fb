"""Cache keys of the evaluation: equal where no result can differ, different where one can."""

from __future__ import annotations

from typing import Any

import pytest

from lrcompress.config import EvaluateSettings

DEFAULT = EvaluateSettings()


@pytest.mark.parametrize(
    "changed",
    [{"task_cache": "none"}, {"compared_windows": 0}, {"prompts": "Once"}, {"prompts": "a, b"}],
    ids=str,
)
def test_settings_that_no_metric_depends_on_are_not_in_the_key(changed: dict[str, Any]) -> None:
    settings = EvaluateSettings(**changed)
    assert settings.cache_key() == DEFAULT.cache_key()
    differs = "task_cache" not in changed
    assert (settings.details_cache_key() != DEFAULT.details_cache_key()) == differs


@pytest.mark.parametrize("changed", [{"limit": 3}, {"seed": 1}, {"perplexity": "a"}], ids=str)
def test_settings_of_metrics_are_in_the_key(changed: dict[str, Any]) -> None:
    settings = EvaluateSettings(**changed)
    assert settings.cache_key() != DEFAULT.cache_key()
    assert settings.details_cache_key() == DEFAULT.details_cache_key()


def test_a_sweep_leaves_the_baseline_out_of_the_key() -> None:
    settings = EvaluateSettings(baseline=("other",))
    assert settings.cache_key() != DEFAULT.cache_key()
    assert settings.cache_key(include_baseline=False) == DEFAULT.cache_key(include_baseline=False)
