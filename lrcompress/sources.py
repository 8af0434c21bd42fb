"""Models as a recipe's model section names them."""

from __future__ import annotations

from typing import Any

from lrcompress.models import load
from lrcompress.settings import ModelSettings

Loaded = tuple[Any, Any]  # a model and its tokenizer


def load_settings(settings: ModelSettings, **placement: Any) -> Loaded:
    """(model, tokenizer) as a recipe's model section describes them, or where `placement` says."""
    arguments = settings.model_dump() | placement
    return load(arguments.pop("source"), **arguments)


def other_source(settings: ModelSettings, source: str) -> ModelSettings:
    """The same loading settings for another model; a GGUF file belongs to its own model."""
    return settings.model_copy(update={"source": source, "gguf_file": None})
