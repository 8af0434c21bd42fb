"""bench ffn: what is timed and counted, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch

from lrcompress.benchmark import ffn
from lrcompress.config import FFNBenchSettings
from tests.benchmark.conftest import QUICK, bench_json
from tests.conftest import invoke

CPU = torch.device("cpu")


def test_ffn_times_every_form_beside_dense() -> None:
    flags = ("--tokens", "1,20", "--dtype", "float32", "--backward", "--path", "plain,optimized")
    timings = bench_json("ffn", *QUICK, *flags)["timings"]
    settings = {json.dumps(timing["setting"]) for timing in timings}
    assert len(settings) == 4  # two numbers of tokens, forward and both passes
    names = ["dense", "factored 0.5, plain", "pivoted 0.5, plain", "narrowed 0.5"]
    names += ["factored 0.5", "pivoted 0.5"]
    assert [timing["name"] for timing in timings] == names * 4
    for timing in timings:
        assert len(timing["seconds"]) == 3
        assert all(second > 0 for second in timing["seconds"])
        assert ("speedup" in timing) == (timing["name"] != "dense")


def test_ffn_counts_operations_and_bytes_exactly() -> None:
    flags = ("--tokens", 20, "--dtype", "bfloat16", "--backward", "--no-gated")
    timings = bench_json("ffn", *QUICK, *flags)["timings"]
    by_name = {(timing["name"], timing["setting"]["pass"]): timing for timing in timings}
    dense = by_name["dense", "forward"]
    assert dense["cost"] == {"flops": 2 * 20 * 2 * 64 * 128, "weight_bytes": 2 * 2 * 64 * 128}
    both = by_name["dense", "forward and backward"]
    assert both["cost"]["flops"] == 3 * dense["cost"]["flops"]
    pivoted = by_name["pivoted 0.5", "forward"]
    numbers = 2 * 32 * (64 + 128 - 32)  # of 16, 32 and 48 the rank nearest to half of 64 x 128
    assert pivoted["about"]["parameters"] == numbers
    assert pivoted["cost"] == {
        "flops": 2 * 20 * numbers,
        "weight_bytes": 2 * numbers + 4 * (64 + 128),
    }
    assert pivoted["speedup"]["ideal"] == pytest.approx(2 * 64 * 128 / numbers)
    narrowed = by_name["narrowed 0.5", "forward"]["about"]
    assert narrowed["parameters"] == 2 * 64 * 64


def test_weights_are_the_same_in_every_run() -> None:
    settings = FFNBenchSettings(width=64, ffn_width=128, keep_ratios=(0.5,), forms=("pivoted",))
    plain = ffn.Alternative("pivoted", 0.5, "plain")
    first, again = (ffn.build_ffn(plain, settings, CPU, "float32") for _ in range(2))
    optimized = ffn.Alternative("pivoted", 0.5, "optimized")
    fast = ffn.build_ffn(optimized, settings, CPU, "float32")
    x = torch.randn(20, 64)
    with torch.no_grad():
        assert torch.equal(first(x), again(x))
        torch.testing.assert_close(fast(x), first(x))


def test_other_settings_override_those_of_a_preset() -> None:
    paper = FFNBenchSettings.model_validate({"preset": "paper"})
    assert (paper.width, paper.channels, paper.tokens) == (5120, 20480, (30_000,))
    smaller = FFNBenchSettings.model_validate({"preset": "paper", "tokens": "64"})
    assert (smaller.width, smaller.tokens) == (5120, (64,))


REFUSED = {
    "--width: input should be greater than or equal to 32, not '8'": ("--width", 8),
    "--dtype: 'int3' is unknown": ("--dtype", "int3"),
    "--form: 'round' is unknown": ("--form", "round"),
    "--path: 'fast' is unknown": ("--path", "fast"),
    "--keep-ratio: input should be less than or equal to 1": ("--keep-ratio", "2"),
    "--tokens: input should be a valid integer": ("--tokens", "many"),
    "--tokens: give at least one": ("--tokens", ","),
    "--preset: input should be 'paper'": ("--preset", "book"),
    "no factored rank that is a multiple of 16": ("--width", 32, "--ffn-width", 32),
    "--repeats: input should be greater than or equal to 3": ("--repeats", 1),
    "device 'xpu:9' is not available here": ("--device", "xpu:9"),
}


@pytest.mark.parametrize("message", REFUSED)
def test_bad_values_are_refused_in_one_sentence(message: str) -> None:
    result = invoke("bench", "ffn", *REFUSED[message])
    assert result.exit_code == 2
    assert message in result.output
