"""The bench commands: what is timed and counted, what is written, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lrcompress.benchmark import ffn
from lrcompress.benchmark.report import FILES
from lrcompress.benchmark.timer import Cost, Timing, in_turn, seconds, speedups
from lrcompress.config import FFNBenchSettings
from lrcompress.runtime import memory
from tests.conftest import invoke
from tests.tiny import saved_model

QUICK = ("--repeats", 3, "--width", 64, "--ffn-width", 128, "--keep-ratio", 0.5)
SHORT = ("--prompt-length", 8, "--new-tokens", 2, "--training-length", 8, "--repeats", 3)
CPU = torch.device("cpu")


def bench_json(*arguments: object) -> dict[str, Any]:
    result = invoke("bench", *arguments, "--json")
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_ffn_times_every_form_beside_dense() -> None:
    asked = ("ffn", *QUICK, "--tokens", "1,20", "--dtype", "float32", "--backward")
    found = bench_json(*asked, "--path", "plain,optimized")
    settings = {json.dumps(timing["setting"]) for timing in found["timings"]}
    assert len(settings) == 4  # two numbers of tokens, forward and both passes
    names = ["dense", "factored 0.5, plain", "pivoted 0.5, plain", "narrowed 0.5"]
    names += ["factored 0.5", "pivoted 0.5"]
    assert [timing["name"] for timing in found["timings"]] == names * 4
    for timing in found["timings"]:
        assert len(timing["seconds"]) == 3
        assert all(second > 0 for second in timing["seconds"])
        assert ("speedup" in timing) == (timing["name"] != "dense")


def test_ffn_counts_operations_and_bytes_exactly() -> None:
    asked = ("ffn", *QUICK, "--tokens", 20, "--dtype", "bfloat16", "--backward")
    by_name = {
        (t["name"], t["setting"]["pass"]): t for t in bench_json(*asked, "--no-gated")["timings"]
    }
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


def test_speedups_are_over_the_baseline_of_the_same_repeat() -> None:
    about: dict[str, object] = {"parameters": 1}
    dense = Timing({"pass": "a"}, "dense", "dense", (4.0, 8.0, 6.0), Cost(30, 80), 1, about)
    small = Timing({"pass": "a"}, "small", "dense", (2.0, 2.0, 2.0), Cost(10, 20), 1, about)
    many = Timing({"pass": "b"}, "small", "dense", (1.0,), Cost(10, 20), 17, about)
    other = Timing({"pass": "b"}, "dense", "dense", (3.0,), Cost(30, 80), 17, about)
    few, more = speedups([dense, small, other, many])
    assert (few.low, few.ratio, few.high) == (2, 3, 4)
    assert (few.by_flops, few.by_bytes) == (3, 4)
    assert (few.ideal, few.share) == (4, 0.75)  # one token: reading the weights
    assert (more.ideal, more.share) == (3, 1)


def test_turns_alternate_after_a_run_that_does_not_count() -> None:
    order: list[str] = []

    def run(name: str) -> int:
        order.append(name)
        return len(order)

    found = in_turn({"a": "a", "b": "b"}, 2, run, lambda items, *_: items, "")
    assert order == ["b", "a", "a", "b", "b", "a"]
    assert found == {"a": [3, 6], "b": [4, 5]}


def test_seconds_are_of_one_call() -> None:
    calls: list[int] = []
    assert 0 < seconds(lambda: calls.append(1), CPU, 50) < 1e-2
    assert len(calls) == 50


def test_weights_are_the_same_in_every_run() -> None:
    settings = FFNBenchSettings(width=64, ffn_width=128, keep_ratios=(0.5,), forms=("pivoted",))
    what = ffn.Alternative("pivoted", 0.5, "plain")
    first, again = (ffn.make(what, settings, CPU, "float32") for _ in range(2))
    optimized = ffn.Alternative("pivoted", 0.5, "optimized")
    fast = ffn.make(optimized, settings, CPU, "float32")
    x = torch.randn(20, 64)
    with torch.no_grad():
        assert torch.equal(first(x), again(x))
        torch.testing.assert_close(fast(x), first(x))


def test_preset_gives_way_to_what_is_given_beside_it() -> None:
    paper = FFNBenchSettings.model_validate({"preset": "paper"})
    assert (paper.width, paper.channels, paper.tokens) == (5120, 20480, (30_000,))
    smaller = FFNBenchSettings.model_validate({"preset": "paper", "tokens": "64"})
    assert (smaller.width, smaller.tokens) == (5120, (64,))


def test_model_beside_the_one_it_was_made_of(factorized: Path, dense: Path, tmp_path: Path) -> None:
    out = tmp_path / "bench"
    found = bench_json("model", factorized, *SHORT, "--batch-size", "1,2", "--out", out)
    kinds = [(t["setting"]["pass"], t["setting"]["batch_size"]) for t in found["timings"][::2]]
    passes = [(name, size) for size in (1, 2) for name in ("prefill", "decode")]
    assert kinds == [*passes, ("training", 1)]
    assert [t["name"] for t in found["timings"]] == ["dense", "factorized"] * 5
    assert found["settings"]["optimize"] is True
    for timing in found["timings"]:
        smaller = timing["name"] == "factorized"
        assert ("speedup" in timing) == smaller
        if smaller:
            assert timing["speedup"]["by_flops"] > 1
            assert timing["speedup"]["by_bytes"] > 1
    assert all((out / file).is_file() for file in FILES)
    assert json.loads((out / "bench.json").read_text("utf-8")) == found
    assert "| decode, batch size 2," in (out / "bench.md").read_text("utf-8")
    plot = (out / FILES[-1]).read_text("utf-8")
    assert "prefill, batch size 2, prompt length 8, float32, factorized: " in plot


def test_operations_of_a_model_are_those_of_its_products(tmp_path: Path) -> None:
    """One prompt of 8 tokens through linears of known shapes, and the attention of the CPU."""
    model = saved_model(tmp_path / "model")
    timings = bench_json("model", model, *SHORT, "--batch-size", 1, "--no-training")["timings"]
    attention = 32 * 32 + 2 * 32 * 16 + 32 * 32  # query, key and value of 2 of 4 heads, output
    ffn, head = 3 * 32 * 88, 32 * 257
    products = 2 * 8 * (2 * (attention + ffn)) + 2 * head  # logits of the last token alone
    scores = 2 * 2 * (2 * 4 * 8 * 8 * 8)  # two blocks, with keys and with values, four heads
    assert timings[0]["cost"]["flops"] == products + scores


def test_table_and_files(tmp_path: Path) -> None:
    out = tmp_path / "bench"
    asked = ("ffn", *QUICK, "--tokens", 1, "--dtype", "float32", "--form", "narrowed")
    result = invoke("bench", *asked, "--out", out)
    assert result.exit_code == 0, result.output
    assert "of ideal" in result.stdout
    assert "narrowed 0.5" in result.stdout
    assert "peak" not in result.stdout
    again = invoke("bench", *asked, "--out", out)
    assert again.exit_code == 2
    assert "exists" in again.output


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


def test_lengths_that_do_not_fit_are_refused(dense: Path) -> None:
    for flags in (("--prompt-length", 256), ("--training-length", 257)):
        result = invoke("bench", "model", dense, *flags)
        assert result.exit_code == 2
        assert "exceed the model's 256 positions" in result.output


def test_memory_rises_from_its_start() -> None:
    with memory.peak_memory() as found:
        held = torch.ones(8 * 2**20)  # 32 MiB
    assert found.rise is None or found.rise > 2**24
    assert held.numel() == 8 * 2**20
