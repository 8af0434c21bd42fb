"""A search finds the smallest model within a perplexity, and decomposes each linear once."""

from __future__ import annotations

from typing import Any

import pytest

import lrcompress
from lrcompress.layers.ffn_layouts import find_ffns
from lrcompress.methods import linalg, svd
from tests.tiny import byte_tokenizer, tiny_model

SETTINGS: dict[str, Any] = {"num_samples": 4, "seq_len": 48}


def test_search_finds_the_smallest_model_within_a_perplexity(tmp_path: Any) -> None:
    text = tmp_path / "validation.txt"
    text.write_text("Call me Ishmael. Some years ago, never mind how long precisely. " * 20)
    keep_ratios = {}
    for limit in ("0.5%", "50%"):
        model = tiny_model()
        result = lrcompress.factorize(
            model,
            byte_tokenizer(),
            max_perplexity_increase=limit,
            validation=str(text),
            **SETTINGS,
            rank_multiple=2,
        )
        within = [t for t in result.trials if t["perplexity"] <= t["limit"]]
        assert within
        assert result.selected.keep_ratio == pytest.approx(within[-1]["keep_ratio"], abs=0.02)
        keep_ratios[limit] = result.selected.keep_ratio
    assert keep_ratios["50%"] < keep_ratios["0.5%"]


def test_the_trials_of_a_search_share_decompositions(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, decompose = tmp_path / "validation.txt", linalg.decompose
    calls: list[int] = []

    def counted(*arguments: Any) -> Any:
        calls.append(1)
        return decompose(*arguments)

    text.write_text("Call me Ishmael. Some years ago, never mind how long precisely. " * 20)
    monkeypatch.setattr(svd, "decompose", counted)
    limits: dict[str, Any] = {"max_perplexity_increase": "50%", "validation": str(text)}
    model = tiny_model()
    result = lrcompress.factorize(model, byte_tokenizer(), method="whitened", **limits, **SETTINGS)
    assert len(result.trials) > 2
    linears = len(find_ffns(tiny_model()).linears)
    assert linears < len(calls) <= 2 * linears  # once for all trials, once for the result
