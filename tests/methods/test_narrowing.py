"""Channels are cut out of weights, biases and statistics, and what stays is unchanged."""

from __future__ import annotations

import pytest
import torch

from lrcompress.methods.narrowing import down_of, keep_channels
from lrcompress.methods.types import FFN, LinearSpec, Role, Statistics

HIDDEN, WIDTH = 3, 5
CHANNELS = torch.tensor([4, 0, 2])


def ffn_of(*roles: Role, bias: bool = True) -> FFN:
    """A random bfloat16 FFN of 5 channels with the linears of `roles`, and all its statistics."""
    shapes = {"gate_up": (2 * WIDTH, HIDDEN), "down": (HIDDEN, WIDTH)}
    draw = torch.Generator().manual_seed(0)
    specs: list[LinearSpec] = []
    weights: dict[str, torch.Tensor] = {}
    biases: dict[str, torch.Tensor | None] = {}
    statistics: dict[str, Statistics] = {}
    for role in roles:
        out, into = shapes.get(role, (WIDTH, HIDDEN))
        group = "h" if role == "down" else "x"
        specs.append(LinearSpec(role, 0, role, into, out, bias, group, "ffn"))
        weights[role] = torch.randn(out, into, generator=draw).bfloat16()
        biases[role] = torch.randn(out, generator=draw).bfloat16() if bias else None
        statistics[role] = Statistics(
            torch.randn(into, into, generator=draw), torch.randn(out, out, generator=draw)
        )
    return FFN("ffn", tuple(specs), weights, biases, statistics, whole=True)


@pytest.mark.parametrize("roles", [("gate", "up", "down"), ("up", "down")])
def test_rows_of_gate_and_up_and_columns_of_down_stay(roles: tuple[Role, ...]) -> None:
    ffn = ffn_of(*roles)
    narrowed = keep_channels(ffn, CHANNELS)
    for role in roles[:-1]:
        assert torch.equal(narrowed.weights[role], ffn.weights[role][[4, 0, 2]])
        bias, dense_bias = narrowed.biases[role], ffn.biases[role]
        assert bias is not None
        assert dense_bias is not None
        assert torch.equal(bias, dense_bias[[4, 0, 2]])
    assert torch.equal(narrowed.weights["down"], ffn.weights["down"][:, [4, 0, 2]])
    assert narrowed.biases["down"] is ffn.biases["down"]
    assert {weight.dtype for weight in narrowed.weights.values()} == {torch.bfloat16}
    shapes = [(spec.out_features, spec.in_features) for spec in narrowed.linears]
    assert shapes == [tuple(narrowed.weights[role].shape) for role in roles]


def test_a_fused_gate_up_loses_rows_in_both_halves() -> None:
    ffn = ffn_of("gate_up", "down")
    narrowed = keep_channels(ffn, CHANNELS)
    rows = [4, 0, 2, 9, 5, 7]
    assert torch.equal(narrowed.weights["gate_up"], ffn.weights["gate_up"][rows])
    bias, dense_bias = narrowed.biases["gate_up"], ffn.biases["gate_up"]
    assert bias is not None
    assert dense_bias is not None
    assert torch.equal(bias, dense_bias[rows])
    assert narrowed.linears[0].out_features == 6


def test_statistics_are_those_of_what_is_left() -> None:
    ffn = ffn_of("up", "down", bias=False)
    narrowed = keep_channels(ffn, CHANNELS)
    assert narrowed.biases == {"up": None, "down": None}
    for role, attribute in (("up", "gradient_moment"), ("down", "second_moment")):
        moment = getattr(ffn.statistics[role], attribute)
        expected = torch.stack([moment[i, [4, 0, 2]] for i in (4, 0, 2)])
        assert torch.equal(getattr(narrowed.statistics[role], attribute), expected)
    for role, attribute in (("up", "second_moment"), ("down", "gradient_moment")):
        moment = getattr(ffn.statistics[role], attribute)
        assert getattr(narrowed.statistics[role], attribute) is moment


def test_the_dense_ffn_is_left_as_it_was_and_unmeasured_moments_stay_absent() -> None:
    ffn = ffn_of("up", "down")
    unmeasured = FFN(
        "ffn", ffn.linears, ffn.weights, ffn.biases, dict.fromkeys(ffn.weights, Statistics()), True
    )
    narrowed = keep_channels(unmeasured, CHANNELS)
    assert set(narrowed.statistics.values()) == {Statistics()}
    assert ffn.weights["up"].shape == (WIDTH, HIDDEN)


def test_down_comes_with_its_statistics() -> None:
    ffn = ffn_of("up", "down")
    down, statistics = down_of(ffn)
    assert down.name == "down"
    assert statistics is ffn.statistics["down"]
