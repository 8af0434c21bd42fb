"""Reads untrusted YAML and JSON as plain data of limited size."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

# limits of a YAML text: characters, and values after its aliases are expanded
MAX_CHARACTERS, MAX_VALUES = 200_000, 100_000
# exceptions that PyYAML raises for invalid texts
YAML_READ_ERRORS = (
    yaml.YAMLError, ValueError, ArithmeticError, LookupError, TypeError, AttributeError,
    RecursionError,
)  # fmt: skip
# a JSON integer with more digits becomes a float, which is infinite from 309 digits on
MAX_INTEGER_DIGITS = 300
# escape of a surrogate: valid in a pair, but UTF-8 cannot encode a single one
SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")


def read_yaml(text: str) -> Any:
    """The data in a YAML text, of JSON's types only: never creates Python objects.

    Raises ValueError with the reason if the text is not YAML, is too long, has values of other
    types, has a key twice in one mapping, or has aliases that contain themselves or expand to more
    than MAX_VALUES values.
    """
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"it has more than {MAX_CHARACTERS:,} characters")
    try:
        node = yaml.compose(text, yaml.SafeLoader)
        if node is not None and _value_count(node, {}) > MAX_VALUES:
            raise ValueError(f"its aliases stand for more than {MAX_VALUES:,} values")
        _check_keys(node, set())
        data = yaml.safe_load(text)
        _check_plain(data)
        return data
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except YAML_READ_ERRORS as error:
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from None


def _value_count(node: yaml.Node, counts: dict[int, int]) -> int:
    """Number of values in `node` after aliases are expanded.

    `counts` holds the results by id of node, so that each node is counted once.
    """
    if id(node) not in counts:
        counts[id(node)] = MAX_VALUES + 1  # for an alias inside the node itself
        counts[id(node)] = 1 + sum(_value_count(child, counts) for child in _children(node))
    return counts[id(node)]


def _children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [child for pair in node.value for child in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []


def check_keys(text: str | bytes) -> None:
    """Raises ValueError for a YAML text with a key twice in one mapping.

    The text may have tags, such as lm-eval's `!function`: no objects are made.
    """
    try:
        _check_keys(yaml.compose(text, yaml.SafeLoader), set())
    except YAML_READ_ERRORS as error:
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from None


def _check_keys(node: yaml.Node | None, checked: set[int]) -> None:
    """Raises ValueError for a key that a mapping in `node` has twice; PyYAML would take the last.

    `checked` holds the ids of nodes, so that each node is checked once.
    """
    if node is None or id(node) in checked:
        return
    checked.add(id(node))
    names: set[tuple[str, str]] = set()
    for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
        if not isinstance(key, yaml.ScalarNode):
            continue
        if (key.tag, key.value) in names:
            line = key.start_mark.line + 1
            raise ValueError(f"line {line} gives the key {key.value!r} again: keep one of them")
        names.add((key.tag, key.value))
    for child in _children(node):
        _check_keys(child, checked)


def read_json(text: str) -> Any:
    """The data in a JSON text; integers of more than MAX_INTEGER_DIGITS digits become floats.

    Raises ValueError with the reason if the text is not JSON, is nested too deeply, or has text
    that UTF-8 cannot encode.
    """
    try:
        data = json.loads(text, parse_int=_number)
        if SURROGATE_ESCAPE.search(text):
            _check_plain(data)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    return data


def _check_plain(value: Any) -> None:
    """Raises ValueError for types that JSON lacks, and for text that UTF-8 cannot encode."""
    if isinstance(value, dict):
        for child in (*value.keys(), *value.values()):
            _check_plain(child)
    elif isinstance(value, list):
        for child in value:
            _check_plain(child)
    elif isinstance(value, str):
        if any("\ud800" <= char <= "\udfff" for char in value):
            raise ValueError("it has a half of a character")
    elif not isinstance(value, int | float | None):
        raise ValueError(f"it has a {type(value).__name__}: put it into quotes")


def _number(digits: str) -> int | float:
    return int(digits) if len(digits) <= MAX_INTEGER_DIGITS else float(digits)


def read_object(file: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ValueError with the reason if the file holds none."""
    data = read_json(file.read_text("utf-8"))
    if not isinstance(data, dict):
        raise ValueError("no object")
    return data
