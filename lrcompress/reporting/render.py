"""Values and templates as text: valid JSON, Markdown and pages."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

# of the texts that stand for numbers which JSON lacks
NOT_FINITE = "^(NaN|-?Infinity)$"


def json_text(content: Any) -> str:
    """Valid JSON, also where numbers are not finite."""
    return json.dumps(finite(content), indent=2, allow_nan=False, default=str) + "\n"


def finite(value: Any) -> Any:
    """`value` with texts for the numbers in it that are not finite."""
    if isinstance(value, float) and not math.isfinite(value):
        return json.dumps(float(value))
    if isinstance(value, Mapping):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    return value


def render(template: str, escape: bool, **values: Any) -> str:
    """A template of this package, with HTML escaping where `escape` says so."""
    environment = Environment(
        loader=PackageLoader("lrcompress.reporting"),
        autoescape=escape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**values)
