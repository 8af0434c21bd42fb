"""Targets: forms that can be served there, budgets that hold, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import lrcompress
from lrcompress.checkpoint.export.gguf_families import FAMILIES as GGUF_FAMILIES
from lrcompress.methods.targets import TARGETS, Target
from tests.conftest import invoke
from tests.tiny import byte_tokenizer, logits, saved_model, tiny_model

WIDTH = 256
SETTINGS: dict[str, Any] = {"num_samples": 4, "seq_len": 48, "calibration": ["pydoc"]}


def factorized(model: Any, **settings: Any) -> lrcompress.Factorization:
    return lrcompress.factorize(model, byte_tokenizer(), **(SETTINGS | settings))


def widths(result: lrcompress.Factorization) -> list[int]:
    """The width of each FFN, in order."""
    return [linear.shape[1] for linear in result.linears if linear.spec.role == "down"]


@pytest.mark.parametrize("method", ["auto", "nystrom", "ppm"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("target", ["gguf", "stock"])
def test_budget_is_met_by_widths_alone(target: str, family: str, method: str) -> None:
    model = tiny_model(family, intermediate_size=WIDTH, num_hidden_layers=3)
    result = factorized(model, target=target, method=method, keep_ratio=0.7)
    assert {linear.form for linear in result.linears} <= {"narrowed", None}
    step = 32 if target == "gguf" else 8
    assert all(width % step == 0 for width in widths(result))
    is_free = target == "gguf" and family == "llama" and method != "ppm"
    # one FFN more or less: the step of a free plan; three at once: that of one width
    granularity = step / WIDTH / (3 if is_free else 1)
    assert 0.7 - granularity <= result.selected.keep_ratio <= 0.7
    if not is_free:
        assert len(set(widths(result))) == 1


def test_gguf_gives_blocks_widths_of_their_own_where_llama_cpp_has_them() -> None:
    model = tiny_model(intermediate_size=WIDTH)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(1e-3)
    found = widths(factorized(model, target="gguf", keep_ratio=0.7))
    assert found[0] > found[1]
    assert "narrowed FFNs alone, in steps of 32 channels" in " ".join(
        factorized(tiny_model(intermediate_size=WIDTH), target="gguf", keep_ratio=0.7).notes
    )


@pytest.mark.parametrize("budget", [
    {"target_params": 60_000}, {"target_size": "240KB"}, {"max_perplexity_increase": "50%"},
])  # fmt: skip
def test_other_budgets_hold_for_stock(budget: dict[str, Any]) -> None:
    model = tiny_model(intermediate_size=WIDTH)
    dense = sum(parameter.numel() for parameter in model.parameters())
    result = factorized(model, target="stock", **budget)
    assert len(set(widths(result))) == 1
    kept = sum(parameter.numel() for parameter in model.parameters())
    if "max_perplexity_increase" in budget:
        assert kept <= dense
        assert min(t["perplexity"] for t in result.trials) <= result.trials[0]["limit"]
    else:
        assert 0.95 * 60_000 < kept <= 60_000


@pytest.mark.parametrize(
    "family", ["llama", "qwen2", "qwen3", "gemma3_text", "phi3", "gpt2", "opt", "mixtral"]
)
def test_a_stock_model_is_smaller_and_equal_after_export(family: str, tmp_path: Path) -> None:
    source = saved_model(tmp_path / "dense", family)
    options = ["--num-samples", 4, "--seq-len", 48, "--calibration", "pydoc"]
    result = invoke(
        "factorize", source, "--for", "stock", "--keep-ratio", 0.7, *options,
        "--out", tmp_path / "small",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "made for stock: one width for all FFNs" in result.output
    record = json.loads((tmp_path / "small" / "lrcompress.json").read_text())
    assert record["recipe"]["factorize"]["target"] == "stock"
    exported = invoke("export", tmp_path / "small", "--to", "dense", "--out", tmp_path / "plain")
    assert exported.exit_code == 0, exported.output
    assert "notes" not in json.loads((tmp_path / "plain" / "lrcompress.json").read_text())
    plain, small = (lrcompress.load(tmp_path / name)[0] for name in ("plain", "small"))
    assert plain.num_parameters() == small.num_parameters() == record["counts"]["model"]["kept"]
    assert record["counts"]["ffn"]["keep_ratio"] <= 0.7
    torch.testing.assert_close(logits(plain), logits(small), rtol=0, atol=2e-5)


def test_an_export_that_grows_names_the_flag(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_model(intermediate_size=WIDTH)
    factorized(model, method="svd", keep_ratio=0.5)
    lrcompress.save(model, tmp_path / "low-rank", byte_tokenizer())
    exported = invoke("export", tmp_path / "low-rank", "--to", "dense", "--out", tmp_path / "plain")
    assert exported.exit_code == 0, exported.output
    (note,) = json.loads((tmp_path / "plain" / "lrcompress.json").read_text())["notes"]
    assert note in caplog.text
    assert "stock layers make 71,904 parameters of" in note
    assert "`lrcompress factorize --for stock`" in note


@pytest.mark.parametrize("settings", [
    {"target": "gguf", "method": "svd"}, {"target": "stock", "method": "fisher"},
    {"target": "gguf", "method": "whitened"},
])  # fmt: skip
def test_methods_that_only_truncate_are_refused(settings: dict[str, str]) -> None:
    method, target = settings["method"], settings["target"]
    sentence = f"{method} makes low-rank layers, which --for {target} leaves out: use auto, nystrom"
    with pytest.raises(lrcompress.InputError, match=sentence):
        factorized(tiny_model(), keep_ratio=0.7, **settings)


def test_a_rank_is_refused_without_low_rank() -> None:
    with pytest.raises(lrcompress.InputError, match="rank asks for low-rank layers, which --for"):
        factorized(tiny_model(), rank=8, target="gguf")


@pytest.mark.parametrize(("family", "settings", "sentence"), [
    ("llama", {"target": "stock", "dense_first": 1}, "one width: leave out --include"),
    ("qwen3", {"target": "gguf", "exclude": ["*.0.*"]}, "one width: leave out --include"),
    ("qwen2_moe", {"target": "stock"}, "have 24 and 40 channels: leave --for out"),
    ("helium", {"target": "gguf"}, "'helium' is not exported to GGUF"),
    ("mixtral", {"target": "gguf"}, "has mixtures of experts, which are not exported"),
    ("bloom", {"target": "stock"}, "a config that names the width of FFNs"),
    ("qwen3", {"target": "gguf", "rank_multiple": 96}, "in steps of 96 channels, .* have 88"),
    ("llama", {"target": "gguf", "exclude": ["*.up_proj"]}, "exclude any of them, or leave --for"),
    ("llama", {"target": "ollama"}, "'ollama' is unknown, choose from transformers, vllm"),
])  # fmt: skip
def test_what_the_model_does_not_allow_is_refused(
    family: str, settings: dict[str, Any], sentence: str
) -> None:
    model = tiny_model(family)
    before = logits(model)
    with pytest.raises(lrcompress.InputError, match=sentence):
        factorized(model, keep_ratio=0.7, **settings)
    assert torch.equal(logits(model), before)


def test_the_flag_is_named_as_it_is_typed() -> None:
    result = invoke("factorize", "model", "--for", "moon", "--keep-ratio", 0.8, "--out", "none")
    assert result.exit_code == 2
    assert "--for: 'moon' is unknown" in result.stderr


def test_vllm_offers_factors_that_cost_less_than_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    overhead, dense = 4000, 32 * WIDTH
    kept = {}
    for target in ("vllm", "transformers"):
        monkeypatch.setitem(TARGETS, "vllm", Target(overheads={"pivoted": overhead}))
        model = tiny_model(intermediate_size=WIDTH)
        result = factorized(model, method="fisher", keep_ratio=0.5, rank_multiple=1, target=target)
        kept[target] = [line.parameters for line in result.linears if line.form == "pivoted"]
        assert result.selected.keep_ratio == pytest.approx(0.5, abs=0.02)
        assert result.selected.keep_ratio <= 0.5
    assert max(kept["vllm"]) + overhead < dense <= max(kept["transformers"]) + overhead


def test_vllm_narrows_where_factors_do_not_pay() -> None:
    result = factorized(tiny_model(intermediate_size=WIDTH), target="vllm", keep_ratio=0.5)
    assert {linear.form for linear in result.linears} <= {"narrowed", None}
    assert "made for vllm: forms were weighed by what they cost there" in result.notes
    with pytest.raises(lrcompress.InputError, match=r"no form is faster than dense .* use a"):
        factorized(tiny_model(), target="vllm", method="fisher", keep_ratio=0.5)


def test_gguf_has_the_families_of_its_export() -> None:
    families = pytest.importorskip("lrcompress.checkpoint.export.gguf_families").FAMILIES
    with_own_widths = {name for name, family in families.items() if family.per_block_width}
    assert TARGETS["gguf"].own_widths == with_own_widths


@pytest.mark.parametrize("target", ["gguf", "vllm"])
def test_streaming_gives_the_shapes_of_memory(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TARGETS, "vllm", Target(overheads={"pivoted": 500}))
    source = saved_model(tmp_path / "dense", intermediate_size=WIDTH)
    options = [
        "--for", target, "--keep-ratio", 0.7, "--num-samples", 4, "--seq-len", 48,
        "--calibration", "pydoc",
    ]  # fmt: skip
    shapes = []
    for name, more in {"memory": [], "stream": ["--streaming"]}.items():
        result = invoke("factorize", source, *options, *more, "--out", tmp_path / name)
        assert result.exit_code == 0, result.output
        record = json.loads((tmp_path / name / "lrcompress.json").read_text())
        shapes.append([linear["shape"] for linear in record["linears"]])
    assert shapes[0] == shapes[1]


def test_gguf_leaves_widths_of_their_own_to_the_families_that_can_be_exported_so() -> None:
    exported = {name for name, family in GGUF_FAMILIES.items() if family.per_block_width}
    assert TARGETS["gguf"].own_widths == exported
