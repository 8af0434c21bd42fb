"""GGUF files: checked before transformers reads them, and parsed once for all that it asks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lrcompress.runtime.errors import InputError

# metadata without which transformers takes the sizes of its default model of the architecture
SIZE_KEYS = ("block_count", "embedding_length")


@contextmanager
def parsed_once() -> Iterator[None]:
    """Inside, a GGUF file is parsed once, and the tensor names of its architecture listed once.

    transformers parses the file for the config, the weights and the tokenizer, which takes seconds
    each time because the vocabulary is read entry by entry, and lists the names for every module.
    """
    if find_spec("gguf") is None:
        yield
        return
    import gguf

    names = ("GGUFReader", "get_tensor_name_map")
    originals = {name: getattr(gguf, name) for name in names}
    for name, original in originals.items():
        setattr(gguf, name, cache(original))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(gguf, name, original)


def check_gguf(file: Path) -> None:
    """Raises InputError where `file` is a shard of a split model, or not a model with weights.

    A damaged file raises gguf's own error. Only the header is read.
    """
    if find_spec("gguf") is None:
        raise InputError(f"GGUF file {str(file)!r} needs gguf: pip install 'lrcompress[gguf]'")
    from gguf import GGUFReader

    reader = GGUFReader(str(file))  # as transformers names it
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
