"""YAML and JSON that others may have written: plain data of bounded size, or one reason why not."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

# characters of a YAML text, and values in it, where an alias counts as all that it stands for
LONGEST, MOST = 200_000, 100_000
# what PyYAML raises for a text that it cannot read
UNREADABLE = (
    yaml.YAMLError, ValueError, ArithmeticError, LookupError, TypeError, AttributeError,
    RecursionError,
)  # fmt: skip
# an integer of more digits is read as a float, which is infinite in the end
DIGITS = 300
# half of a character that takes two: with its other half it is one, alone no file can hold it
HALF_PAIR = re.compile(r"\\u[dD][89a-fA-F]")


def read_yaml(text: str) -> Any:
    """The data in a YAML text, of the kinds that JSON has: no objects of Python are made.

    Raises ValueError with the reason where it is no YAML, has other kinds, or aliases that contain
    themselves or stand for more than MOST values.
    """
    if len(text) > LONGEST:
        raise ValueError(f"it has more than {LONGEST:,} characters")
    try:
        node = yaml.compose(text, yaml.SafeLoader)
        if node is not None and _values(node, {}) > MOST:
            raise ValueError(f"its aliases stand for more than {MOST:,} values")
        found = yaml.safe_load(text)
        _check(found)
        return found
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except UNREADABLE as error:
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from None


def _values(node: yaml.Node, known: dict[int, int]) -> int:
    """How many values `node` stands for; no more work than the text is long."""
    if id(node) not in known:
        known[id(node)] = MOST + 1  # of one that contains itself
        known[id(node)] = 1 + sum(_values(part, known) for part in _parts(node))
    return known[id(node)]


def _parts(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []


def read_json(text: str) -> Any:
    """The data in a JSON text, whose integers fit a float or are one.

    Raises ValueError with the reason where it is no JSON, nested too deeply, or has text that no
    file can hold.
    """
    try:
        found = json.loads(text, parse_int=_number)
        if HALF_PAIR.search(text):
            _check(found)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    return found


def _check(value: Any) -> None:
    """Raises ValueError for what JSON has not, and for text that no file can hold."""
    if isinstance(value, dict):
        for part in (*value.keys(), *value.values()):
            _check(part)
    elif isinstance(value, list):
        for part in value:
            _check(part)
    elif isinstance(value, str):
        if any("\ud800" <= one <= "\udfff" for one in value):
            raise ValueError("it has a half of a character")
    elif not isinstance(value, int | float | None):
        raise ValueError(f"it has a {type(value).__name__}: put it into quotes")


def _number(digits: str) -> int | float:
    return int(digits) if len(digits) <= DIGITS else float(digits)


def read_object(file: Path) -> dict[str, Any]:
    """The object in a JSON file; raises ValueError with the reason where it holds none."""
    found = read_json(file.read_text("utf-8"))
    if not isinstance(found, dict):
        raise ValueError("no object")
    return found
