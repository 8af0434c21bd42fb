"""Reports and a sweep of the size and with the names that people have, for tests of pages."""

from __future__ import annotations

import numpy as np

from lrcompress.reporting.differences import BlockChange, Differences, PositionLoss, TokenChange
from lrcompress.reporting.metric import PERPLEXITY, Metric
from lrcompress.reporting.report import Report
from lrcompress.reporting.tables import labels
from lrcompress.workflows.sweep.point import SweepPoint
from lrcompress.workflows.sweep.report import SweepReport

RUNS = "/home/anna.example/experiments/2026-11/compression-of-smollm2"
TEXTS = (f"{RUNS}/texts/wikitext-103-raw/test.parquet", f"{RUNS}/texts/our own chat/test.jsonl")
SOURCES = (
    f"{RUNS}/pretrained/SmolLM2-135M-Instruct",
    f"{RUNS}/keep-0.9/seed-1/model", f"{RUNS}/keep-0.8/seed-1/model",
    f"{RUNS}/keep-0.7/seed-1/model", f"{RUNS}/keep-0.6/seed-1/model",
)  # fmt: skip
AREAS = {"humanities": 13, "other": 13, "social_sciences": 12, "stem": 19}


def _size(model: str, parameters: int) -> Metric:
    return Metric(model, "parameters", parameters, "", False)


def _perplexity(model: str, text: str, losses: np.ndarray) -> Metric:
    conditions: dict[str, object] = {"data": text, "context_length": 1024, "windows": len(losses)}
    conditions |= {"tokens": 1023 * len(losses), "sha256": "0a" * 32}
    samples = [[1024 * float(loss), 1024] for loss in losses]
    return Metric(
        model, PERPLEXITY, float(np.exp(losses.mean())), "", False, conditions, samples=samples
    )


def _speed(model: str, name: str, rate: float, spread: float) -> Metric:
    conditions = {"runs": 5, "device": "cpu", "threads": 2}
    return Metric(
        model, name, rate, "tokens/s", True, conditions, rate * (1 - spread), rate * (1 + spread)
    )


def _accuracy(model: str, task: str, right: np.ndarray, *parts: str) -> Metric:
    score = float(right.mean())
    error = float(np.sqrt(score * (1 - score) / len(right)))
    conditions = {"task_version": 1.0, "num_fewshot": 5, "samples": len(right)}
    samples = [[float(answer), 1] for answer in right]
    return Metric(
        model, f"{task} acc", score, "", True, conditions, score - error, score + error, samples,
        parts=[f"{part} acc" for part in parts],
    )  # fmt: skip


def checkpoints() -> Report:
    """Five checkpoints of one kind in folders of one name, with long absolute paths."""
    draw = np.random.default_rng(0)
    names = labels(["dense", *["factorized"] * 4], SOURCES)
    metrics = list[Metric]()
    texts = {text: draw.normal(2.8 + index / 2, 0.3, 60) for index, text in enumerate(TEXTS)}
    for index, name in enumerate(names):
        metrics.append(_size(name, 134_515_008 - 9_000_000 * index))
        for text, losses in texts.items():
            noise = draw.normal(0.0004 + 0.04 * index**2, 0.02, 60) if index else 0.0
            metrics.append(_perplexity(name, text, losses + noise))
        for speed, rate in (("prefill", 1834.2), ("decode", 41.3)):
            metrics.append(_speed(name, speed, rate * (1 + index / 20), 0.06))
    return Report(f"{SOURCES[0]}: evaluation", tuple(metrics), _details(names))


def _details(names: list[str]) -> Differences:
    positions = tuple(
        PositionLoss(2**power, 2 ** (power + 1) - 1, 2048, 4 - power / 6, 4.2 - power / 6)
        for power in range(10)
    )
    tokens = tuple(
        TokenChange(
            names[0], name, TEXTS[0], 1024, 8, 8192, 0.1, {"50": 0.02, "95": 0.6, "99": 1.9}, 0.87,
            positions, (),
        )
        for name in names[1:]
    )  # fmt: skip
    errors = tuple(0.02 + block / 1000 for block in range(30))
    blocks = tuple(BlockChange(names[0], name, TEXTS[0], 8192, errors) for name in names[1:])
    return Differences(tokens, blocks)


def grouped_tasks() -> Report:
    """Three models on MMLU, whose groups of groups have 57 tasks, and on two tasks alone."""
    draw = np.random.default_rng(1)
    metrics = list[Metric]()
    shares = {"dense": 0.0, "factorized": 0.06, "finetuned": 0.02}
    right = {name: draw.random(400) < 0.5 for name in ("arc_easy", "piqa")}
    subjects = {
        f"mmlu_{area}_subject_{index}": (f"mmlu_{area}", draw.random(120) < 0.45)
        for area, count in AREAS.items()
        for index in range(count)
    }
    for model, share in shares.items():
        metrics.append(_size(model, 134_515_008))
        flipped = {name: answers & (draw.random(400) >= share) for name, answers in right.items()}
        metrics += [_accuracy(model, name, answers) for name, answers in flipped.items()]
        asked = {
            name: (area, answers & (draw.random(120) >= share))
            for name, (area, answers) in subjects.items()
        }
        metrics += [_accuracy(model, name, answers) for name, (_, answers) in asked.items()]
        for area in AREAS:
            names = [name for name, (parent, _) in asked.items() if parent == f"mmlu_{area}"]
            answers = np.concatenate([asked[name][1] for name in names])
            metrics.append(_accuracy(model, f"mmlu_{area}", answers, *names))
        every = np.concatenate([answers for _, answers in asked.values()])
        metrics.append(_accuracy(model, "mmlu", every, *(f"mmlu_{area}" for area in AREAS)))
    return Report("runs/smollm2: run", tuple(metrics))


def sweep() -> SweepReport:
    """Three variants at four keep ratios, with speeds whose ranges overlap."""
    draw = np.random.default_rng(2)
    losses = draw.normal(2.8, 0.3, 40)
    dense = _sweep_metrics("dense", 134_515_008, losses)
    points = [SweepPoint("dense", 1.0, 1.0, 0.0, None, "", dense)]
    for rank, variant in enumerate(("two-sided-pivoted", "narrowed", "whitened-uniform")):
        for keep in (0.9, 0.8, 0.6, 0.4):
            label = f"{variant} at {keep:g}"
            rise = (1 - keep) ** 2 * (rank + 1) + draw.normal(0, 0.01, 40)
            metrics = _sweep_metrics(label, int(54e6 + 80e6 * keep), losses + rise)
            rate = 40 * (1 + (1 - keep) * (0.4 if rank == 1 else 0.15))
            points.append(
                SweepPoint(
                    variant, keep, keep, 42.0, 3 * 2**30, "128 x 1024 tokens of train.txt",
                    (*metrics, _speed(label, "decode", rate, 0.04)),
                    (_speed("dense", "decode", 40.0, 0.04),),
                )
            )  # fmt: skip
    points[0] = SweepPoint(
        "dense", 1.0, 1.0, 0.0, None, "", (*dense, _speed("dense", "decode", 40.0, 0.04))
    )
    return SweepReport(SOURCES[0], tuple(points))


def _sweep_metrics(label: str, parameters: int, losses: np.ndarray) -> tuple[Metric, ...]:
    right = np.random.default_rng(3).random(200) < 0.9 - losses.mean() / 10
    return (
        _size(label, parameters),
        *(_perplexity(label, text, losses) for text in TEXTS),
        _accuracy(label, "arc_easy", right),
    )
