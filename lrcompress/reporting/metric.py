"""One measured number, with its conditions and its samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

# of dataclasses that are published as JSON: a field's meaning is the docstring after it
PUBLISHED = {"use_attribute_docstrings": True, "json_schema_serialization_defaults_required": True}
Number = int | float  # what is counted stays an int when it is read back
PERPLEXITY = "token perplexity"


@dataclass(frozen=True)
class Summary:
    """One measured number of one model, with everything needed to repeat the measurement."""

    __pydantic_config__ = PUBLISHED

    model: str
    """What the model is called in this report."""
    name: str
    value: Number
    unit: str
    """Empty where the name says it all."""
    higher_is_better: bool
    conditions: Mapping[str, object] = field(default_factory=dict)
    """How it was measured; `data` is the text or the file of questions."""
    low: Number | None = None
    """The slowest run of a speed, one standard error below a score; null where unknown."""
    high: Number | None = None
    """The fastest run of a speed, one standard error above a score; null where unknown."""


@dataclass(frozen=True)
class Metric(Summary):
    """A number with its samples, where they are known.

    They are what it is a mean of: the sum and the weight of each window (nats, tokens) or the score
    and 1 of each item of a task.
    """

    samples: Sequence[Sequence[Number]] = field(default_factory=list)

    @property
    def is_exponential(self) -> bool:
        """Whether it is exp of the mean of its samples, and not the mean."""
        return self.name == PERPLEXITY

    def summary(self) -> dict[str, object]:
        """All fields but the samples, of which a task has thousands."""
        return {k: v for k, v in vars(self).items() if k != "samples"}


SIZES = ("parameters", "weight bytes")


SPEEDS = ("prefill", "decode", "training")


NO_QUALITY = {"FFN parameters", *SIZES, *SPEEDS}
