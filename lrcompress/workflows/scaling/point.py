"""One trained model of a scaling study: its size, the cost of its training, and its loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

DENSE = "dense"


@dataclass(frozen=True)
class ScalingPoint:
    """A trained model. Its parameter counts are those of the model as it is saved.

    `flops` are those of the whole training, dense guides included. `seconds` are those of the
    optimizer steps, without measurements and checkpoints. `loss` is in nats per token of the test
    text after the training, and `curve` has the loss during it, by step. `diverged` is the
    reason why the training was stopped early, if it was.
    """

    size: str
    variant: str
    seed: int
    parameters: int
    non_embedding: int
    ffn_parameters: int
    steps: int
    tokens: int
    flops: int
    seconds: float
    loss: float
    curve: tuple[tuple[int, float | None], ...]
    device: str
    diverged: str | None

    @property
    def label(self) -> str:
        """What reports call the point."""
        return label(self.size, self.variant, self.seed)


def label(size: str, variant: str, seed: int) -> str:
    """The name of a point in reports and files."""
    return f"{size_name(size)}-{variant}-{seed}"


def size_name(size: str) -> str:
    """The name of a preset, or the last part of a path."""
    return Path(size).name


@dataclass(frozen=True)
class Shard:
    """Part `number`, from 1, of the models of a ladder, which is split into `count` parts."""

    number: int
    count: int

    def of(self, items: Sequence[T]) -> Sequence[T]:
        """Every `count`-th item, so that each part has cheap and costly ones."""
        return items[self.number - 1 :: self.count]
