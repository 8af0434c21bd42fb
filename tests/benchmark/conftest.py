"""The bench commands as the tests call them."""

from __future__ import annotations

import json
from typing import Any

from tests.conftest import invoke

QUICK = ("--repeats", 3, "--width", 64, "--ffn-width", 128, "--keep-ratio", 0.5)


def bench_json(*arguments: object) -> dict[str, Any]:
    result = invoke("bench", *arguments, "--json")
    assert result.exit_code == 0, result.output
    content: dict[str, Any] = json.loads(result.stdout)
    return content
