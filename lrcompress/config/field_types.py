"""Kinds of values that a user writes: how each is read from text, and what is allowed."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable
from typing import Annotated, Any, TypeVar

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ByteSize,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)

from lrcompress.runtime.safe_parsing import read_yaml

T = TypeVar("T")

# what a signed integer of 64 bits holds: of tokens, steps and bytes
LARGEST = 2**63 - 1


def _split(value: object) -> object:
    """'a,b' or ['a', 'b,c'] -> separate items, so that flags and YAML read alike."""
    items = [value] if isinstance(value, str | int | float) else value
    if not isinstance(items, list | tuple):
        return value
    parts = [i.split(",") if isinstance(i, str) else [i] for i in items]
    return [p.strip() if isinstance(p, str) else p for part in parts for p in part if p != ""]


def _pairs(value: object) -> object:
    """['damping=0.01'] -> {'damping': 0.01}, for flags that set options of a method."""
    if not isinstance(value, list | tuple):
        return value
    pairs = [str(item).partition("=") for item in value]
    try:
        return {key.strip(): read_yaml(text) for key, _, text in pairs}
    except ValueError:
        raise ValueError(f"{value!r} cannot be read: write KEY=VALUE") from None


def none_is_empty(value: object) -> object:
    """YAML's null for a list with nothing in it."""
    return () if value is None else value


def one_of(names: Iterable[str]) -> Callable[[str], str]:
    allowed = list(names)

    def check(name: str) -> str:
        if name not in allowed:
            raise ValueError(f"{name!r} is unknown, choose from {', '.join(allowed)}")
        return name

    return check


def all_of(names: Iterable[str]) -> Callable[[tuple[str, ...]], tuple[str, ...]]:
    check = one_of(names)

    def check_all(given: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(check(name) for name in given)

    return check_all


def not_empty(given: tuple[T, ...]) -> tuple[T, ...]:
    if not given:
        raise ValueError("give at least one")
    return given


def variant_name(name: str) -> str:
    """A name that a file can have, and that is not the dense model's."""
    if name == "dense" or not re.fullmatch(r"[\w+=., -]+", name):
        raise ValueError(f"{name!r} is no name: use letters, digits, spaces, + and -, not 'dense'")
    return name


def size_name(name: str) -> str:
    """A preset or a path: its last part names files."""
    if not re.fullmatch(r"[\w+=.-]+", re.split(r"[/\\]", name)[-1]):
        raise ValueError(f"{name!r} is no preset and no folder: end it with a plain name")
    return name


def _listed(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _told_apart(ratios: tuple[float, ...]) -> tuple[float, ...]:
    """Points and their files are called by six digits of their ratio."""
    shown = [f"{ratio:g}" for ratio in ratios]
    if twice := [name for name in shown if shown.count(name) > 1]:
        raise ValueError(f"{twice[0]} is there twice: name each ratio once")
    return ratios


Listed = Annotated[tuple[str, ...], BeforeValidator(_listed)]
Names = Annotated[tuple[str, ...], BeforeValidator(_split)]
Ratios = Annotated[
    tuple[Annotated[float, Field(gt=0, le=1)], ...],
    BeforeValidator(_split),
    AfterValidator(_told_apart),
]
Counts = Annotated[tuple[Annotated[int, Field(ge=1)], ...], BeforeValidator(_split)]
Options = Annotated[dict[str, Any], BeforeValidator(_pairs)]


def _bytes(value: object, parse: ValidatorFunctionWrapHandler) -> int:
    """'1.5GB' -> 1500000000."""
    try:
        size = int(parse(value))
    except (ValidationError, OverflowError):
        raise ValueError(
            f"{value!r} is no size, write it like 1.5GB, 900MB or 1200000000"
        ) from None
    if size > LARGEST:
        raise ValueError(f"{value!r} is more than any machine holds")
    return size


def _percent(value: object) -> object:
    """'10%' -> 0.1; a bare number is the share itself."""
    text = str(value).strip()
    try:
        return float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        raise ValueError(f"{value!r} is no share, write it like 10% or 0.1") from None


Size = Annotated[ByteSize, WrapValidator(_bytes), Field(ge=1)]
Percent = Annotated[float, BeforeValidator(_percent), Field(gt=0, allow_inf_nan=False)]


def allowed_words(name: str, names: Iterable[str]) -> str:
    """The words after "unknown": the nearest name and all that are allowed."""
    close = difflib.get_close_matches(name, names, 1)
    hint = f", did you mean {close[0]!r}?" if close else ""
    return f"{hint} (allowed: {', '.join(sorted(names)) or 'none'})"
