"""One measured number, with its conditions and its samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

# pydantic config of dataclasses that are written to JSON: the JSON Schema describes a field by the
# docstring below it
PUBLISHED = {"use_attribute_docstrings": True, "json_schema_serialization_defaults_required": True}
# a count stays an int when JSON is read back
Number = int | float
PERPLEXITY = "token perplexity"
# names of metrics
SIZES = ("parameters", "weight bytes")
SPEEDS = ("prefill", "decode", "training")
# metrics that say nothing about the quality of a model
NO_QUALITY = {"FFN parameters", *SIZES, *SPEEDS}


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
    """The slowest run of a speed. Of a score the value less one standard error, or, where it is a
    share of right answers, the lower end of Wilson's interval of the same confidence, 68.27 %. Null
    where unknown."""
    high: Number | None = None
    """The fastest run of a speed, and the upper end of a score, as `low`; null where unknown."""
    rounds: Sequence[Number] | None = field(default=None, kw_only=True)
    """Of a served model's speed, the value in each round; models of one run took turns, so that
    they are compared round by round. Null for other metrics."""
    parts: Sequence[str] = field(default_factory=list, kw_only=True)
    """Of a group of tasks: the names of the metrics of its tasks and sub-groups, which it is the
    mean of."""

    @property
    def is_speed(self) -> bool:
        """Whether it is compared within one run only."""
        return self.name in SPEEDS or self.rounds is not None

    @property
    def task(self) -> str:
        """The task in the name, which is "TASK METRIC" or "TASK METRIC (FILTER)"."""
        name = self.name.rpartition(" (")[0] if self.name.endswith(")") else self.name
        return name.rpartition(" ")[0]


@dataclass(frozen=True)
class Metric(Summary):
    """A number with the samples that it is the mean of, where they are known.

    `samples` has shape (count, 2): for each window of a text its summed loss in nats and its
    tokens, for each item of a task its score and 1, for each item of a group of tasks its score
    times its weight and its weight.
    """

    samples: Sequence[Sequence[Number]] = field(default_factory=list)

    @property
    def is_exponential(self) -> bool:
        """Whether the value is exp(mean of the samples), and not their mean."""
        return self.name == PERPLEXITY

    def summary(self) -> dict[str, object]:
        """All fields except the samples: a task has thousands of them."""
        return {k: v for k, v in vars(self).items() if k != "samples"}


def title(metric: Summary) -> str:
    """The name of the metric, and its text or file of questions where it has one."""
    data = metric.conditions.get("data")
    return metric.name + (f", {data}" if data else "")
