"""The content of metrics.json: its types, and how it is written, read and checked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

from jinja2 import TemplateError
from pydantic import TypeAdapter, ValidationError

from lrcompress.reporting.differences import Differences
from lrcompress.reporting.metric import PUBLISHED, Number, Summary
from lrcompress.reporting.provenance import Text
from lrcompress.reporting.render import json_text
from lrcompress.reporting.significance import Comparison
from lrcompress.runtime.errors import InputError, validation_reason
from lrcompress.runtime.safe_parsing import read_object

VERSION: Final = 1
METRICS = "metrics.json"


@dataclass(frozen=True)
class Samples:
    """What a metric of a model is a mean of."""

    __pydantic_config__ = PUBLISHED

    model: str
    metric: str
    """Name and, where there is one, text or file of the metric."""
    values: Sequence[Sequence[Number]]
    """For each window of a text, in order, its summed loss in nats and its tokens; for each item of
    a task its score and 1; for each item of a group of tasks its score times its weight and its
    weight, which is 1, or 1 / the number of items of its task where all tasks count the same."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """metrics.json of lrcompress: some models beside each other.

    Numbers that are not finite are the texts NaN, Infinity and -Infinity: JSON has no numbers for
    them, and null says that something is unknown or was not measured.
    """

    __pydantic_config__ = PUBLISHED

    version: Literal[1] = VERSION
    """Of this schema. Another one is another layout; fields may be added within one."""
    title: str
    notes: tuple[str, ...]
    """Sentences on the report as a whole."""
    metrics: tuple[Summary, ...]
    """Model by model; the first model is the one that others are compared with."""
    comparisons: tuple[Comparison, ...]
    details: Differences
    texts: tuple[Text, ...]
    """What the models were calibrated, trained and evaluated on."""
    training: Mapping[str, Any] | None
    """`finetuned` of the lrcompress.json (docs/checkpoint.md) of the model `record_of`, or null."""
    factorization: Mapping[str, Any] | None
    """The rest of that lrcompress.json, without fields that are elsewhere in this file, or null."""
    samples: tuple[Samples, ...]
    record_of: str = ""
    """The model that `training` and `factorization` describe; empty for the last one."""


Content = TypeVar("Content")


def to_json(content: Any) -> str:
    """Valid JSON of a published dataclass, such as Evaluation."""
    return json_text(TypeAdapter[Any](type(content)).dump_python(content))


def read(content_type: type[Content], file: Path) -> Content:
    """The `content_type` in a JSON file.

    Raises InputError where `file` is missing, damaged, or of another version.
    """
    values = _read_values(file)
    if (version := values.get("version")) != VERSION:
        raise InputError(
            f"{str(file)!r} has version {version or 'none'} of the layout, and this lrcompress "
            f"reads {VERSION}: measure again, or use the lrcompress that wrote it"
        )
    try:
        return TypeAdapter(content_type).validate_python(values)
    except ValidationError as error:
        raise damaged_file(file, validation_reason(error)) from None


def _read_values(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise InputError(
            f"{str(file.parent)!r} has no {file.name}: give a folder with a finished report"
        )
    try:
        return read_object(file)
    except ValueError as error:
        raise damaged_file(file, str(error)) from None


@contextmanager
def refuse_inconsistent(folders: Sequence[Path]) -> Iterator[None]:
    """Turns the errors that inconsistent values cause inside the block into one InputError.

    Values read from `folders` have the right types, but may contradict each other: for example, two
    models may have losses at different numbers of positions.
    """
    try:
        yield
    except InputError:
        raise
    except (TypeError, ValueError, LookupError, ArithmeticError, TemplateError) as error:
        names = ", ".join(repr(str(folder)) for folder in folders)
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(
            f"the report in {names} cannot be shown ({reason}): restore it, or measure again"
        ) from error


def damaged_file(file: Path, reason: str) -> InputError:
    """The error to raise for a file that cannot be read."""
    return InputError(f"{str(file)!r} is damaged ({reason}): restore it, or measure again")
