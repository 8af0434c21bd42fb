"""Checks of a GGUF file before transformers reads it: a whole model, with its description."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lrcompress.runtime.errors import InputError

# metadata without which transformers takes the sizes of its default model of the architecture
SIZE_KEYS = ("block_count", "embedding_length")


def check_gguf(file: Path) -> None:
    """Raises InputError where `file` is a shard of a split model, or not a model with weights.

    A damaged file raises gguf's own error. Only the header is read.
    """
    if find_spec("gguf") is None:
        raise InputError(f"GGUF file {str(file)!r} needs gguf: pip install 'lrcompress[gguf]'")
    from gguf import GGUFReader

    reader = GGUFReader(file)
    count = _metadata(reader, "split.count") or 1
    if count > 1:
        number = _metadata(reader, "split.no") + 1
        raise InputError(
            f"GGUF file {str(file)!r} is shard {number} of {count}: merge the shards with "
            "llama.cpp's llama-gguf-split --merge, and give the file that it writes"
        )
    architecture = _metadata(reader, "general.architecture")
    for key in ("general.architecture", *(f"{architecture}.{key}" for key in SIZE_KEYS)):
        if _metadata(reader, key) is None:
            raise InputError(
                f"GGUF file {str(file)!r} has no {key}, so it does not describe a model: give the "
                "file of a whole language model, not of an adapter, a tokenizer or a projector"
            )
    if not reader.tensors:
        raise InputError(f"GGUF file {str(file)!r} holds no weights: give the file of a model")


def _metadata(reader: Any, key: str) -> Any:
    """The value of a metadata key; None where the file does not have it."""
    field = reader.get_field(key)
    return None if field is None else field.contents()
