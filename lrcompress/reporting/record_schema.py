"""The schema of lrcompress.json: the fields that reports, cards and trainings rely on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, NotRequired, Required

from pydantic import Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from lrcompress.methods.types import Role
from lrcompress.runtime.errors import validation_reason

# fields that the schema does not name pass through
ALLOW_EXTRA = {"extra": "allow"}
FORBID_EXTRA = {"extra": "forbid"}
Count = Annotated[int, Field(ge=0, lt=2**63)]
CountOrFloat = Count | float
Share = Annotated[float, Field(ge=0, le=1)]
# bounded, because a figure draws a column for every block
BlockIndex = Annotated[int, Field(ge=0, lt=10_000)]


class CountsRecord(TypedDict):
    __pydantic_config__ = ALLOW_EXTRA  # type: ignore[misc]

    dense: Count
    kept: Count
    keep_ratio: CountOrFloat


class CalibrationRecord(TypedDict):
    __pydantic_config__ = ALLOW_EXTRA  # type: ignore[misc]

    data: str
    tokens: Count
    sha256: str


class TrainingSettingsRecord(TypedDict, total=False):
    __pydantic_config__ = ALLOW_EXTRA  # type: ignore[misc]

    data: Required[list[str]]
    learning_rate: Required[CountOrFloat]
    held_out: Required[Count]
    minutes: CountOrFloat | None
    train: str


class ProjectedLossRecord(TypedDict):
    __pydantic_config__ = ALLOW_EXTRA  # type: ignore[misc]

    factor: Count
    tokens: Count
    loss: CountOrFloat
    low: CountOrFloat
    high: CountOrFloat


class ProjectionRecord(TypedDict):
    __pydantic_config__ = ALLOW_EXTRA  # type: ignore[misc]

    losses: list[ProjectedLossRecord]
    reason: str | None


class TrainingRecord(TypedDict):
    __pydantic_config__ = ALLOW_EXTRA  # type: ignore[misc]

    steps: Count
    tokens: Count
    trained_parameters: Count
    best_step: Count
    before: CountOrFloat
    after: CountOrFloat
    losses: list[tuple[Count, CountOrFloat | None]]
    seconds: CountOrFloat
    tokens_per_second: CountOrFloat | None
    projection: NotRequired[ProjectionRecord]
    settings: TrainingSettingsRecord
    sequences: Count
    length: Count
    sha256: str


class LinearRecord(TypedDict):
    __pydantic_config__ = ALLOW_EXTRA  # type: ignore[misc]

    name: str
    block: BlockIndex
    role: Role
    in_features: Count
    out_features: Count
    form: str
    shape: tuple[Count, Count]
    rank: Count | None
    parameters_dense: Count
    parameters_kept: Count
    relative_error: CountOrFloat | None
    spectrum: list[tuple[Count, CountOrFloat]]
    input_outlier_share: NotRequired[Share | None]
    gradient_outlier_share: NotRequired[Share | None]


class RefinedBlockRecord(TypedDict):
    __pydantic_config__ = ALLOW_EXTRA  # type: ignore[misc]

    block: BlockIndex
    before: CountOrFloat
    after: CountOrFloat


class ServedSpeedRecord(TypedDict):
    """A metric of a served model; fields that a metric does not have are refused."""

    __pydantic_config__ = FORBID_EXTRA  # type: ignore[misc]

    model: str
    name: str
    value: CountOrFloat
    unit: str
    higher_is_better: bool
    conditions: dict[str, str | CountOrFloat]
    low: CountOrFloat | None
    high: CountOrFloat | None
    rounds: list[CountOrFloat] | None
    parts: list[str]


class StageRecord(TypedDict):
    __pydantic_config__ = ALLOW_EXTRA  # type: ignore[misc]

    seconds: CountOrFloat
    cpu_seconds: CountOrFloat
    memory: Count | None


class MemoryRecord(TypedDict):
    __pydantic_config__ = ALLOW_EXTRA  # type: ignore[misc]

    estimated: Count
    measured: Count | None


class ModelRecord(TypedDict, total=False):
    """lrcompress.json; docs/checkpoint.md describes each field."""

    __pydantic_config__ = ALLOW_EXTRA  # type: ignore[misc]

    source: str | None
    trained_from: str | None
    export: str
    recipe: dict[str, dict[str, Any]]
    counts: dict[str, CountsRecord]
    calibration: CalibrationRecord | None
    finetuned: TrainingRecord
    pretrained: TrainingRecord
    before: ModelRecord
    factorized_from: ModelRecord
    probed: dict[str, CountOrFloat]
    notes: list[str]
    stages: dict[str, StageRecord]
    memory: MemoryRecord
    linears: list[LinearRecord]
    refined: list[RefinedBlockRecord]
    served: dict[str, list[ServedSpeedRecord]]


_MODEL_RECORD = TypeAdapter(ModelRecord)


def validate_record(record: Mapping[str, Any]) -> dict[str, Any]:
    """`record` with the fields of the schema converted to their types, and all others as they are.

    Raises ValueError that names the first field of the wrong type.
    """
    try:
        return {**record, **_MODEL_RECORD.validate_python(record)}
    except ValidationError as error:
        raise ValueError(validation_reason(error)) from None
