"""The base class of all settings sections."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, field_validator

from lrcompress.config.field_types import MAX_INT64


class Section(BaseModel):
    """A group of settings: validated, immutable, and without unknown keys."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False
    )

    @field_validator("*")
    @classmethod
    def _fits_int64(cls, value: object) -> object:
        if isinstance(value, int) and value > MAX_INT64:
            raise ValueError(f"the number is larger than {MAX_INT64:,}")
        return value
