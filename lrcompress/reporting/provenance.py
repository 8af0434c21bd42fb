"""Where a model comes from: the texts that made it, and how it was trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lrcompress.reporting.metric import PUBLISHED, Summary


@dataclass(frozen=True)
class Text:
    """Tokens that a model met, and for what."""

    __pydantic_config__ = PUBLISHED

    use: str
    """calibration, training or evaluation."""
    data: str
    """The text as it was named; several with commas between them."""
    tokens: int
    """Of an evaluation those that were predicted, of a training all that were read."""
    sha256: str
    """Of the tokens: equal hashes mean equal tokens."""


def texts(metrics: Sequence[Summary], record: Mapping[str, Any] | None) -> tuple[Text, ...]:
    """Of calibration and training, as `record` (lrcompress.json) names them, and of evaluation."""
    found = [text for part in history(record or {}) for text in _made_of(part)]
    for metric in metrics:
        if mark := metric.conditions.get("sha256"):
            data, tokens = str(metric.conditions["data"]), int(str(metric.conditions["tokens"]))
            found.append(Text("evaluation", data, tokens, str(mark)))
    return tuple(dict.fromkeys(found))


@dataclass(frozen=True)
class Training:
    """What is shown of a training: its texts, and title -> value of everything else.

    Seconds are of the process that ended it, its measurements and checkpoints included.
    """

    how: str
    text: str
    values: Mapping[str, str]


# part of a record -> how a model was trained that has it; the latest training first
TRAININGS = {"finetuned": "Trained towards the dense model", "pretrained": "Trained from scratch"}


def training(record: Mapping[str, Any]) -> Training | None:
    """Of the latest training in `record`, if there was one."""
    key = next((key for key in TRAININGS if record.get(key)), None)
    if key is None:
        return None
    done = record[key]
    rate, asked = done["tokens_per_second"], done["settings"]
    values = {
        "steps": f"{done['steps']:,}",
        "tokens": f"{done['tokens']:,}",
        "learning rate": f"{asked['learning_rate']:g}",
        "trained": asked.get("train", "all"),
        "parameters trained": f"{done['trained_parameters']:,}",
        f"loss on {asked['held_out']} held-out sequences before": f"{done['before']:.4f}",
        "after": f"{done['after']:.4f}",
        "of step": f"{done['best_step']:,}",
        "seconds": f"{done['seconds']:.1f}",
        "tokens/s in its steps": "–" if rate is None else f"{rate:.4g}",
    }
    return Training(TRAININGS[key], ", ".join(asked["data"]), values)


# what a record keeps of the models that its own was made of, and of the texts of all of them
LEARNED = ("calibration", "pretrained", "finetuned", "before", "factorized_from")


def learned(record: Mapping[str, Any]) -> dict[str, Any]:
    """What of `record` goes, as `before`, into that of a model made of its own."""
    return {key: record[key] for key in LEARNED if record.get(key)}


def history(record: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """`record`, and those of the models that it was made of."""
    for earlier in (record.get("factorized_from"), record.get("before")):
        if earlier:
            yield from history(earlier)
    yield record


def _made_of(record: Mapping[str, Any]) -> Iterator[Text]:
    if read := record.get("calibration"):
        yield Text("calibration", read["data"], read["tokens"], read["sha256"])
    for key in TRAININGS:
        if not (done := record.get(key)):
            continue
        data, tokens = done["settings"]["data"], done["sequences"] * done["length"]
        yield Text("training", ",".join(data), tokens, done["sha256"])
