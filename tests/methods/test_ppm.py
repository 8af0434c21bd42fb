"""Pruning by peak-to-peak magnitude and activations: which channels stay, and that they stay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import lrcompress
from lrcompress.layers.ffn_layouts import find_ffns
from lrcompress.layers.lowrank import compressed_layers, dense_weight
from lrcompress.layers.moe import unpacked
from lrcompress.methods.ppm import PPM, importance
from lrcompress.methods.types import FFN, LinearSpec, Role, Statistics
from tests.conftest import SMALL, invoke, refusal
from tests.tiny import byte_tokenizer, logits, saved_model, tiny_model

GATE = torch.tensor([[3.0, 1.0], [-1.0, -2.0], [1.0, -1.0]])  # max + |min|: 4, 1, 2
UP = torch.tensor([[1.0, 0.0], [5.0, -3.0], [0.0, -4.0]])  # 1, 8, 4
DOWN = torch.tensor([[2.0, 1.0, -1.0], [-2.0, 0.0, -1.0]])  # 4, 1, 0
# root mean squares 1, 2, 4
MOMENT = torch.tensor([[1.0, 0.5, -3.0], [0.5, 4.0, 6.0], [-3.0, 6.0, 16.0]])
SETTINGS: dict[str, Any] = {"num_samples": 4, "seq_len": 48, "keep_ratio": 0.6, "method": "ppm"}


def ffn_of(weights: dict[Role, Tensor], moment: Tensor = MOMENT) -> FFN:
    """An FFN of these weights without biases; `moment` is the second moment of down's input."""
    specs = tuple(
        LinearSpec(role, 0, role, weight.shape[1], weight.shape[0], False, role, "ffn")
        for role, weight in weights.items()
    )
    named = {str(role): weight for role, weight in weights.items()}
    statistics = dict.fromkeys(named, Statistics()) | {"down": Statistics(moment)}
    return FFN("ffn", specs, named, dict.fromkeys(named, None), statistics, whole=True)


@pytest.mark.parametrize("fused", [False, True])
def test_importance_by_hand(fused: bool) -> None:
    gate_and_up: dict[Role, Tensor] = {"gate": GATE, "up": UP}
    if fused:
        gate_and_up = {"gate_up": torch.cat([GATE, UP])}
    ffn = ffn_of({**gate_and_up, "down": DOWN})
    # (4, 1, 2) / 4 + (1, 8, 4) / 8 + (4, 1, 0) / 4, times (1, 2, 4)
    assert importance(ffn).tolist() == [2.125, 3.0, 4.0]
    order = PPM().order(ffn)
    assert order.channels.tolist() == [2, 1, 0]
    assert order.errors.shape == (4,)
    assert bool(order.errors.isnan().all())


def test_without_a_gate_up_and_down_alone_count() -> None:
    ffn = ffn_of({"up": UP, "down": DOWN})
    assert importance(ffn).tolist() == [1.125, 2.5, 2.0]
    assert PPM().order(ffn).channels.tolist() == [1, 2, 0]


def test_silent_channels_come_last_and_nothing_is_divided_by_zero() -> None:
    silent = MOMENT.clone()
    silent[2], silent[:, 2] = 0, 0
    assert PPM().order(ffn_of({"up": UP, "down": DOWN}, silent)).channels.tolist() == [1, 0, 2]
    ffn = ffn_of({"up": torch.zeros(3, 2), "down": torch.zeros(2, 3)})
    assert importance(ffn).tolist() == [0, 0, 0]
    assert PPM().order(ffn).channels.tolist() == [0, 1, 2]


def test_channels_of_bfloat16_stay_bit_for_bit() -> None:
    dense: dict[Role, Tensor] = {
        "gate": GATE.bfloat16() / 3,
        "up": UP.bfloat16() / 3,
        "down": DOWN.bfloat16() / 3,
    }
    narrowed = PPM().narrow(ffn_of(dense), torch.tensor([2, 0])).weights
    assert torch.equal(narrowed["gate"], dense["gate"][[2, 0]])
    assert torch.equal(narrowed["up"], dense["up"][[2, 0]])
    assert torch.equal(narrowed["down"], dense["down"][:, [2, 0]])


def lines_of(matrix: Tensor) -> set[tuple[float, ...]]:
    return {tuple(row) for row in matrix.tolist()}


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "mixtral"])
def test_a_saved_model_has_rows_and_columns_of_the_dense_one(family: str, tmp_path: Path) -> None:
    """The saved weights, with biases in gpt2, fused in phi3 and of experts in mixtral."""
    model, dense = tiny_model(family), tiny_model(family)
    result = lrcompress.factorize(model, byte_tokenizer(), rank_multiple=8, **SETTINGS)
    assert {linear.form for linear in result.linears} == {"narrowed"}
    assert result.ffn.keep_ratio == pytest.approx(0.6, abs=0.05)
    lrcompress.save(model, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(loaded), logits(model))
    with unpacked(dense):
        for spec in find_ffns(dense).linears:
            before, after = dense.get_submodule(spec.name), loaded.get_submodule(spec.name)
            weights = [dense_weight(before), after.weight]
            if spec.role == "down":
                weights = [weight.T for weight in weights]
            assert len(weights[1]) < len(weights[0])
            assert lines_of(weights[1]) < lines_of(weights[0])
            if before.bias is not None:
                assert set(after.bias.tolist()) <= set(before.bias.tolist())


def test_channels_that_stay_belong_together() -> None:
    """Row i of gate and up and column i of down are of one channel of the dense FFN."""
    model, dense = tiny_model(), tiny_model()
    lrcompress.factorize(model, byte_tokenizer(), **SETTINGS)
    for narrow, full in zip(model.model.layers, dense.model.layers, strict=True):
        gate, up, down = (
            (narrow.mlp.gate_proj.weight, full.mlp.gate_proj.weight),
            (narrow.mlp.up_proj.weight, full.mlp.up_proj.weight),
            (narrow.mlp.down_proj.weight.T, full.mlp.down_proj.weight.T),
        )
        channels = [
            [int((dense_rows == row).all(1).nonzero()) for row in rows]
            for rows, dense_rows in (gate, up, down)
        ]
        assert channels[0] == channels[1] == channels[2]
        assert len(set(channels[0])) == len(channels[0]) < len(full.mlp.gate_proj.weight)


@pytest.mark.parametrize("streaming", [False, True])
def test_from_the_command_line_to_stock_layers(streaming: bool, tmp_path: Path) -> None:
    dense, out, stock = saved_model(tmp_path / "dense"), tmp_path / "out", tmp_path / "stock"
    flags = ("--calibration", "pydoc", *(["--streaming"] if streaming else []))
    budget = ("--keep-ratio", "0.8", "--method", "ppm")
    result = invoke("factorize", dense, *budget, "--out", out, *SMALL, *flags)
    assert result.exit_code == 0, result.output
    assert invoke("verify", out).exit_code == 0
    exported = invoke("export", out, "--to", "dense", "--out", stock)
    assert exported.exit_code == 0, exported.output
    model = AutoModelForCausalLM.from_pretrained(stock)
    assert not any(compressed_layers(model))
    assert model.config.intermediate_size == 72  # 0.8 of 88, to a multiple of 8
    expected = logits(AutoModelForCausalLM.from_pretrained(out))
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (
            ("--keep-ratio", "0.8", "--ranks", "loss_aware"),
            "loss_aware does not go with ppm, which estimates no loss: use uniform",
        ),
        (("--rank", "8"), "rank does not go with ppm and uniform: use keep_ratio"),
    ],
)
def test_what_it_cannot_do_is_refused(
    dense: Path, tmp_path: Path, flags: tuple[str, ...], sentence: str
) -> None:
    out = tmp_path / "out"
    assert sentence in refusal("factorize", dense, "--out", out, "--method", "ppm", *flags)
    assert not out.exists()
