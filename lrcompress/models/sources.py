"""Models as a recipe's model section names them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lrcompress.checkpoint.folder import read_record
from lrcompress.config import ModelSettings
from lrcompress.models.loading import load, locate

Loaded = tuple[Any, Any]  # a model and its tokenizer


def load_settings(settings: ModelSettings, **placement: Any) -> Loaded:
    """(model, tokenizer) as a recipe's model section describes them, or where `placement` says."""
    arguments = settings.model_dump() | placement
    return load(arguments.pop("source"), **arguments)


def other_source(settings: ModelSettings, source: str) -> ModelSettings:
    """The same loading settings for another model; a GGUF file belongs to its own model."""
    return settings.model_copy(update={"source": source, "gguf_file": None})


def record_of(settings: ModelSettings) -> dict[str, Any] | None:
    """lrcompress.json of the model's folder; None where it has none."""
    return read_record(Path(locate(settings.source, settings.gguf_file).path))
