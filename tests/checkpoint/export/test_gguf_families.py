"""Every family that can be exported computes the same in llama.cpp as in transformers."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from lrcompress.checkpoint.export.gguf_families import DECI, FAMILIES
from lrcompress.checkpoint.export.gguf_file import export_gguf
from tests.gguf_models import (
    FIXED,
    architecture_of,
    differences,
    largest_difference,
    narrow,
    with_tabled_gelu,
    write_donor,
)
from tests.tiny import byte_tokenizer, tiny_model

WITH_GELU = (
    *("gemma", "gemma2", "gemma3_text", "phi", "gpt2", "starcoder2", "gpt_neox", "bloom", "mpt"),
)
TOLERANCES = {"nemotron": 1e-4}  # squares, so large numbers


def _exported(model: Any, family: str, folder: Path) -> Path:
    donor = write_donor(folder / "donor.gguf", model.config, FAMILIES[family].architecture)
    file = folder / "out.gguf"
    export_gguf(copy.deepcopy(model), byte_tokenizer(), file, {}, like=str(donor), type="f32")
    return file


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - WITH_GELU))
def test_one_width_keeps_the_architecture(family: str, tmp_path: Path) -> None:
    model = narrow(tiny_model(family, **FIXED.get(family, {})), (40, 40))
    file = _exported(model, family, tmp_path)
    assert architecture_of(file) == FAMILIES[family].architecture
    assert largest_difference(model, file) < TOLERANCES.get(family, 1e-5)


@pytest.mark.parametrize("family", WITH_GELU)
def test_families_with_gelu(family: str, tmp_path: Path) -> None:
    """llama.cpp reads GELU from a table in float16, and so does the model that it is compared with.

    Where an activation lies between two entries, rounding in float32 decides which one is read.
    This changes the log-probabilities of some prompts; at others no activation lies so.
    """
    model = narrow(tiny_model(family, **FIXED.get(family, {})), (40, 40))
    file = _exported(model, family, tmp_path)
    assert architecture_of(file) == FAMILIES[family].architecture
    lengths = (7, 12, 20, 25, 30, 33, 36, 38, 40)
    ascending = sorted(differences(with_tabled_gelu(model), file, lengths))
    assert ascending[2] < 1e-5
    assert ascending[-1] < 5e-3


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}),
        ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
        ("mistral", {}),
        ("qwen2", {}),
    ],
)
@pytest.mark.parametrize("widths", [(40, 72), (72, 88)])
def test_several_widths_become_deci(
    family: str, changes: dict[str, Any], widths: Sequence[int], tmp_path: Path
) -> None:
    model = narrow(tiny_model(family, **changes), widths)
    file = _exported(model, family, tmp_path)
    assert architecture_of(file) == DECI
    assert largest_difference(model, file) < 1e-5
