"""int8 weights: small, close to the original, loaded as saved, and refused by other commands."""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

import lrcompress
from lrcompress.layers.lowrank import PivotedLinear
from lrcompress.layers.model_info import is_quantized, weight_bytes
from lrcompress.models.torchao import quantize
from tests.conftest import SMALL, invoke, refusal, small_recipe
from tests.tiny import broken_copy, logits, tiny_model


@pytest.fixture(scope="module")
def low_rank(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("low-rank") / "model"
    flags = ("--method", "svd", "--form", "pivoted", "--keep-ratio", "0.6")
    result = invoke("factorize", dense, "--out", out, *flags)
    assert result.exit_code == 0, result.output
    return out


@pytest.fixture(scope="module")
def quantized(low_rank: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("quantized") / "model"
    result = invoke("quantize", low_rank, "--out", out)
    assert result.exit_code == 0, result.output
    assert "int8 weights" in result.output
    return out


def test_a_factorized_model_loads_as_it_was_quantized(low_rank: Path, quantized: Path) -> None:
    model, _ = lrcompress.load(low_rank)
    before = logits(model)
    names = quantize(model, "int8")
    assert {"down_proj.C", "down_proj.Z"} <= {".".join(n.split(".")[-2:]) for n in names}
    loaded, _ = lrcompress.load(quantized)
    assert is_quantized(loaded)
    assert torch.equal(logits(loaded), logits(model))
    error = (logits(model) - before).norm() / before.norm()
    assert 0 < error < 0.05  # each weight is rounded to 1/127 of its row's largest


def test_transformers_alone_loads_it(quantized: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(quantized)
    assert isinstance(model.model.layers[0].mlp.down_proj, PivotedLinear)
    assert torch.equal(logits(model), logits(lrcompress.load(quantized)[0]))


def test_stored_weights_are_small(low_rank: Path, quantized: Path) -> None:
    """One byte for each weight, five for each row's scale and zero point; the rest is unchanged."""
    model, _ = lrcompress.load(quantized)
    original, _ = lrcompress.load(low_rank)
    head = original.get_output_embeddings()
    linears = [m for m in original.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    weights = sum(m.weight.numel() for m in linears)
    scales = sum(m.out_features for m in linears)
    assert weight_bytes(model) == weight_bytes(original) - 4 * weights + weights + 5 * scales
    record = json.loads((quantized / "lrcompress.json").read_text("utf-8"))
    before = json.loads((low_rank / "lrcompress.json").read_text("utf-8"))
    assert record["saved"]["parameters"] == before["saved"]["parameters"]
    assert record["saved"]["bytes"] < before["saved"]["bytes"]
    assert record["quantized"]["bytes"] == weight_bytes(model)
    assert record["counts"] == before["counts"]
    with safe_open(quantized / "model.safetensors", "pt") as tensors:
        stored = [key for key in tensors.keys() if "qdata" in key]  # noqa: SIM118
        kinds = {str(tensors.get_slice(key).get_dtype()) for key in stored}
    assert kinds == {"I8"}
    assert "int8" in (quantized / "README.md").read_text("utf-8")


def test_a_dense_model_becomes_a_stock_checkpoint(dense: Path, tmp_path: Path) -> None:
    result = invoke("quantize", dense, "--out", tmp_path / "out", "--weights", "int8")
    assert result.exit_code == 0, result.output
    config = json.loads((tmp_path / "out" / "config.json").read_text("utf-8"))
    assert config["quantization_config"]["quant_method"] == "torchao"
    model, _ = lrcompress.load(tmp_path / "out")
    original, _ = lrcompress.load(dense)
    assert (logits(model) - logits(original)).norm() < 0.05 * logits(original).norm()
    card = (tmp_path / "out" / "README.md").read_text("utf-8")
    assert "# Dense" in card
    assert "low-rank" not in card


@pytest.mark.parametrize("family", ["gpt2", "phi3", "opt"])
def test_other_families(family: str, tmp_path: Path) -> None:
    """gpt2 has no torch linears until it is factorized."""
    model = tiny_model(family)
    if family == "gpt2":
        with pytest.raises(lrcompress.InputError, match="nothing to quantize: 'gpt2'"):
            quantize(model, "int8")
    lrcompress.factorize(model, None, method="svd", keep_ratio=0.6)
    quantize(model, "int8")
    lrcompress.save(model, tmp_path / "out")
    loaded, _ = lrcompress.load(tmp_path / "out")
    assert torch.equal(logits(loaded), logits(model))


def test_eval_and_sweep_show_quantized_models(
    dense: Path, low_rank: Path, quantized: Path, text: Path, tmp_path: Path
) -> None:
    flags = ("--perplexity", text, "--context-length", 64, "--limit", 2, "--no-speed", "--json")
    result = invoke("eval", quantized, "--baseline", low_rank, *flags)
    assert result.exit_code == 0, result.output
    metrics = json.loads(result.stdout)["metrics"]
    sizes = {m["model"]: m["value"] for m in metrics if m["name"] == "weight bytes"}
    assert sizes["quantized factorized"] < sizes["factorized"]
    more = "sweep: {keep_ratios: [0.6], methods: [svd], quantize: int8}\n"
    recipe = small_recipe(tmp_path / "recipe.yaml", dense, text, more)
    result = invoke("sweep", recipe, tmp_path / "out", "--json")
    assert result.exit_code == 0, result.output
    points = {p["variant"]: p for p in json.loads(result.stdout)["points"]}
    assert list(points) == ["dense", "dense int8", "svd", "svd int8"]
    bytes_ = {
        name: next(m["value"] for m in point["metrics"] if m["name"] == "weight bytes")
        for name, point in points.items()
    }
    assert bytes_["svd int8"] < bytes_["dense int8"] < bytes_["svd"] < bytes_["dense"]
    assert invoke("report", tmp_path / "out").exit_code == 0


@pytest.mark.parametrize(
    ("command", "remedy"),
    [
        (("factorize", "--rank", "4", *SMALL), "factorize it before it is quantized"),
        (("export", "--to", "dense"), "export it before it is quantized"),
        (("finetune", "--data", "pydoc", "--max-steps", "1"), "finetune it before it is quantized"),
        (("quantize",), "start from the model before quantization"),
    ],
)
def test_other_commands_refuse_quantized_models(
    quantized: Path, tmp_path: Path, command: tuple[str, ...], remedy: str
) -> None:
    name, *flags = command
    result = invoke(name, quantized, "--out", tmp_path / "out", *flags)
    assert (result.exit_code, remedy in result.output) == (2, True), result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_weight_that_is_not_finite_is_named(value: float, dense: Path, tmp_path: Path) -> None:
    weight = "model.layers.1.mlp.down_proj.weight"
    broken = broken_copy(dense, tmp_path / "broken", weight, value)
    sentence = refusal("quantize", broken, "--out", tmp_path / "out")
    assert f"{weight} of the dense model is not finite" in sentence
    assert not (tmp_path / "out").exists()


def test_unavailable_quantization_is_one_sentence(
    low_rank: Path, quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = invoke("quantize", low_rank, "--out", tmp_path / "out", "--weights", "int3")
    assert wrong.exit_code == 2
    assert "--weights" in wrong.output
    if not torch.cuda.is_available():
        four = invoke("quantize", low_rank, "--out", tmp_path / "out", "--weights", "int4")
        assert four.exit_code == 1, four.output
        assert "int4 weights are not available on this machine" in four.output
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for source, more in ((low_rank, ()), (quantized, ())):
        missing = invoke("quantize", source, "--out", tmp_path / "out", *more)
        assert missing.exit_code == 2
        assert "lrcompress[quantize]" in missing.output
    assert not (tmp_path / "out").exists()


def test_a_variant_cannot_take_the_name(dense: Path, text: Path, tmp_path: Path) -> None:
    more = "sweep: {quantize: int8, variants: {svd: {method: svd}, svd int8: {method: svd}}}\n"
    recipe = small_recipe(tmp_path / "recipe.yaml", dense, text, more)
    result = invoke("sweep", recipe, tmp_path / "out")
    assert result.exit_code == 2
    assert "sweep.variants.svd int8: " in result.output
    assert not (tmp_path / "out").exists()


def test_speed_is_measured_as_they_are(quantized: Path) -> None:
    """Optimized layers read weights directly, so quantized layers keep their own forward."""
    model, _ = lrcompress.load(quantized)
    plain = logits(model)
    with lrcompress.optimize(model):
        assert torch.equal(logits(model), plain)


def test_damaged_records_name_the_fault(quantized: Path, tmp_path: Path) -> None:
    shutil.copytree(quantized, tmp_path / "copy")
    file = tmp_path / "copy" / "config.json"
    config = json.loads(file.read_text("utf-8"))
    name = next(iter(config["quantization_config"]["modules"]))
    config["quantization_config"]["modules"][name]["rank"] = 10**6
    file.write_text(json.dumps(config), "utf-8")
    result = invoke("eval", tmp_path / "copy", "--no-speed")
    assert result.exit_code == 2
    assert name in result.output
