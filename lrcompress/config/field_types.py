"""Types of settings: how their values are parsed from text, and which values are allowed."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Callable, Iterable
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ByteSize,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)

from lrcompress.runtime.errors import InputError
from lrcompress.runtime.paths import user_path
from lrcompress.runtime.safe_parsing import read_yaml

T = TypeVar("T")

# the largest signed 64-bit integer
MAX_INT64 = 2**63 - 1


def _split(value: object) -> object:
    """'a,b' or ['a', 'b,c'] -> separate items, so that flags and YAML give the same value."""
    items = [value] if isinstance(value, str | int | float) else value
    if not isinstance(items, list | tuple):
        return value
    groups = [_pieces(item) if isinstance(item, str) else [item] for item in items]
    return [
        item.strip() if isinstance(item, str) else item
        for group in groups
        for item in group
        if item != ""
    ]


def _pieces(text: str) -> list[str]:
    """The items between commas; a file whose name has a comma is one item."""
    return [text] if "," in text and _exists(text) else text.split(",")


def _exists(text: str) -> bool:
    try:
        return any(user_path(path).exists() for path in (text, text.rpartition(":")[0]) if path)
    except InputError:
        return False


def _parse_pairs(value: object) -> object:
    """['damping=0.01'] -> {'damping': 0.01}, for flags that set options of a method."""
    if not isinstance(value, list | tuple):
        return value
    pairs = [str(item).partition("=") for item in value]
    keys = [key.strip() for key, _, _ in pairs]
    if duplicates := [key for key in keys if keys.count(key) > 1]:
        raise ValueError(f"{duplicates[0]} is given twice: give it once")
    try:
        return {key: read_yaml(text) for key, (_, _, text) in zip(keys, pairs, strict=True)}
    except ValueError:
        raise ValueError(f"{value!r} cannot be read: write KEY=VALUE") from None


def none_is_empty(value: object) -> object:
    """Reads YAML's null as the empty list."""
    return () if value is None else value


def one_of(names: Iterable[str]) -> Callable[[str], str]:
    """A validator that raises ValueError for a name that is not in `names`."""
    allowed = list(names)

    def check(name: str) -> str:
        if name not in allowed:
            raise ValueError(f"{name!r} is unknown, choose from {', '.join(allowed)}")
        return name

    return check


def all_of(names: Iterable[str]) -> Callable[[tuple[str, ...]], tuple[str, ...]]:
    """A validator that raises ValueError if an item is not in `names`."""
    check = one_of(names)

    def check_all(items: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(check(item) for item in items)

    return check_all


def not_empty(items: tuple[T, ...]) -> tuple[T, ...]:
    """A validator that raises ValueError for the empty list."""
    if not items:
        raise ValueError("give at least one")
    return items


def variant_name(name: str) -> str:
    """A validator for names of variants: file names, except "dense", the dense model's name."""
    if name == "dense" or not re.fullmatch(r"[\w+=., -]+", name):
        raise ValueError(
            f"{name!r} is not a valid name: use letters, digits, spaces, + and -, not 'dense'"
        )
    return name


def size_name(name: str) -> str:
    """A validator for model sizes, presets or paths whose last part can be a file name."""
    if not re.fullmatch(r"[\w+=.-]+", re.split(r"[/\\]", name)[-1]):
        raise ValueError(f"{name!r} is neither a preset nor a folder: end it with a plain name")
    return name


def _encodable(texts: tuple[str, ...]) -> tuple[str, ...]:
    """Refuses texts of a command line that are in another encoding than the terminal's.

    Python reads a byte that it cannot decode as half a character, which no tokenizer takes.
    """
    for text in texts:
        if any("\ud800" <= character <= "\udfff" for character in text):
            encoding = sys.getfilesystemencoding()
            raise ValueError(f"{text!r} is not {encoding} text: convert it, for example with iconv")
    return texts


def _wrap_text(value: object) -> object:
    """A single text -> a list of one; unlike `_split`, texts may contain commas."""
    return [value] if isinstance(value, str) else value


def _distinct(ratios: tuple[float, ...]) -> tuple[float, ...]:
    """Refuses ratios with equal first six digits, which name points and their files."""
    names = [f"{ratio:g}" for ratio in ratios]
    if duplicates := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"{duplicates[0]} is there twice: name each ratio once")
    return ratios


CHAT_TEMPLATE_TEXT = (
    "How conversations in texts become text: auto (the model's own chat template), none (the "
    "contents of the messages alone), or a file with a Jinja template."
)


# which tokens a loss is a mean over
LossOn = Literal["all", "answers"]
LOSS_ON_TEXT = (
    "Tokens that the loss is a mean over: all, or those of the answers in conversations, as the "
    "chat template tells them."
)


def _expand(path: str) -> str:
    """`path` with ~ and $VARIABLES expanded."""
    return str(user_path(path))


PathText = Annotated[str, AfterValidator(_expand)]
TextList = Annotated[tuple[str, ...], BeforeValidator(_wrap_text), AfterValidator(_encodable)]
NameList = Annotated[tuple[str, ...], BeforeValidator(_split)]
CountList = Annotated[tuple[Annotated[int, Field(ge=1)], ...], BeforeValidator(_split)]
Options = Annotated[dict[str, Any], BeforeValidator(_parse_pairs)]


def _parse_size(value: object, parse_bytes: ValidatorFunctionWrapHandler) -> int:
    """'1.5GB' -> 1500000000 bytes; `parse_bytes` is the parser of `ByteSize`."""
    try:
        size = int(parse_bytes(value))
    except (ValidationError, OverflowError):
        raise ValueError(
            f"{value!r} is not a size, write it like 1.5GB, 900MB or 1200000000"
        ) from None
    if size > MAX_INT64:
        raise ValueError(f"{value!r} is more than any machine holds")
    return size


def _parse_percent(value: object) -> object:
    """'10%' -> 0.1; a bare number is the share itself."""
    text = str(value).strip()
    try:
        return float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        raise ValueError(f"{value!r} is not a share, write it like 10% or 0.1") from None


Size = Annotated[ByteSize, WrapValidator(_parse_size), Field(ge=1)]
Share = Annotated[float, BeforeValidator(_parse_percent), Field(allow_inf_nan=False)]
Percent = Annotated[Share, Field(gt=0)]
RatioList = Annotated[
    tuple[Annotated[Share, Field(gt=0, le=1)], ...],
    BeforeValidator(_split),
    AfterValidator(_distinct),
]


def allowed_words(name: str, names: Iterable[str]) -> str:
    """Text for the error "unknown": the name most similar to `name`, and all allowed names."""
    similar = difflib.get_close_matches(name, names, 1)
    hint = f", did you mean {similar[0]!r}?" if similar else ""
    return f"{hint} (allowed: {', '.join(sorted(names)) or 'none'})"
