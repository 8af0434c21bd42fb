"""Interfaces by which long work reports its progress and messages."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol, TypeVar

T = TypeVar("T")


class Status(str):
    """An item of work whose text describes the state; a `Progress` shows the latest one."""

    __slots__ = ()


class Progress(Protocol):
    """Wraps `items` and reports how many of `total` have been consumed."""

    def __call__(
        self, items: Iterable[T], description: str, total: int | None = None
    ) -> Iterable[T]: ...


def silent(items: Iterable[T], description: str, total: int | None = None) -> Iterable[T]:
    """The `Progress` that reports nothing."""
    return items


ShowMessage = Callable[[str], None]  # shows the user one sentence


def show_nothing(sentence: str) -> None:
    """The `ShowMessage` that ignores the sentence."""
