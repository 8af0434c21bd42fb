"""Logits that are not finite are refused with their cause, whoever runs the model."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

import lrcompress
from lrcompress.layers.nonfinite import check_weights_finite, checked_logits
from lrcompress.runtime.errors import InputError, NotFiniteError
from tests.evaluation.tasks.conftest import quality, write_yaml
from tests.tiny import byte_tokenizer, logits, tiny_model

WEIGHT = "model.layers.1.mlp.down_proj.weight"


def _overflowing() -> Any:
    """Finite weights whose products are not, from block 1 on."""
    model = tiny_model()
    with torch.no_grad():
        model.get_parameter(WEIGHT).fill_(3e38)
    return model


def _broken(value: float = math.nan) -> Any:
    model = tiny_model()
    with torch.no_grad():
        model.get_parameter(WEIGHT)[0, 0] = value
    return model


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_weight_is_named(value: float) -> None:
    check_weights_finite("dense", tiny_model())
    with pytest.raises(InputError, match=f"{WEIGHT} of the dense model is not finite"):
        check_weights_finite("dense", _broken(value))


def test_logits_are_checked_inside_and_only_there() -> None:
    model = _overflowing()
    expected = r"the dense model are not finite, because a value overflows .* model.layers.1.mlp"
    with pytest.raises(NotFiniteError, match=expected), checked_logits("dense", model):
        logits(model)
    assert not bool(logits(model).isfinite().all())
    assert not model._forward_hooks


def test_excluded_tokens_are_no_fault() -> None:
    model = tiny_model()
    excluded = torch.tensor([3])
    model.lm_head.register_forward_hook(lambda _, __, out: out.index_fill(-1, excluded, -math.inf))
    with checked_logits("dense", model):
        assert bool(logits(model)[..., 3].isneginf().all())


def test_a_model_that_is_not_finite_is_never_scored(tmp_path: Path) -> None:
    task = write_yaml(tmp_path)
    with pytest.raises(InputError, match=f"{WEIGHT} of the dense model is not finite"):
        quality(_broken(), task)
    with pytest.raises(NotFiniteError, match="because a value overflows"):
        quality(_overflowing(), task)


def test_written_answers_are_checked_too(tmp_path: Path) -> None:
    task = write_yaml(tmp_path)
    task.write_text(
        task.read_text()
        .replace("output_type: multiple_choice", "output_type: generate_until")
        .replace("[{metric: acc}, {metric: acc_norm}]", "[{metric: exact_match}]")
        .replace("doc_to_choice: choices", "generation_kwargs: {max_gen_toks: 4}")
    )
    with pytest.raises(NotFiniteError, match="because a value overflows"):
        quality(_overflowing(), task)


def test_a_baseline_is_checked_as_well() -> None:
    with pytest.raises(InputError, match=f"{WEIGHT} of the .*baseline model is not finite"):
        lrcompress.evaluate(
            tiny_model(), byte_tokenizer(), baseline=_broken(), perplexity=(), speed=False
        )
