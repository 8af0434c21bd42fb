"""GGUF files that are not one whole model are refused by name, before memory is taken."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGUFWriter

from lrcompress.checkpoint.export.gguf_file import export_gguf
from lrcompress.models.loading import load
from tests.conftest import SMALL, invoke, refusal
from tests.gguf_models import write_donor
from tests.tiny import tiny_model

WIDTH, INNER, BLOCKS, VOCABULARY = 32, 88, 2, 64


def gguf_file(
    file: Path,
    shard: tuple[int, int] | None = None,
    metadata: bool = True,
    architecture: str = "llama",
    weights: bool = True,
) -> Path:
    """A llama of which only the description and one weight are in the file."""
    writer = GGUFWriter(file, architecture)
    if metadata:
        writer.add_block_count(BLOCKS)
        writer.add_embedding_length(WIDTH)
        writer.add_feed_forward_length(INNER)
        writer.add_context_length(256)
        writer.add_head_count(4)
        writer.add_head_count_kv(4)
        writer.add_vocab_size(VOCABULARY)
    if shard is not None:
        writer.add_uint16("split.no", shard[0])
        writer.add_uint16("split.count", shard[1])
    if weights:
        writer.add_tensor("token_embd.weight", np.zeros((VOCABULARY, WIDTH), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.mark.parametrize("number", [0, 1, 2])
def test_every_shard_of_a_split_model_is_refused(number: int, tmp_path: Path) -> None:
    name = f"m-0000{number + 1}-of-00003.gguf"
    file = gguf_file(tmp_path / name, shard=(number, 3), metadata=number == 0)
    out = tmp_path / "out"
    for command in (
        ("factorize", file, "--out", out, "--keep-ratio", "0.5", *SMALL),
        ("eval", file, "--no-speed"),
        ("inspect", file),
        ("inspect", file, "--energy"),
        ("inspect", tmp_path, "--gguf-file", name),
    ):
        message = refusal(*command)
        assert name in message
        assert f"is shard {number + 1} of 3" in message
        assert "llama-gguf-split --merge" in message
    assert not out.exists()


def test_a_file_without_sizes_never_becomes_a_default_model(tmp_path: Path) -> None:
    file = gguf_file(tmp_path / "adapter.gguf", metadata=False)
    for energy in ((), ("--energy",)):
        assert "adapter.gguf' has no llama.block_count" in refusal("inspect", file, *energy)


def test_a_file_without_weights_is_refused(tmp_path: Path) -> None:
    file = gguf_file(tmp_path / "vocab.gguf", weights=False)
    assert "vocab.gguf' holds no weights" in refusal("inspect", file)


def test_a_file_that_lacks_weights_is_named(tmp_path: Path) -> None:
    message = refusal("inspect", gguf_file(tmp_path / "half.gguf"), "--energy")
    assert "half.gguf' lacks" in message
    assert "that its metadata asks for" in message


@pytest.mark.parametrize("shard", [None, (0, 1)])
def test_a_whole_file_is_read(shard: tuple[int, int] | None, tmp_path: Path) -> None:
    result = invoke("inspect", gguf_file(tmp_path / "whole.gguf", shard))
    assert f"{3 * BLOCKS * WIDTH * INNER:,} of them" in result.output


def test_a_file_is_parsed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, file = tiny_model(), tmp_path / "dense.gguf"
    donor = write_donor(tmp_path / "donor.gguf", model.config, "llama")
    export_gguf(model, None, file, {}, like=str(donor), type="f32")
    parsed: list[str] = []

    class CountingReader(gguf.GGUFReader):
        def __init__(self, path: str) -> None:
            parsed.append(path)
            super().__init__(path)

    monkeypatch.setattr(gguf, "GGUFReader", CountingReader)
    load(file)
    assert parsed == [str(file)]
    assert gguf.GGUFReader is CountingReader
