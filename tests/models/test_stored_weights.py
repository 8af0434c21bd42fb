"""No tensor of a model's files is lost: it is loaded, carried over, or named in a refusal."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import lrcompress
from lrcompress.checkpoint.verify import verify
from lrcompress.runtime.errors import InputError
from tests.conftest import invoke, refusal
from tests.tiny import (
    ALL_FAMILIES,
    OTHER_CLASSES,
    copied_model,
    flip_a_bit,
    saved_class,
    saved_model,
    saved_weights,
)

SVD = ("--keep-ratio", "0.7", "--method", "svd")
FFN = re.compile(r"mlp\.(gate|up|down)_proj")  # of the language model, not of an encoder
EXTRA = {"mtp.fc.weight": torch.ones(3, 5), "model.layers.0.self_attn.q_proj.bias": torch.ones(32)}


def with_tensors(folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Path:
    """`folder`, after its weights were changed."""
    save_file(change(saved_weights(folder)), folder / "model.safetensors", {"format": "pt"})
    return folder


def check_nothing_lost(source: Path, out: Path) -> None:
    """No name is lost, nor the class, and every tensor outside the FFNs is as it was."""
    before, after = saved_weights(source), saved_weights(out)
    assert before.keys() <= after.keys()
    for name, tensor in before.items():
        if not FFN.search(name):
            assert torch.equal(after[name], tensor), name
    configs = [json.loads((folder / "config.json").read_text()) for folder in (source, out)]
    assert configs[0]["architectures"] == configs[1]["architectures"]


@pytest.mark.parametrize("name", OTHER_CLASSES)
def test_a_class_keeps_all_its_tensors(name: str, tmp_path: Path) -> None:
    source = saved_class(tmp_path / "source", name)
    (source / "preprocessor_config.json").write_text("{}")
    small, dense, alone = (tmp_path / folder for folder in ("small", "dense", "alone"))
    assert invoke("factorize", source, "--out", small, *SVD).exit_code == 0
    check_nothing_lost(source, small)
    assert invoke("export", small, "--to", "dense", "--out", dense).exit_code == 0
    check_nothing_lost(source, dense)
    result = invoke("export", small, "--to", "standalone", "--out", alone)
    assert result.exit_code == 0, result.output  # it compares outputs
    for folder in (small, dense, alone):
        assert (folder / "preprocessor_config.json").is_file()
        (verification,) = verify(folder, trust_remote_code=True)
        assert (verification.faults, verification.unchecked) == ((), None)


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_the_files_of_a_family_are_loaded_whole(family: str, tmp_path: Path) -> None:
    source = saved_model(tmp_path / "source", family)
    model, _ = lrcompress.load(source)
    lrcompress.save(model, tmp_path / "again")
    before, after = saved_weights(source), saved_weights(tmp_path / "again")
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    (verification,) = verify(tmp_path / "again")
    assert (verification.faults, verification.unchecked) == ((), None)
    flip_a_bit(tmp_path / "again" / "model.safetensors")
    (verification,) = verify(tmp_path / "again")
    assert [fault.kind for fault in verification.faults] == ["checksum"]


def test_tensors_that_a_class_skips_are_carried_over(tmp_path: Path) -> None:
    source = saved_class(tmp_path / "source", "Qwen3_5ForConditionalGeneration")
    with_tensors(source, lambda tensors: tensors | {"mtp.fc.weight": EXTRA["mtp.fc.weight"]})
    small, dense, alone = (tmp_path / folder for folder in ("small", "dense", "alone"))
    assert invoke("factorize", source, "--out", small, *SVD).exit_code == 0
    for form, out in (("dense", dense), ("standalone", alone)):
        assert invoke("export", small, "--to", form, "--out", out).exit_code == 0
    for folder in (small, dense, alone):
        assert torch.equal(saved_weights(folder)["mtp.fc.weight"], EXTRA["mtp.fc.weight"])
        record = json.loads((folder / "lrcompress.json").read_text())
        assert record["carried_over"] == ["mtp.fc.weight"]


@pytest.mark.parametrize("name", EXTRA)
def test_tensors_that_no_module_has_are_named(name: str, dense: Path, tmp_path: Path) -> None:
    folder = copied_model(dense, tmp_path / "model")
    with_tensors(folder, lambda tensors: tensors | {name: EXTRA[name]})
    message = refusal("factorize", folder, "--out", tmp_path / "out", *SVD)
    assert f"is loaded as LlamaForCausalLM, and its files hold {name}" in message
    assert "correct config.json" in message
    assert "intact copy" not in message


def test_constants_of_older_versions_are_dropped(tmp_path: Path) -> None:
    source = saved_model(tmp_path / "source", "gpt2")
    constants = {
        "transformer.h.0.attn.bias": torch.ones(1, 1, 4, 4),
        "transformer.h.0.attn.masked_bias": torch.tensor(-1e4),
    }
    names = saved_weights(source).keys()
    with_tensors(source, lambda tensors: tensors | constants)
    model, _ = lrcompress.load(source)
    lrcompress.save(model, tmp_path / "again")
    assert saved_weights(tmp_path / "again").keys() == names


def test_another_class_than_that_of_the_files_is_no_damage(tmp_path: Path) -> None:
    source = saved_class(tmp_path / "source", "Qwen3Model", tie_word_embeddings=False)
    folder = copied_model(source, tmp_path / "model", architectures=["Qwen3ForCausalLM"])
    assert "get an intact copy" in refusal("factorize", folder, "--out", tmp_path / "out", *SVD)
    folder = copied_model(source, tmp_path / "unnamed", architectures=None)
    message = refusal("factorize", folder, "--out", tmp_path / "out", *SVD)
    assert "config.json names no class in architectures" in message


def test_classes_without_next_tokens_are_not_measured(tmp_path: Path) -> None:
    source = saved_class(tmp_path / "source", "LlamaForSequenceClassification")
    for command in (
        ("eval", source, "--perplexity", "pydoc", "--no-speed"),
        ("factorize", source, "--out", tmp_path / "out", "--keep-ratio", "0.7"),
    ):
        assert "which LlamaForSequenceClassification does not have" in refusal(*command)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "base_model.model."])
def test_states_of_wrappers_are_named(prefix: str, dense: Path, tmp_path: Path) -> None:
    folder = copied_model(dense, tmp_path / "model")
    with_tensors(folder, lambda tensors: {f"{prefix}{n}": t for n, t in tensors.items()})
    message = refusal("factorize", folder, "--out", tmp_path / "out", *SVD)
    assert f"start with {prefix!r}" in message
    assert "save_pretrained(FOLDER)" in message


def test_the_text_model_of_a_small_image_text_model_loads(tmp_path: Path) -> None:
    source = saved_class(tmp_path / "source", "Qwen3_5ForConditionalGeneration")
    small = tmp_path / "small"
    assert invoke("factorize", source, "--out", small, *SVD).exit_code == 0
    whole, _ = lrcompress.load(small)
    text = AutoModelForCausalLM.from_pretrained(small).eval()
    tokens = torch.arange(1, 9)[None]
    with torch.no_grad():
        assert torch.equal(whole(input_ids=tokens).logits, text(input_ids=tokens).logits)


def test_wrapped_models_in_memory(dense: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model, _ = lrcompress.load(dense)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    for action in (
        lambda: lrcompress.factorize(adapted, None, keep_ratio=0.7, method="svd"),
        lambda: lrcompress.save(adapted, tmp_path / "out"),
    ):
        with pytest.raises(InputError, match="merge_and_unload"):
            action()
    adapted.save_pretrained(tmp_path / "adapter")
    message = refusal("factorize", tmp_path / "adapter", "--out", tmp_path / "out", *SVD)
    assert "holds an adapter of peft" in message
    assert not (tmp_path / "out").exists()
    compiled: Any = torch.compile(lrcompress.load(dense)[0], backend="eager")
    lrcompress.factorize(compiled, None, keep_ratio=0.7, method="svd")
    lrcompress.save(compiled, tmp_path / "out")
    again, _ = lrcompress.load(tmp_path / "out")
    tokens = torch.arange(1, 9)[None]
    with torch.no_grad():
        assert torch.equal(again(input_ids=tokens).logits, compiled(input_ids=tokens).logits)
