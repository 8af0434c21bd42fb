"""Tampered inputs, drawn by hypothesis: trees of values, texts and bytes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

T = TypeVar("T")

NASTY: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 2, 3, 7, 33, 2**31, 2**63, 10**30, 10**400, -(2**70), 0.5, 1e-30,
    1e308, float("inf"), float("-inf"), float("nan"), "", " ", "\0", "\n", "\x1b[2J", "\u202e",
    "../../etc/passwd", "/etc/passwd", "~nobody/model", "package:os/../x", "a" * 5000, "<script>",
    "NaN", "1e999", "int8", "float8_e4m3fn", "quanto", "gpt2", [], {}, [[]], [None] * 40,
    {"a": {"b": 1}}, ["x", 1, None],
)  # fmt: skip
FRAGMENTS = (
    "!!python/object/apply:os.mkdir ['BROKEN']", "!!python/name:os.system", "!!binary |", "!!set ",
    "!!timestamp x", "&a ", "*a", "<<: *a", "? ", "- ", "{", "}", "[", "]", ": ", "\t", "\0", "é",
    "%YAML 9.9\n", "---\n", "2001-99-99", "2001-01-01", "0x", "0b2", "1:70:99", ".inf", ".nan",
    "1" * 5000, '"\\ud800"', "'", '"', "#", "|", ">", "\n  ", "`", "@", "\u2028", "[" * 2000,
)  # fmt: skip


def explore(strategy: st.SearchStrategy[T], check: Callable[[T], None], count: int) -> int:
    """Runs `check` on about `count` examples, the same ones in every run; returns their number."""
    options: dict[str, Any] = {
        "max_examples": count,
        "derandomize": True,
        "database": None,
        "deadline": None,
        "phases": [Phase.generate],
        "suppress_health_check": list(HealthCheck),
    }
    checked = 0

    @settings(**options)
    @given(example=strategy)
    def check_each(example: T) -> None:
        nonlocal checked
        checked += 1
        check(example)

    check_each()
    return checked


def _locations(tree: Any) -> Iterator[tuple[Any, Any]]:
    """The container and the key or index of every value in `tree`."""
    keys = tree if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ()
    for key in list(keys):
        yield tree, key
        yield from _locations(tree[key])


def _changed(draw: Callable[..., Any], value: Any) -> Any:
    strategies = [st.sampled_from(NASTY), st.just([value])]
    if isinstance(value, int | float) and not isinstance(value, bool):
        strategies += [st.sampled_from([value + 1, value - 1, -value, 2 * value, value * 10**9])]
    if isinstance(value, str):
        strategies += [st.sampled_from([value[:-1], value + "x", value.upper(), f"../{value}"])]
    if isinstance(value, list):
        strategies += [st.sampled_from([value[:-1], value[::-1], [*value, *value]])]
    return copy.deepcopy(draw(st.one_of(strategies)))


@st.composite
def tampered(draw: Callable[..., Any], tree: Any) -> Any:
    """`tree` with one to three of its values changed, removed or renamed."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, 3))):
        locations = list(_locations(tree))
        if not locations:
            break
        container, key = locations[draw(st.integers(0, len(locations) - 1))]
        action = draw(st.sampled_from(["change", "change", "change", "remove", "rename"]))
        if action == "change":
            container[key] = _changed(draw, container[key])
        elif action == "remove" or isinstance(container, list):
            del container[key]
        else:
            container[f"{key}{draw(st.sampled_from(['x', '.', ' ', '/..']))}"] = container.pop(key)
    return tree


@st.composite
def disturbed(draw: Callable[..., Any], text: str) -> str:
    """`text` with one to three pieces replaced by FRAGMENTS."""
    for _ in range(draw(st.integers(1, 3))):
        begin = draw(st.integers(0, len(text)))
        end = min(len(text), begin + draw(st.integers(0, 12)))
        text = text[:begin] + draw(st.sampled_from(FRAGMENTS)) + text[end:]
    return text


@st.composite
def damaged(draw: Callable[..., Any], content: bytes, before: int) -> bytes:
    """`content` cut, longer, or with some of its first `before` bytes changed."""
    action = draw(st.sampled_from(["cut", "longer", "flip", "flip", "flip"]))
    if action == "cut":
        return content[: draw(st.integers(0, len(content) - 1))]
    if action == "longer":
        return content + bytes(draw(st.integers(1, 64)))
    changed = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        changed[draw(st.integers(0, before - 1))] = draw(st.integers(0, 255))
    return bytes(changed)
