"""Hand-made results of every kind, for reports and pictures."""

from __future__ import annotations

from typing import Any

import numpy as np

from lrcompress.reporting.differences import (
    BlockChange,
    Continuation,
    Differences,
    PositionLoss,
    Token,
    TokenChange,
)
from lrcompress.reporting.metric import PERPLEXITY, Metric
from lrcompress.workflows.scaling.point import ScalingPoint
from lrcompress.workflows.sweep.point import SweepPoint

SCRIPT = "<script>window.broken = true</script>"
TEXT = {"data": "t.txt", "windows": 8, "tokens": 512, "sha256": "0" * 64}
TASK = {"task_version": 1.0, "num_fewshot": 0, "samples": 8}
LN2, LN3 = 0.6931471805599453, 1.0986122886681098


def _windows(loss: float) -> list[list[float]]:
    return [[64 * (loss + index / 100), 64] for index in range(8)]


def _metrics(model: str, parameters: int, loss: float, right: int) -> list[Metric]:
    score, spread = right / 10, 0.1
    items = [[float(index < right), 1.0] for index in range(10)]
    return [
        Metric(model, "parameters", parameters, "", False),
        Metric(model, PERPLEXITY, 2.718281828**loss, "", False, TEXT, samples=_windows(loss)),
        Metric(model, "q acc", score, "", True, TASK, score - spread, score + spread, items),
    ]


METRICS = (*_metrics("dense", 1200, 2.0, 6), *_metrics("low", 800, 2.5, 5))


def _position(first: int, last: int, loss: float) -> PositionLoss:
    return PositionLoss(first, last, 30, 1.0, 1.0 + loss)


_WORST = Token(0, 3, f"so {SCRIPT}", "|", "`a`", 0.5, "b", 0.25, 4.0)
DETAILS = Differences(
    tokens=(
        TokenChange(
            "dense", "low", "t.txt", 64, 2, 128, 0.25, {"50": 0.1, "99": 2.0}, 0.75,
            (_position(1, 15, LN2), _position(16, 63, LN3 - LN2)), (_WORST,),
        ),
    ),
    blocks=(BlockChange("dense", "low", "t.txt", 128, (0.25, 0.5)),),
    continuations=(Continuation(SCRIPT, {"dense": "one\ntwo", "low": f"{SCRIPT}!"}),),
)  # fmt: skip


def _linear(
    block: int,
    role: str,
    rank: int | None,
    error: float | None,
    outliers: tuple[float | None, float | None],
) -> dict[str, Any]:
    return {
        "name": f"layers.{block}.{role}", "block": block, "role": role, "in_features": 8,
        "out_features": 8, "form": "dense" if rank is None else "factored", "shape": [8, 8],
        "rank": rank, "parameters_dense": 64, "parameters_kept": 16 * (rank or 4),
        "relative_error": error, "largest_coefficient": None,
        "spectrum": [[1, 4.0], [4, 2.0], [8, 0.5]] if rank else [],
        "input_outlier_share": outliers[0], "gradient_outlier_share": outliers[1],
    }  # fmt: skip


RECORD: dict[str, Any] = {
    "linears": [
        _linear(0, "gate", None, None, (0.125, 0.25)), _linear(0, "down", 2, 0.3, (0.0, 0.75)),
        _linear(1, "gate", 6, 0.1, (0.5, None)), _linear(1, "down", 3, 0.2, (0.998, 0.625)),
    ],
    "probed": {"layers.0": 2.5, "layers.1": 0.8},
    "stages": {
        "second_moments": {"seconds": 1234.56, "cpu_seconds": 2345.67, "memory": 3 * 2**30},
        "pivots": {"seconds": 0.25, "cpu_seconds": 0.5, "memory": None},
    },
    "memory": {"estimated": 7 * 2**29, "measured": 3 * 2**30},
    "refined": [
        {"block": 0, "before": 0.5, "after": 0.25}, {"block": 1, "before": 0.5, "after": 0.5},
    ],
    "finetuned": {
        "steps": 10, "tokens": 640, "trained_parameters": 800, "best_step": 10, "before": 0.5,
        "best": 0.3, "after": 0.3, "losses": [[0, 0.5], [5, 0.4], [10, 0.3]], "seconds": 2.0,
        "tokens_per_second": 320.0, "sequences": 10, "length": 64, "sha256": "1" * 64,
        "settings": {
            "data": ["train.txt"], "learning_rate": 1e-4, "train": "factors", "held_out": 2,
            "minutes": 0.5,
        },
    },
    "notes": [f"{SCRIPT} is no note"],
}  # fmt: skip


def points() -> list[SweepPoint]:
    """A dense model and three points, one of which is not on the front."""
    sizes = {"dense": (1.0, 1200, 2.0), "small": (0.8, 1000, 2.1), "large": (0.9, 1100, 2.4)}
    return [
        *(_point(variant, *values) for variant, values in sizes.items()),
        _point("small", 0.5, 700, 3.0),
    ]


def _point(variant: str, ratio: float, parameters: int, loss: float) -> SweepPoint:
    name = variant if variant == "dense" else f"{variant} at {ratio:g}"
    metrics = tuple(_metrics(name, parameters, loss, 5)[:2])
    return SweepPoint(variant, ratio, ratio, 1.0, 2**30, "8 x 64 tokens of train.txt", metrics)


def scaling_points(slopes: dict[str, float], noise: float = 0.004) -> list[ScalingPoint]:
    """Points of known slopes in nats per decade; the dense model is ahead at 1e12 FLOPs."""
    random, made = np.random.default_rng(1), []
    for variant, slope in slopes.items():
        for index, flops in enumerate(np.geomspace(1e12, 1e15, 4)):
            for seed in range(2):
                loss = 6 - slope * (np.log10(flops) - 12) + 0.1 * (variant != "dense")
                loss += noise * random.standard_normal()
                made.append(
                    ScalingPoint(
                        size=f"s{index}",
                        variant=variant,
                        seed=seed,
                        parameters=1000 * 4**index,
                        non_embedding=500 * 4**index,
                        ffn_parameters=300 * 4**index,
                        steps=8,
                        tokens=800,
                        flops=int(flops),
                        seconds=float(flops) / 1e10,
                        loss=float(loss),
                        curve=((0, 7.0),),
                        device="cpu",
                        diverged=None,
                    )
                )
    return made
