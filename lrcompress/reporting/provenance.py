"""Where a model comes from: the texts that it was made from, and how it was trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lrcompress.reporting.metric import PUBLISHED, Summary
from lrcompress.reporting.projection import sentence


@dataclass(frozen=True)
class Text:
    """Tokens that a model met, and for what."""

    __pydantic_config__ = PUBLISHED

    use: str
    """calibration, training or evaluation."""
    data: str
    """The text as it was named; several with commas between them."""
    tokens: int
    """Of an evaluation those that were predicted, of a training those of its whole text."""
    sha256: str
    """Of the tokens: equal hashes mean equal tokens."""
    model: str = ""
    """What the model that was made from it is called in this report; empty for an evaluation, whose
    text all models met."""


def texts(
    metrics: Sequence[Summary], record: Mapping[str, Any] | None, model: str = ""
) -> tuple[Text, ...]:
    """Each text once: of calibration and training from `record`, the lrcompress.json of `model`, of
    evaluation from `metrics`."""
    recorded = [text for part in history(record or {}) for text in _recorded_texts(part)]
    found_texts = [replace(text, model=model) for text in recorded]
    for metric in metrics:
        if sha256 := metric.conditions.get("sha256"):
            data, tokens = str(metric.conditions["data"]), int(str(metric.conditions["tokens"]))
            found_texts.append(Text("evaluation", data, tokens, str(sha256)))
    return tuple(dict.fromkeys(found_texts))


@dataclass(frozen=True)
class TrainingSummary:
    """What reports and cards show of a training.

    `values` maps the title of a column to its text. Seconds are those of the last process of the
    training, its measurements and checkpoints included. `projection` is a sentence, or empty.
    """

    how: str
    text: str
    values: Mapping[str, str]
    projection: str


# key of a record with a training -> how that training is described; the latest training first
TRAININGS = {"finetuned": "Trained towards the dense model", "pretrained": "Trained from scratch"}


def training(record: Mapping[str, Any]) -> TrainingSummary | None:
    """The latest training in `record`; None where there was none."""
    key = next((key for key in TRAININGS if record.get(key)), None)
    if key is None:
        return None
    trained = record[key]
    rate, settings = trained["tokens_per_second"], trained["settings"]
    minutes = settings.get("minutes")
    values = {
        **({} if minutes is None else {"minutes asked for": f"{minutes:g}"}),
        "steps": f"{trained['steps']:,}",
        "tokens": f"{trained['tokens']:,}",
        "learning rate": f"{settings['learning_rate']:g}",
        "trained": settings.get("train", "all"),
        "parameters trained": f"{trained['trained_parameters']:,}",
        f"loss on {settings['held_out']} held-out sequences before": f"{trained['before']:.4f}",
        "after": f"{trained['after']:.4f}",
        "of step": f"{trained['best_step']:,}",
        "seconds": f"{trained['seconds']:.1f}",
        "tokens/s in its steps": "–" if rate is None else f"{rate:.4g}",
    }
    projected = sentence(trained["projection"]) if "projection" in trained else ""
    return TrainingSummary(TRAININGS[key], ", ".join(settings["data"]), values, projected)


# keys of a record that name the texts of its model, or the models that it was made from
PROVENANCE_KEYS = ("calibration", "pretrained", "finetuned", "before", "factorized_from")


def provenance_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """The part of `record` that the record of a model made from this one stores as `before`."""
    return {key: record[key] for key in PROVENANCE_KEYS if record.get(key)}


def history(record: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The records of the models that the model of `record` was made from, then `record`."""
    for earlier in (record.get("factorized_from"), record.get("before")):
        if earlier:
            yield from history(earlier)
    yield record


def _recorded_texts(record: Mapping[str, Any]) -> Iterator[Text]:
    if calibration := record.get("calibration"):
        data, tokens = calibration["data"], calibration["tokens"]
        yield Text("calibration", data, tokens, calibration["sha256"])
    for key in TRAININGS:
        if not (trained := record.get(key)):
            continue
        data, tokens = trained["settings"]["data"], trained["sequences"] * trained["length"]
        yield Text("training", ",".join(data), tokens, trained["sha256"])
