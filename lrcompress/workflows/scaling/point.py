"""One model of a scaling study: what it is, what its training cost, and what loss it came to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

T = TypeVar("T")

DENSE = "dense"


@dataclass(frozen=True)
class ScalingPoint:
    """Parameters are the trained model's; `flops` are of its whole training, guides included.

    `seconds` are those of its optimizer steps, without measurements and checkpoints. `loss` is in
    nats per token of the test text after training, `curve` during it, by step.
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
        return label(self.size, self.variant, self.seed)

    @classmethod
    def from_dict(cls, known: Mapping[str, Any]) -> Self:
        curve = tuple((int(step), loss) for step, loss in known["curve"])
        return cls(**{**known, "curve": curve})


def label(size: str, variant: str, seed: int) -> str:
    """The point's name, in files too."""
    return f"{size_name(size)}-{variant}-{seed}"


def size_name(size: str) -> str:
    """A preset, or of a path its last part."""
    return Path(size).name


@dataclass(frozen=True)
class Shard:
    """Part `number` of `count`, from 1, of the models of a ladder."""

    number: int
    count: int

    def of(self, items: Sequence[T]) -> Sequence[T]:
        """Every `count`-th item, so that cheap and costly ones are in every part."""
        return items[self.number - 1 :: self.count]
