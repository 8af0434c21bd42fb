"""Inputs that somebody tampered with, drawn by hypothesis: trees of values, and texts."""

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
    """Checks about `count` examples, the same in every run; returns how many. Nothing is kept."""
    options: dict[str, Any] = {
        "max_examples": count,
        "derandomize": True,
        "database": None,
        "deadline": None,
        "phases": [Phase.generate],
        "suppress_health_check": list(HealthCheck),
    }
    done = 0

    @settings(**options)
    @given(one=strategy)
    def every(one: T) -> None:
        nonlocal done
        done += 1
        check(one)

    every()
    return done


def _spots(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Every place of a value in `tree`: its container, and its key or index there."""
    keys = tree if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ()
    for key in list(keys):
        yield tree, key
        yield from _spots(tree[key])


def _changed(draw: Callable[..., Any], value: Any) -> Any:
    ways = [st.sampled_from(NASTY), st.just([value])]
    if isinstance(value, int | float) and not isinstance(value, bool):
        ways += [st.sampled_from([value + 1, value - 1, -value, 2 * value, value * 10**9])]
    if isinstance(value, str):
        ways += [st.sampled_from([value[:-1], value + "x", value.upper(), f"../{value}"])]
    if isinstance(value, list):
        ways += [st.sampled_from([value[:-1], value[::-1], [*value, *value]])]
    return copy.deepcopy(draw(st.one_of(ways)))


@st.composite
def tampered(draw: Callable[..., Any], tree: Any) -> Any:
    """`tree` with one to three of its places changed, removed, renamed or exchanged."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, 3))):
        spots = list(_spots(tree))
        if not spots:
            break
        container, key = spots[draw(st.integers(0, len(spots) - 1))]
        how = draw(st.sampled_from(["change", "change", "change", "remove", "rename"]))
        if how == "change":
            container[key] = _changed(draw, container[key])
        elif how == "remove" or isinstance(container, list):
            del container[key]
        else:
            container[f"{key}{draw(st.sampled_from(['x', '.', ' ', '/..']))}"] = container.pop(key)
    return tree


@st.composite
def disturbed(draw: Callable[..., Any], text: str) -> str:
    """`text` with one to three of its pieces replaced by what means something else."""
    for _ in range(draw(st.integers(1, 3))):
        begin = draw(st.integers(0, len(text)))
        end = min(len(text), begin + draw(st.integers(0, 12)))
        text = text[:begin] + draw(st.sampled_from(FRAGMENTS)) + text[end:]
    return text


@st.composite
def damaged(draw: Callable[..., Any], content: bytes, before: int) -> bytes:
    """`content` cut, longer, or with some of its first `before` bytes changed."""
    how = draw(st.sampled_from(["cut", "longer", "flip", "flip", "flip"]))
    if how == "cut":
        return content[: draw(st.integers(0, len(content) - 1))]
    if how == "longer":
        return content + bytes(draw(st.integers(1, 64)))
    changed = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        changed[draw(st.integers(0, before - 1))] = draw(st.integers(0, 255))
    return bytes(changed)
