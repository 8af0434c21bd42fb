"""Reading text by SPEC, and packing it into tokens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lrcompress.data.corpora import Corpus, read_corpus
from lrcompress.data.packing import bos_token, encode, token_blocks
from lrcompress.runtime.errors import InputError
from tests.tiny import byte_tokenizer


def test_embedded_parts_do_not_overlap() -> None:
    calibration = list(read_corpus("pydoc", "calibration").documents)
    test = list(read_corpus("pydoc", "test").documents)
    assert calibration == list(read_corpus("pydoc:calibration", "test").documents)
    assert not set(calibration) & set(test)
    validation = list(read_corpus("pydoc:validation", "test").documents)
    assert not set(validation) & set(calibration + test)
    assert sum(map(len, calibration)) > sum(map(len, test)) > 100_000


def test_sources_of_a_package_are_in_parts_that_share_nothing() -> None:
    parts = {
        name: list(read_corpus(f"package:click:{name}", "test").documents)
        for name in ("calibration", "validation", "test")
    }
    assert parts["calibration"] == list(read_corpus("package:click", "calibration").documents)
    paragraphs = [
        {p for text in texts for p in text.split("\n\n") if len(p) >= 80}
        for texts in parts.values()
    ]
    assert len(set().union(*paragraphs)) == sum(map(len, paragraphs)) > 100
    for spec, words in (
        ("package:nowhere_at_all", "package:python"),
        ("package:click:half", "package:click:test"),
    ):
        with pytest.raises(InputError, match=words):
            list(read_corpus(spec, "test").documents)


def test_jsonl_field(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps({"text": f"a{i}", "body": f"b{i}"}) for i in range(3)))
    assert list(read_corpus(str(file), "test").documents) == ["a0", "a1", "a2"]
    assert list(read_corpus(f"{file}:body", "test").documents) == ["b0", "b1", "b2"]


def test_blocks_are_exact_disjoint_pieces_of_the_text() -> None:
    text = "".join(chr(ord("a") + i % 26) + str(i) for i in range(400))
    tokenizer = byte_tokenizer()
    stream = encode(tokenizer, text)
    blocks = token_blocks(Corpus("x", [text]), tokenizer, 8, 32, seed=0)
    pieces = [stream[i : i + 32] for i in range(0, len(stream) - 31, 32)]
    assert blocks.shape == (8, 32)
    found = [block.tolist() for block in blocks]
    assert all(piece in pieces for piece in found)
    assert len({tuple(piece) for piece in found}) == 8


def test_seed_decides() -> None:
    corpus, tokenizer = Corpus("x", ["some words of text " * 50]), byte_tokenizer()
    first = token_blocks(corpus, tokenizer, 4, 31, seed=0)
    assert torch.equal(first, token_blocks(corpus, tokenizer, 4, 31, seed=0))
    assert not torch.equal(first, token_blocks(corpus, tokenizer, 4, 31, seed=1))


def test_documents_are_separated_by_eos() -> None:
    blocks = token_blocks(Corpus("x", ["abc", "def"]), byte_tokenizer(), 1, 7, seed=0)
    assert blocks[0].tolist().index(0) == 3


def test_bos_starts_every_block_where_the_tokenizer_uses_it() -> None:
    tokenizer = byte_tokenizer(bos=True)
    assert bos_token(tokenizer) == 0
    assert bos_token(byte_tokenizer()) is None
    blocks = token_blocks(Corpus("x", ["word " * 40]), tokenizer, 3, 16, seed=0)
    assert blocks[:, 0].tolist() == [0, 0, 0]
    assert bool((blocks[:, 1:] != 0).all())


def test_too_little_text_says_how_much_there_is() -> None:
    with pytest.raises(
        InputError, match=r"holds 9 tokens, 2 of the samples of 8 need 16.*samples 1"
    ):
        token_blocks(Corpus("x", ["123456789"]), byte_tokenizer(), 2, 8, seed=0)


@pytest.mark.parametrize("spec", ["pydoc:other", "none.txt", "none.jsonl"])
def test_unreadable_spec(spec: str) -> None:
    with pytest.raises(InputError, match=r"pydoc|does not exist"):
        list(read_corpus(spec, "test").documents)
