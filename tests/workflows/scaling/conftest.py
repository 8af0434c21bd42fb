"""A ladder of three tiny models."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tests.tiny import byte_tokenizer, tiny_model

WIDTHS = (16, 24, 32)


@pytest.fixture(scope="session")
def ladder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe over three tiny llamas."""
    folder = tmp_path_factory.mktemp("ladder")
    byte_tokenizer().save_pretrained(folder / "tokenizer")
    for width in WIDTHS:
        model = tiny_model(hidden_size=width, intermediate_size=3 * width)
        model.config.save_pretrained(folder / f"w{width}")
    seeds = {width: 2 if width == WIDTHS[0] else 1 for width in WIDTHS}
    content = {
        "pretrain": {
            "data": ["pydoc"],
            "tokenizer": str(folder / "tokenizer"),
            "train_length": 32,
            "batch_size": 4,
            "learning_rate": 0.01,
            "rank_multiple": 2,
        },
        "scaling": {
            "sizes": {str(folder / f"w{width}"): {"seeds": n} for width, n in seeds.items()},
            "variants": {
                "low": {"keep_ratio": 0.5},
                "guided": {"keep_ratio": 0.5, "self_guided": "full"},
            },
            "equal_flops": {"guided": "low"},
            "tokens_per_parameter": 0.2,
            "test_sequences": 4,
            "measurements": 2,
            "resamples": 50,
            "speed_repeats": 2,
        },
    }
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(content))
    return file
