"""Writes values as JSON, and fills the templates of Markdown and HTML pages."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

# matches the strings that JSON holds in place of numbers that it does not have
NONFINITE_PATTERN = "^(NaN|-?Infinity)$"


def json_text(content: Any) -> str:
    """Valid JSON: NaN and infinity become strings."""
    return json.dumps(nonfinite_to_text(content), indent=2, allow_nan=False, default=str) + "\n"


def nonfinite_to_text(value: Any) -> Any:
    """`value` with "NaN", "Infinity" or "-Infinity" for each such number in it."""
    if isinstance(value, float) and not math.isfinite(value):
        return json.dumps(float(value))
    if isinstance(value, Mapping):
        return {key: nonfinite_to_text(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [nonfinite_to_text(item) for item in value]
    return value


def render(template: str, escape: bool, **values: Any) -> str:
    """The text of a file in templates/, filled with `values`; `escape` escapes them for HTML."""
    environment = Environment(
        loader=PackageLoader("lrcompress.reporting"),
        autoescape=escape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**values)
