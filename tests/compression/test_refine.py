"""Refinement: closer to the dense blocks on text it did not train on, resumable, safe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import lrcompress
from lrcompress.compression import factorize, refine
from lrcompress.compression.planning import prepare
from lrcompress.compression.result import Factorization
from lrcompress.config import CalibrationSettings, FactorizeSettings, RefineSettings
from lrcompress.layers.lowrank import compressed_layers
from lrcompress.methods.linalg import to_float64
from lrcompress.runtime.errors import InputError
from lrcompress.runtime.progress import silent
from tests.tiny import byte_tokenizer, logits, tiny_model

TEXT: dict[str, Any] = {"data": ["pydoc"], "num_samples": 16, "seq_len": 64}
LONG: dict[str, Any] = {"data": ["pydoc"], "num_samples": 64, "seq_len": 128}
FAMILIES = ["llama", "phi3", "gpt2", "openai-gpt", "opt", "gemma2", "falcon", "gpt_neox", "mpt"]


def refined(
    model: Any, work: Path | None = None, text: dict[str, Any] = TEXT, **settings: Any
) -> Factorization:
    return factorize.factorize_model(
        model,
        byte_tokenizer(),
        CalibrationSettings(**text),
        FactorizeSettings(keep_ratio=0.6, rank_multiple=2, **settings),
        RefineSettings(enabled=True, epochs=3),
        work=work,
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["auto", "whitened"])
def test_no_block_gets_worse_on_held_out_samples(family: str, method: str) -> None:
    model = tiny_model(family)
    result = refined(model, method=method)
    assert result.refined
    assert all(block.after <= block.before for block in result.refined)
    assert result.calibration is not None
    assert result.to_dict()["refined"][0]["steps"] == 3 * 14


@pytest.mark.parametrize("method", ["auto", "whitened", "nystrom"])
def test_blocks_get_better_on_held_out_samples(method: str) -> None:
    result = refined(tiny_model(), text=LONG, method=method)
    assert sum(b.after for b in result.refined) < 0.98 * sum(b.before for b in result.refined)
    assert result.refined[0].estimates_loss == (method != "whitened")


def test_the_loss_is_weighed_by_shrunk_gradients_and_by_size() -> None:
    model = tiny_model()
    calibration = CalibrationSettings(**TEXT)
    settings = FactorizeSettings(keep_ratio=0.6, rank_multiple=2)
    compressor = factorize.Compressor(
        model, byte_tokenizer(), calibration, settings, RefineSettings(), silent, None
    )
    session = compressor.calibration()
    prepared = prepare(model, session.linears, settings, None, session, silent)
    down = next(spec for spec in session.linears if spec.role == "down")
    assert prepared.moments is not None
    moment = prepared.moments.gradient_moment(down)
    assert moment is not None
    gradient = to_float64(moment)
    held_out = session.tokens[:2]
    target = hidden_after_block_0(model, held_out)
    factorize.factorize_model(model, byte_tokenizer(), calibration, settings, RefineSettings())
    error = hidden_after_block_0(model, held_out) - target
    g = 0.4 * gradient + 0.6 * gradient.diagonal().diag()
    g += 1e-2 * gradient.diagonal().mean() * torch.eye(len(g))
    size = target.square().sum(-1)
    median = size.median(-1, keepdim=True).values
    expected = ((error @ g * error).sum(-1) * (median / size).clamp_max(1)).mean()
    assert refined(tiny_model()).refined[0].before == pytest.approx(float(expected), rel=1e-4)


@torch.no_grad()
def hidden_after_block_0(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    return to_float64(model.eval()(input_ids=tokens, output_hidden_states=True).hidden_states[1])


def test_closer_to_the_dense_model() -> None:
    errors = []
    expected = logits(tiny_model())
    for enabled in (False, True):
        model = tiny_model()
        settings = {"refine": enabled, "calibration": "pydoc", "num_samples": 64, "seq_len": 128}
        lrcompress.factorize(
            model,
            byte_tokenizer(),
            keep_ratio=0.6,
            rank_multiple=2,
            **settings,  # type: ignore[arg-type]
        )
        errors.append(float((logits(model) - expected).norm()))
    assert errors[1] < errors[0]


def test_bfloat16_trains_in_float32_and_leaves_the_rest_bit_for_bit() -> None:
    model, untouched = tiny_model().bfloat16(), tiny_model().bfloat16()
    result = refined(model, text=LONG)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert sum(b.after for b in result.refined) < sum(b.before for b in result.refined)
    parameters = dict(model.named_parameters())
    for name, parameter in untouched.named_parameters():
        if ".mlp." not in name:
            assert torch.equal(parameters[name], parameter), name


def test_training_flags_stay_as_they_were() -> None:
    model = tiny_model().requires_grad_(False)
    refined(model)
    assert not any(p.requires_grad for p in model.parameters())
    assert all(p.grad is None for p in model.parameters())


def test_an_interrupted_run_ends_like_an_undisturbed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed, model = tiny_model(), tiny_model()
    before = logits(model)
    refined(undisturbed)
    original, trained = refine.Refinement._train, []

    def breaks(self: Any, error: Any, parameters: Any) -> Any:
        trained.append(error.index)
        if len(trained) == 2:
            raise KeyboardInterrupt
        return original(self, error, parameters)

    monkeypatch.setattr(refine.Refinement, "_train", breaks)
    with pytest.raises(KeyboardInterrupt):
        refined(model, tmp_path)
    assert not any(compressed_layers(model))
    assert torch.equal(logits(model), before)
    refined(model, tmp_path)
    assert len(trained) == len(set(trained)) + 1  # the first block was not trained again
    assert torch.equal(logits(model), logits(undisturbed))


def test_work_of_other_settings_is_not_used(tmp_path: Path) -> None:
    refined(tiny_model(), tmp_path)
    other = tiny_model()
    refined(other, tmp_path, method="svd")
    alone = tiny_model()
    refined(alone, method="svd")
    assert torch.equal(logits(other), logits(alone))


def test_one_sample_is_refused() -> None:
    with pytest.raises(InputError, match="give more text"):
        lrcompress.factorize(
            tiny_model(), byte_tokenizer(), keep_ratio=0.6, refine=True, num_samples=1, seq_len=64
        )
