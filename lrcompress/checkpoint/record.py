"""Reads and writes lrcompress.json, the record of a checkpoint, and its model card beside it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from lrcompress.checkpoint.model_card import model_card
from lrcompress.config import ModelSettings
from lrcompress.layers import model_info
from lrcompress.models.loading import Loaded, load_model, locate
from lrcompress.reporting.metric import Metric
from lrcompress.reporting.record_schema import validate_record
from lrcompress.reporting.render import json_text
from lrcompress.reporting.significance import Comparison
from lrcompress.runtime.atomic_io import replace_text
from lrcompress.runtime.errors import InputError
from lrcompress.runtime.paths import user_path
from lrcompress.runtime.safe_parsing import read_object

RECORD, CARD = "lrcompress.json", "README.md"
# fields of a record that `write_measured` and `write_served` write
MEASURED = ("metrics", "comparisons", "served")


def read_record(folder: Path) -> dict[str, Any] | None:
    """lrcompress.json of a checkpoint; None where the folder has none.

    Raises InputError where the file is damaged.
    """
    file = folder / RECORD
    if not file.is_file():
        return None
    try:
        return validate_record(read_object(file))
    except ValueError as error:
        raise InputError(f"{str(file)!r} is damaged ({error}): restore it, or remove it") from None


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Writes lrcompress.json and the model card, each in one rename.

    Raises InputError where the metrics or comparisons in `record` are damaged.
    """
    card = model_card(folder, record)
    replace_text(folder / RECORD, json_text(record))
    replace_text(folder / CARD, card)


def drop_measured(record: dict[str, Any]) -> None:
    """Removes what was measured: it describes the model before it was changed."""
    for key in MEASURED:
        record.pop(key, None)


def write_measured(
    folder: Path, metrics: Iterable[Metric], comparisons: Iterable[Comparison]
) -> None:
    """Adds metrics and comparisons to the record and the model card of the checkpoint `folder`."""
    measured = {
        "metrics": [metric.summary() for metric in metrics],
        "comparisons": [vars(comparison) for comparison in comparisons],
    }
    write_record(folder, (read_record(folder) or {}) | measured)


def write_served(folder: Path, engine: str, metrics: Iterable[Metric]) -> None:
    """Adds the speeds of the checkpoint `folder`, served by `engine`, to its record and card."""
    record = read_record(folder) or {}
    served = dict(record.get("served", {})) | {engine: [metric.summary() for metric in metrics]}
    write_record(folder, record | {"served": served})


def check_writable_checkpoint(source: str) -> None:
    """Raises InputError where numbers about the model `source` cannot be stored in its folder."""
    folder = user_path(source)
    if not folder.is_dir() or read_record(folder) is None:
        raise InputError(
            f"{source!r} is no checkpoint of lrcompress, so the numbers cannot be stored in it: "
            f"leave out --write-card, or measure a folder with a {RECORD}"
        )
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"{source!r} cannot be written to: leave out --write-card")


def record_of(settings: ModelSettings) -> dict[str, Any] | None:
    """lrcompress.json of the folder of a model; None where it has none."""
    return read_record(Path(locate(settings.source, settings.gguf_file).path))


@dataclass(frozen=True)
class ModelWithRecord:
    """A loaded model, with the record (lrcompress.json) of its folder if it has one."""

    source: ModelSettings
    record: dict[str, Any] | None
    loaded: Loaded

    @classmethod
    def load(cls, source: ModelSettings) -> Self:
        return cls(source, record_of(source), load_model(source))

    @property
    def kind(self) -> str:
        """What reports call the model: dense, factorized, finetuned, ..."""
        return model_info.model_kind(self.loaded[0], "finetuned" in (self.record or {}))
