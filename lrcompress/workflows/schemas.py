"""The JSON Schemas of metrics.json and sweep.json, as docs/ publishes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from pydantic.json_schema import GenerateJsonSchema

from lrcompress.reporting.metrics_json import METRICS, Evaluation
from lrcompress.reporting.render import NONFINITE_PATTERN, json_text
from lrcompress.runtime.atomic_io import replace_text
from lrcompress.workflows.sweep.sweep_json import SWEEP, Sweep

# class -> its name in the published schemas: programs may generate types from them, so it stays
PUBLISHED_NAMES = {"Differences": "Details", "FrontAxis": "Axis"}


class _Schema(GenerateJsonSchema):
    """Numbers may be texts where they are not finite; fields have no titles."""

    def normalize_name(self, name: str) -> str:
        return super().normalize_name(PUBLISHED_NAMES.get(name, name))

    def dataclass_schema(self, schema: Any) -> dict[str, Any]:
        described = super().dataclass_schema(schema)
        return described | {"title": PUBLISHED_NAMES.get(described["title"], described["title"])}

    def float_schema(self, schema: Any) -> dict[str, Any]:
        return super().float_schema(schema) | {
            "type": ["number", "string"],
            "pattern": NONFINITE_PATTERN,
        }

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def schemas() -> dict[str, str]:
    """File name of a schema -> JSON Schema."""
    layouts: dict[str, Any] = {METRICS: Evaluation, SWEEP: Sweep}
    return {name.replace(".", ".schema."): _schema(layout) for name, layout in layouts.items()}


def write_schemas(folder: str) -> None:
    """Writes every schema into `folder`."""
    for name, text in schemas().items():
        replace_text(Path(folder) / name, text)


def _schema(layout: Any) -> str:
    adapter = TypeAdapter[Any](layout)
    schema = adapter.json_schema(mode="serialization", schema_generator=_Schema)
    return json_text({"$schema": _Schema.schema_dialect} | schema)
