"""What changed between the first model of an evaluation and a later one, beyond single numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import exp
from statistics import median

LARGEST = 700.0  # exp overflows above 709


@dataclass(frozen=True)
class PositionLoss:
    """Mean loss in nats of the tokens with `first` to `last` tokens of context."""

    first: int
    last: int
    tokens: int
    baseline: float
    model: float

    @property
    def baseline_perplexity(self) -> float:
        return exp(min(self.baseline, LARGEST))

    @property
    def perplexity(self) -> float:
        return exp(min(self.model, LARGEST))

    @property
    def ratio(self) -> float:
        return exp(min(self.model - self.baseline, LARGEST))


@dataclass(frozen=True)
class Token:
    """One predicted token: what stood before it, what it was, and each model's likeliest guess.

    `position` counts the tokens of context in its window; `divergence` is in nats.
    """

    window: int
    position: int
    context: str
    actual: str
    baseline_guess: str
    baseline_probability: float
    guess: str
    probability: float
    divergence: float


@dataclass(frozen=True)
class TokenChange:
    """A later model against the first on every token of some windows of a text.

    `divergence` is the mean over tokens of KL(baseline || model) in nats, `percentiles` are of the
    same; `agreement` is the share of tokens where both think the same token likeliest.
    """

    baseline: str
    model: str
    data: str
    context_length: int
    windows: int
    tokens: int
    divergence: float
    percentiles: Mapping[str, float]
    agreement: float
    positions: tuple[PositionLoss, ...]
    worst: tuple[Token, ...]


@dataclass(frozen=True)
class BlockChange:
    """How far each block of a model is from the baseline's, given what the baseline's is given.

    `errors[i]` is the mean over tokens of ||f'(h) - f(h)||^2 / ||f(h) - h||^2, h the hidden state
    in front of block i of the baseline, f and f' the block of the baseline and of the model. A
    block that passes h on unchanged has 1.
    """

    baseline: str
    model: str
    data: str
    tokens: int
    errors: tuple[float, ...]

    @property
    def worst(self) -> int:
        return max(range(len(self.errors)), key=self.errors.__getitem__)

    @property
    def median(self) -> float:
        return median(self.errors)


@dataclass(frozen=True)
class Continuation:
    """A prompt, and how each model goes on by its likeliest tokens."""

    prompt: str
    texts: Mapping[str, str]


@dataclass(frozen=True)
class Details:
    tokens: tuple[TokenChange, ...] = ()
    blocks: tuple[BlockChange, ...] = ()
    continuations: tuple[Continuation, ...] = ()
