"""Cache keys of the evaluation: equal where no result can differ, different where one can."""

from __future__ import annotations

from typing import Any

import pytest

from lrcompress.config import EvaluateSettings
from tests.conftest import refusal

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


def test_a_prompt_in_another_encoding_is_refused_in_one_sentence() -> None:
    latin1 = b"caf\xe9".decode("utf-8", "surrogateescape")  # as Python reads an argument
    message = refusal("eval", "MODEL", "--prompt", latin1)
    assert "--prompt: 'caf\\udce9' is not utf-8 text: convert it" in message
    assert EvaluateSettings(prompts="café 😀").prompts == ("café 😀",)
