"""What lrcompress.json may hold: kinds of values that reports, cards and trainings rely on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Required

from pydantic import Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from lrcompress.methods.types import Role
from lrcompress.runtime.errors import validation_reason

OPEN = {"extra": "allow"}
Count = Annotated[int, Field(ge=0, lt=2**63)]
Number = Count | float
# a picture has a place for every block
Block = Annotated[int, Field(ge=0, lt=10_000)]


class Counts(TypedDict):
    __pydantic_config__ = OPEN  # type: ignore[misc]

    dense: Count
    kept: Count
    keep_ratio: Number


class Calibration(TypedDict):
    __pydantic_config__ = OPEN  # type: ignore[misc]

    data: str
    tokens: Count
    sha256: str


class Asked(TypedDict, total=False):
    __pydantic_config__ = OPEN  # type: ignore[misc]

    data: Required[list[str]]
    learning_rate: Required[Number]
    held_out: Required[Count]
    train: str


class Training(TypedDict):
    __pydantic_config__ = OPEN  # type: ignore[misc]

    steps: Count
    tokens: Count
    trained_parameters: Count
    best_step: Count
    before: Number
    after: Number
    losses: list[tuple[Count, Number | None]]
    seconds: Number
    tokens_per_second: Number | None
    settings: Asked
    sequences: Count
    length: Count
    sha256: str


class Linear(TypedDict):
    __pydantic_config__ = OPEN  # type: ignore[misc]

    name: str
    block: Block
    role: Role
    form: str
    shape: tuple[Count, Count]
    rank: Count | None
    parameters_dense: Count
    parameters_kept: Count
    relative_error: Number | None
    spectrum: list[tuple[Count, Number]]


class Refined(TypedDict):
    __pydantic_config__ = OPEN  # type: ignore[misc]

    block: Block
    before: Number
    after: Number


class Record(TypedDict, total=False):
    """docs/checkpoint.md has the meaning of each field; others are kept as they are."""

    __pydantic_config__ = OPEN  # type: ignore[misc]

    source: str | None
    trained_from: str | None
    export: str
    recipe: dict[str, dict[str, Any]]
    counts: dict[str, Counts]
    calibration: Calibration | None
    finetuned: Training
    pretrained: Training
    before: Record
    factorized_from: Record
    notes: list[str]
    linears: list[Linear]
    refined: list[Refined]


_RECORD = TypeAdapter(Record)


def checked_record(found: Mapping[str, Any]) -> dict[str, Any]:
    """The record with its numbers as numbers; raises ValueError that names a field of another kind
    than reports can show."""
    try:
        return {**found, **_RECORD.validate_python(found)}
    except ValidationError as error:
        raise ValueError(validation_reason(error)) from None
