"""bench model: what is timed and counted, what is written, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

from lrcompress.benchmark.report import FILES
from tests.benchmark.conftest import bench_json
from tests.conftest import invoke
from tests.tiny import saved_model

SHORT = ("--prompt-length", 8, "--new-tokens", 2, "--training-length", 8, "--repeats", 3)


def test_a_model_is_timed_beside_its_dense_baseline(
    factorized: Path, dense: Path, tmp_path: Path
) -> None:
    out = tmp_path / "bench"
    content = bench_json("model", factorized, *SHORT, "--batch-size", "1,2", "--out", out)
    passes_timed = [
        (t["setting"]["pass"], t["setting"]["batch_size"]) for t in content["timings"][::2]
    ]
    passes = [(name, size) for size in (1, 2) for name in ("prefill", "decode")]
    assert passes_timed == [*passes, ("training", 1)]
    assert [t["name"] for t in content["timings"]] == ["dense", "factorized"] * 5
    assert content["settings"]["optimize"] is True
    for timing in content["timings"]:
        smaller = timing["name"] == "factorized"
        assert ("speedup" in timing) == smaller
        if smaller:
            assert timing["speedup"]["by_flops"] > 1
            assert timing["speedup"]["by_bytes"] > 1
    assert all((out / file).is_file() for file in FILES)
    assert json.loads((out / "bench.json").read_text("utf-8")) == content
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


def test_lengths_that_do_not_fit_are_refused(dense: Path) -> None:
    for flags in (("--prompt-length", 256), ("--training-length", 257)):
        result = invoke("bench", "model", dense, *flags)
        assert result.exit_code == 2
        assert "exceed the model's 256 positions" in result.output
