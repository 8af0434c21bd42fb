"""A tiny dense model, and a recipe that sweeps it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lrcompress.config.recipe import Recipe, checked
from tests.tiny import byte_tokenizer, tiny_model

TEXT = {"num_samples": 8, "gradient_samples": 4, "seq_len": 64}
EVALUATE: dict[str, Any] = {
    "perplexity": ["pydoc:test"],
    "context_length": 64,
    "limit": 4,
    "speed": False,
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "dense"
    tiny_model().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def sweep_recipe(source: Path, **settings: Any) -> Recipe:
    return checked(
        Recipe,
        {
            "model": {"source": str(source)},
            "calibration": TEXT,
            "factorize": {"keep_ratio": 0.8, "rank_multiple": 2},
            "evaluate": EVALUATE,
            "sweep": {"keep_ratios": [0.8, 0.5], **settings},
        },
    )
