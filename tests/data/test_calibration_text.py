"""Calibration text: mixtures, the model's own, and what is recorded about them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lrcompress.config import CalibrationSettings
from lrcompress.data.calibration_text import calibration_text
from lrcompress.data.packing import Fingerprint
from lrcompress.runtime.errors import InputError
from tests.tiny import byte_tokenizer, tiny_model


def text(bos: bool = False, **settings: Any) -> tuple[torch.Tensor, Fingerprint]:
    checked = CalibrationSettings(**{"num_samples": 5, "seq_len": 16} | settings)
    made = calibration_text(tiny_model(), byte_tokenizer(bos), checked)
    assert torch.equal(made.labels, made.tokens)
    return made.tokens, made.fingerprint


def test_several_texts_take_turns(tmp_path: Path) -> None:
    for letter in "ab":
        (tmp_path / f"{letter}.txt").write_text(letter * 200)
    blocks, mark = text(data=[str(tmp_path / "a.txt"), str(tmp_path / "b.txt")])
    assert [len(set(block.tolist())) for block in blocks] == [1] * 5
    a, b = int(blocks[0][0]), int(blocks[1][0])
    assert a != b
    assert [int(block[0]) for block in blocks] == [a, b, a, b, a]
    assert mark.data == f"{tmp_path}/a.txt,{tmp_path}/b.txt"
    assert mark.tokens == 5 * 16


def test_max_samples_takes_what_a_short_text_has_and_num_samples_does_not(tmp_path: Path) -> None:
    file = tmp_path / "short.txt"
    file.write_text("a" * 100)  # six pieces of 16 tokens
    several: dict[str, Any] = {"num_samples": None, "data": [str(file)]}
    assert text(**several, max_samples=4)[0].shape == (4, 16)
    assert text(**several, max_samples=9)[0].shape == (6, 16)
    assert text(**several | {"num_samples": 3}, max_samples=4)[0].shape == (3, 16)
    with pytest.raises(InputError, match="at most --num-samples 6"):
        text(**several | {"num_samples": 9})


def test_text_of_self_alone_has_a_maximum_of_its_own() -> None:
    counts: dict[str, Any] = {"num_samples": None, "max_samples": 4, "max_generated_samples": 2}
    assert text(**counts, data=["self"])[0].shape == (2, 16)
    assert text(**counts, data=["self", "pydoc"])[0].shape == (4, 16)


def test_the_seed_decides_and_the_fingerprint_tells() -> None:
    assert text(seed=1)[1] == text(seed=1)[1]
    assert text(seed=1)[1].sha256 != text(seed=2)[1].sha256


@pytest.mark.parametrize("bos", [False, True])
def test_the_model_writes_its_own_text(bos: bool) -> None:
    blocks, mark = text(bos, data=["self"])
    assert blocks.shape == (5, 16)
    assert mark.data == "self"
    assert torch.equal(blocks, text(bos, data=["self"])[0])
    assert not torch.equal(blocks, text(bos, data=["self"], seed=1)[0])
    assert len(set(blocks.flatten().tolist())) > 10
    if bos:
        assert bool((blocks[:, 0] == 0).all())


def test_writing_leaves_the_random_state_alone() -> None:
    model, settings = tiny_model(), CalibrationSettings(data=["self"], num_samples=1, seq_len=16)
    before = torch.random.get_rng_state()
    calibration_text(model, byte_tokenizer(), settings)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_no_tokenizer_is_refused() -> None:
    with pytest.raises(InputError, match="no tokenizer"):
        calibration_text(tiny_model(), None, CalibrationSettings())
