"""How work in progress is shown: the interface of progress displays and messages."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol, TypeVar

T = TypeVar("T")


class Status(str):
    """A unit of work that says how the whole stands; `Progress` shows the latest."""

    __slots__ = ()


class Progress(Protocol):
    """Wraps an iterable and reports how far its consumption has come."""

    def __call__(
        self, items: Iterable[T], description: str, total: int | None = None
    ) -> Iterable[T]: ...


def silent(items: Iterable[T], description: str, total: int | None = None) -> Iterable[T]:
    """The `Progress` that reports nothing."""
    return items


Say = Callable[[str], None]  # tells the user one sentence before the work starts


def unsaid(sentence: str) -> None:
    """The `Say` that tells nothing."""
