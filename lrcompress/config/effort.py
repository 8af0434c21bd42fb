"""Effort: one word for the defaults of several settings, by the time that a user has.

A chosen value stands in the checked settings as if the user had set it. So records, fingerprints
and recipes that are written back hold the values, not only the word.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lrcompress.methods.registry import READ_NO_TEXT

# Effort -> section -> key -> value. Most of the time goes into samples: the model writes them, runs
# on them, and runs backwards. So quick takes a third to a half of the default numbers, and best
# twice as many. best also fits anchored, which takes about as long again and loses less quality.
EFFORTS: dict[str, dict[str, dict[str, Any]]] = {
    "quick": {
        "calibration": {"max_samples": 16, "max_generated_samples": 8, "gradient_samples": 4},
    },
    "default": {},
    "best": {
        "calibration": {"max_samples": 100, "max_generated_samples": 40, "gradient_samples": 16},
        "factorize": {"sequential": "anchored"},
    },
}


def with_effort(sections: Mapping[str, Any]) -> dict[str, Any]:
    """Unchecked values of `sections`, and what `factorize.effort` chooses where they have none.

    Anchored fits read text, so they are not chosen for methods that read none. What is of a wrong
    type stays as it is, for the check that follows.
    """
    factorize = sections.get("factorize")
    if not isinstance(factorize, dict):
        return dict(sections)
    chosen = dict(EFFORTS.get(str(factorize.get("effort")), {}))
    if factorize.get("method") in READ_NO_TEXT:
        chosen.pop("factorize", None)
    filled = {name: _filled(sections.get(name, {}), keys) for name, keys in chosen.items()}
    return {**sections, **filled}


def _filled(values: Any, defaults: dict[str, Any]) -> Any:
    return defaults | values if isinstance(values, dict) else values
