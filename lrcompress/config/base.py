"""What every section of a recipe is: checked, frozen, and closed to unknown keys."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, field_validator

from lrcompress.config.field_types import LARGEST


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False
    )

    @field_validator("*")
    @classmethod
    def _countable(cls, value: object) -> object:
        if isinstance(value, int) and value > LARGEST:
            raise ValueError(f"the number is larger than {LARGEST:,}")
        return value
