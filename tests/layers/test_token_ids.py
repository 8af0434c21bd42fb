"""Tokens that only the tokenizer has are refused in one sentence, wherever text reaches a model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

import lrcompress
from lrcompress.config import FinetuneSettings
from lrcompress.data.training_text import training_text
from lrcompress.layers.token_ids import check_token_ids, notice_missing_rows
from lrcompress.runtime.errors import InputError
from lrcompress.runtime.notices import notice
from tests.conftest import SMALL, invoke
from tests.tiny import byte_tokenizer, copied_model, saved_model, tiny_model

ROWS, TEXT = 257, "all of it and the rest of it. " * 60


def _more_tokens() -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["the", "and"])
    return tokenizer


def test_the_last_row_is_allowed_and_the_next_is_not() -> None:
    model = tiny_model()
    check_token_ids(model, torch.tensor([[0, ROWS - 1]]))
    check_token_ids(model, torch.empty(0, dtype=torch.long))
    with pytest.raises(InputError, match=r"gives token 257, and the embedding .* has 257 rows"):
        check_token_ids(model, torch.tensor([[0, ROWS]]))


@pytest.fixture
def refused(tmp_path: Path) -> dict[str, Callable[[], object]]:
    """Everything that reads text, on a tokenizer with two tokens more than the model."""
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    choice = tmp_path / "choice.jsonl"
    choice.write_text(json.dumps({"query": "the", "choices": ["a", "b"], "gold": 0}))
    rolling = tmp_path / "rolling.jsonl"
    rolling.write_text(json.dumps({"text": "the rest"}))
    writing = tmp_path / "writing.yaml"
    writing.write_text(
        f"task: writing\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {choice}}}}}\n"
        "test_split: test\noutput_type: generate_until\ndoc_to_text: query\ndoc_to_target: gold\n"
        "generation_kwargs: {max_gen_toks: 4}\nmetric_list: [{metric: exact_match}]\n"
    )
    model, tokenizer = tiny_model(), _more_tokens()
    quick: dict[str, Any] = {
        "perplexity": (),
        "speed": False,
        "task_cache": "none",
        "context_length": 64,
    }

    def evaluate(**settings: Any) -> object:
        return lrcompress.evaluate(model, tokenizer, **(quick | settings))

    def factorize(**settings: Any) -> object:
        return lrcompress.factorize(model, tokenizer, num_samples=2, seq_len=32, **settings)

    finetune = FinetuneSettings(data=(str(text),), train_length=32, held_out=2, max_steps=2)
    return {
        "calibration": lambda: factorize(keep_ratio=0.6, calibration=str(text)),
        "validation": lambda: factorize(
            max_perplexity_increase=0.5, validation=str(text), method="svd"
        ),
        "training": lambda: training_text(model, tokenizer, finetune, "finetune"),
        "perplexity": lambda: evaluate(perplexity=str(text)),
        "choices": lambda: evaluate(tasks=str(choice)),
        "texts": lambda: evaluate(tasks=str(rolling)),
        "answers": lambda: evaluate(tasks=str(writing)),
    }


@pytest.mark.parametrize(
    "use",
    ["calibration", "validation", "training", "perplexity", "choices", "texts", "answers"],
)
def test_every_use_of_text_refuses_them(use: str, refused: dict[str, Callable[[], object]]) -> None:
    with pytest.raises(InputError, match=r"the tokenizer gives token 25[78], and the embedding"):
        refused[use]()


@pytest.mark.parametrize(
    "settings",
    [("--method", "svd"), ("--method", "svd", "--streaming"), ("--calibration", "self", *SMALL)],
)
def test_factorize_without_a_text_tells_of_them(
    settings: tuple[str, ...], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    notice.cache_clear()
    folder = saved_model(tmp_path / "model")
    keep = ("--keep-ratio", "0.6", *settings)
    assert invoke("factorize", folder, "--out", tmp_path / "silent", *keep).exit_code == 0
    assert "embedding" not in caplog.text
    _more_tokens().save_pretrained(folder)
    assert invoke("factorize", folder, "--out", tmp_path / "small", *keep).exit_code == 0
    assert "has none: 'the', 'and'. Text with them will be refused" in caplog.text


def test_an_embedding_larger_than_the_tokenizer_is_no_fault(
    caplog: pytest.LogCaptureFixture,
) -> None:
    notice.cache_clear()
    notice_missing_rows(tiny_model(vocab_size=320), _more_tokens())
    notice_missing_rows(tiny_model(), None)
    assert not caplog.text


def test_a_larger_tokenizer_whose_tokens_do_not_occur_is_no_fault(tmp_path: Path) -> None:
    folder = copied_model(saved_model(tmp_path / "small"), tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<unused>"])
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    settings: dict[str, Any] = {"perplexity": str(text), "speed": False, "context_length": 64}
    model = tiny_model()
    expected = lrcompress.evaluate(model, byte_tokenizer(), **settings)
    assert lrcompress.evaluate(model, tokenizer, **settings)[-1].value == expected[-1].value
