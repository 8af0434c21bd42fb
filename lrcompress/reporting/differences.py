"""How a later model of an evaluation differs from the first: per token, per block, in free text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import exp, inf, isnan
from statistics import median
from typing import TypeVar

from lrcompress.reporting.metric import PUBLISHED

# a perplexity is exp(loss), and exp overflows a float64 above 709
MAX_EXPONENT = 700.0


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
        return exp(min(self.baseline, MAX_EXPONENT))

    @property
    def perplexity(self) -> float:
        return exp(min(self.model, MAX_EXPONENT))

    @property
    def ratio(self) -> float:
        """Perplexity of the model / perplexity of the baseline."""
        return exp(min(self.model - self.baseline, MAX_EXPONENT))


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
    def comparable_key(self) -> tuple[object, ...]:
        """Equal for two changes on one text that may stand in one table."""
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
    def comparable_key(self) -> tuple[object, ...]:
        """Equal for two changes that may stand in one table."""
        return self.baseline, self.data, self.tokens, len(self.errors)

    @property
    def worst(self) -> int:
        """The index of the block with the largest error; NaN counts as infinite."""
        errors = [inf if isnan(error) else error for error in self.errors]
        return errors.index(max(errors))

    @property
    def median(self) -> float:
        return median(self.errors)


Change = TypeVar("Change", TokenChange, BlockChange)


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

    def renamed(self, model: Callable[[str], str], data: Callable[[str], str] = str) -> Differences:
        """With other names of the models, and of the texts."""

        def rename(change: Change) -> Change:
            return replace(
                change,
                baseline=model(change.baseline),
                model=model(change.model),
                data=data(change.data),
            )

        return Differences(
            tokens=tuple(rename(change) for change in self.tokens),
            blocks=tuple(rename(change) for change in self.blocks),
            continuations=tuple(
                Continuation(c.prompt, {model(label): text for label, text in c.texts.items()})
                for c in self.continuations
            ),
        )

    def comparable(self) -> Differences:
        """Only the changes that fit into one table with the first change.

        Token changes need its baseline and, for each text, the windows of the first change on that
        text. Block changes need its baseline, text, token count and number of blocks.
        """
        baseline = self.tokens[0].baseline if self.tokens else ""
        candidates = [change for change in self.tokens if change.baseline == baseline]
        keys: dict[str, tuple[object, ...]] = {}
        for change in candidates:
            keys.setdefault(change.data, change.comparable_key)
        tokens = (change for change in candidates if change.comparable_key == keys[change.data])
        blocks = (
            change
            for change in self.blocks
            if change.comparable_key == self.blocks[0].comparable_key
        )
        return replace(self, tokens=tuple(tokens), blocks=tuple(blocks))
