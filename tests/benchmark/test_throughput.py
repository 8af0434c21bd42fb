"""Training speed: all models on one batch, and nothing of it stays in the models."""

from __future__ import annotations

from pathlib import Path

import torch

import lrcompress
from lrcompress.benchmark import throughput
from tests.conftest import invoke
from tests.tiny import tiny_model


def test_training_speed_leaves_the_models_as_they_were() -> None:
    models = {name: tiny_model(seed=seed) for seed, name in enumerate(("dense", "other"))}
    for model in models.values():
        model.requires_grad_(False)
        model.lm_head.weight.requires_grad_(True)
        model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    with torch.no_grad():
        metrics = throughput.training_throughput(models, 2, 16, 3)
    assert [metric.model for metric in metrics] == ["dense", "other"]
    for metric in metrics:
        assert metric.name == "training"
        assert metric.low is not None
        assert metric.high is not None
        assert 0 < metric.low <= metric.value <= metric.high
        assert metric.conditions["sequence_length"] == 16
        assert metric.conditions["batch_size"] == 2
        assert metric.conditions["runs"] == 3
    for model in models.values():
        trainable = [n for n, p in model.named_parameters() if p.requires_grad]
        assert trainable == ["lm_head.weight"]
        assert bool((model.lm_head.weight.grad == 1).all())
        assert all(p.grad is None for n, p in model.named_parameters() if n not in trainable)


def test_training_speed_of_low_rank_models(factorized: Path, dense: Path) -> None:
    quick = ("--no-speed", "--training-speed", "--repeats", 2, "--perplexity", "")
    result = invoke("eval", factorized, "--baseline", dense, *quick)
    assert result.exit_code == 0, result.output
    assert "training (tokens/s)" in result.stdout
    assert "prefill" not in result.stdout


def test_several_models_from_python(factorized: Path, dense: Path) -> None:
    small, tokenizer = lrcompress.load(factorized)
    others = [lrcompress.load(dense)[0] for _ in range(2)]
    metrics = lrcompress.evaluate(small, tokenizer, baseline=others, perplexity=[], speed=False)
    labels = list(dict.fromkeys(metric.model for metric in metrics))
    assert labels == ["dense baseline 1", "dense baseline 2", "factorized"]
