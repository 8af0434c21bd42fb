"""The overlap of two texts is measured, whole or partial, wherever their blocks begin."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lrcompress.data.corpora import read_corpus
from lrcompress.data.ngram_overlap import (
    SKETCH_SIZE,
    TOLERATED_OVERLAP,
    ngram_hashes,
    overlap_share,
    sketch,
)
from lrcompress.data.packing import fingerprint


def text(count: int, seed: int) -> torch.Tensor:
    return torch.randint(50_000, (count,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("count", [6_400, 640_000])  # all n-grams fit into a sketch, or not
def test_share_of_a_text_in_another(count: int) -> None:
    trained = text(count, 0)
    trained_sketch = sketch(ngram_hashes([trained.view(-1, 64)]))
    assert len(trained_sketch.low_halves()) <= SKETCH_SIZE
    same, other = trained.view(-1, 128), text(count, 1).view(-1, 128)
    fifth = torch.cat([same[: len(same) // 5], other[len(same) // 5 :]])
    # windows over the borders of the blocks that were trained on, 64 long, are not in the sketch
    inside = 32 / 96
    assert overlap_share(ngram_hashes([same]), trained_sketch) == pytest.approx(2 * inside, rel=0.1)
    assert overlap_share(ngram_hashes([fifth]), trained_sketch) == pytest.approx(
        2 * inside / 5, rel=0.3
    )
    assert overlap_share(ngram_hashes([other]), trained_sketch) == 0
    assert overlap_share(ngram_hashes([fifth]), trained_sketch) > TOLERATED_OVERLAP


def test_block_borders_and_bos_make_no_difference() -> None:
    trained = text(20_000, 0)
    trained_sketch = sketch(ngram_hashes([trained[None]]))
    shifted = trained[7 : 7 + 19_968].view(-1, 256)
    behind_bos = torch.cat([torch.ones(len(shifted), 1, dtype=torch.long), shifted], dim=1)
    assert overlap_share(ngram_hashes([behind_bos]), trained_sketch) == 1
    assert overlap_share(ngram_hashes(list(behind_bos)), trained_sketch) == 1


def test_the_hash_is_the_same_on_every_machine() -> None:
    hashes = ngram_hashes([torch.arange(34)])
    assert [f"{value:016x}" for value in hashes.tolist()] == [
        "8e89f88eaca4d193", "c6d0d8dab2c3288f",
    ]  # fmt: skip
    assert sketch(hashes) == sketch(ngram_hashes([torch.arange(33), torch.arange(1, 34)]))


def test_a_text_that_is_too_short_has_no_overlap() -> None:
    trained_sketch = sketch(ngram_hashes([text(1_000, 0)]))
    assert overlap_share(ngram_hashes([text(20, 0)]), trained_sketch) == 0
    assert overlap_share(ngram_hashes([]), trained_sketch) == 0


def test_a_fingerprint_holds_a_sketch_of_its_tokens() -> None:
    blocks = text(1_280, 0).view(10, 128)
    assert overlap_share(ngram_hashes([blocks]), fingerprint(["x"], blocks, 0).sketch) == 1


def test_parts_of_the_embedded_text_hardly_overlap() -> None:
    vocabulary: dict[str, int] = {}

    def hashes(part: str) -> np.ndarray:
        documents = read_corpus(f"pydoc:{part}", "test").documents
        texts = [[vocabulary.setdefault(w, len(vocabulary)) for w in d.split()] for d in documents]
        return ngram_hashes([torch.tensor(words) for words in texts])

    calibration_sketch = sketch(hashes("calibration"))
    assert overlap_share(hashes("test"), calibration_sketch) < TOLERATED_OVERLAP
