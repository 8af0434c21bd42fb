"""What changed between the first model of an evaluation and a later one, beyond single numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import exp, inf, isnan
from statistics import median

from lrcompress.reporting.metric import PUBLISHED

LARGEST = 700.0  # exp overflows above 709


@dataclass(frozen=True)
class PositionLoss:
    """Mean loss of the tokens with so many tokens of context."""

    __pydantic_config__ = PUBLISHED

    first: int
    """Tokens of context, at least."""
    last: int
    """Tokens of context, at most."""
    tokens: int
    baseline: float
    """Nats per token."""
    model: float
    """Nats per token."""

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
    """One predicted token: what stood before it, what it was, and each model's likeliest guess."""

    __pydantic_config__ = PUBLISHED

    window: int
    """Which window of the text, from 0."""
    position: int
    """Tokens of context in the window."""
    context: str
    """The last tokens before it."""
    actual: str
    """The token that comes."""
    baseline_guess: str
    baseline_probability: float
    """What the baseline gives its own guess."""
    guess: str
    probability: float
    """What the model gives its own guess."""
    divergence: float
    """KL(baseline || model) in nats."""


@dataclass(frozen=True)
class TokenChange:
    """A later model against the first on every token of some windows of a text."""

    __pydantic_config__ = PUBLISHED

    baseline: str
    model: str
    data: str
    context_length: int
    windows: int
    tokens: int
    divergence: float
    """Mean over tokens of KL(baseline || model) in nats."""
    percentiles: Mapping[str, float]
    """Of the divergence over tokens, by their percentage."""
    agreement: float
    """Share of tokens where both think the same token likeliest."""
    positions: tuple[PositionLoss, ...]
    worst: tuple[Token, ...]
    """The tokens of the largest divergence, largest first."""

    @property
    def way(self) -> tuple[object, ...]:
        """How it was measured."""
        return self.context_length, self.windows


@dataclass(frozen=True)
class BlockChange:
    """How far each block of a model is from the baseline's, given what the baseline's is given."""

    __pydantic_config__ = PUBLISHED

    baseline: str
    model: str
    data: str
    tokens: int
    errors: tuple[float, ...]
    """By block: mean over tokens of ||f'(h) - f(h)||^2 / ||f(h) - h||^2, h the hidden state in
    front of the block of the baseline, f and f' the block of the baseline and of the model. A block
    that passes h on unchanged has 1."""

    @property
    def way(self) -> tuple[object, ...]:
        """How it was measured."""
        return self.baseline, self.data, self.tokens, len(self.errors)

    @property
    def worst(self) -> int:
        """One that is no number counts as infinite."""
        errors = [inf if isnan(error) else error for error in self.errors]
        return errors.index(max(errors))

    @property
    def median(self) -> float:
        return median(self.errors)


@dataclass(frozen=True)
class Continuation:
    """A prompt, and how each model goes on by its likeliest tokens."""

    __pydantic_config__ = PUBLISHED

    prompt: str
    texts: Mapping[str, str]
    """By model."""


@dataclass(frozen=True)
class Differences:
    """Where later models differ from the first."""

    __pydantic_config__ = PUBLISHED

    tokens: tuple[TokenChange, ...] = ()
    blocks: tuple[BlockChange, ...] = ()
    continuations: tuple[Continuation, ...] = ()

    def alike(self) -> Differences:
        """Without those that have no place in one table with the first of their kind: against
        another model, or measured in another way."""
        base = self.tokens[0].baseline if self.tokens else ""
        against = [one for one in self.tokens if one.baseline == base]
        ways = {one.data: one.way for one in reversed(against)}
        tokens = (one for one in against if one.way == ways[one.data])
        blocks = (one for one in self.blocks if one.way == self.blocks[0].way)
        return replace(self, tokens=tuple(tokens), blocks=tuple(blocks))
