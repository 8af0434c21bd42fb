"""Every family: found, calibrated, factorized, saved, loaded bit for bit, trained, merged."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import lrcompress
from lrcompress.checkpoint.export.dense import to_stock
from lrcompress.checkpoint.folder import saved_tensors
from lrcompress.layers.ffn_layouts import LAYOUTS, find_blocks, find_ffns, select
from lrcompress.layers.lowrank import compressed_layers, dense_weight
from lrcompress.layers.model_info import parameter_count
from lrcompress.layers.moe import unpacked
from lrcompress.runtime.errors import InputError
from tests.tiny import (
    BLOCKS,
    FAMILIES,
    INNER,
    MIXTURE,
    MIXTURES,
    MORE_MIXTURES,
    byte_tokenizer,
    logits,
    tiny_model,
    tokens,
)

GATED = {
    "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "granite", "smollm3",
    "olmo2", "olmo3", "stablelm", "cohere", "helium", "exaone4", "ernie4_5", "lfm2",
}  # fmt: skip
SETTINGS: dict[str, Any] = {"num_samples": 4, "seq_len": 48}


def low_rank_parameters(model: Any) -> list[torch.nn.Parameter]:
    return [
        p
        for _, layer in compressed_layers(model)
        for n, p in layer.named_parameters()
        if "bias" not in n
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_finds_every_ffn_linear(family: str) -> None:
    linears = find_ffns(tiny_model(family)).linears
    roles = ["gate", "up", "down"] if family in GATED else ["up", "down"]
    if family in {"phi3", "glm4"}:
        roles = ["gate_up", "down"]
    assert [spec.role for spec in linears] == roles * BLOCKS
    assert [spec.block for spec in linears] == sorted(spec.block for spec in linears)
    for spec in linears:
        weight = dense_weight(tiny_model(family).get_submodule(spec.name))
        assert weight.shape == (spec.out_features, spec.in_features)


@pytest.mark.parametrize("family", FAMILIES | MIXTURES)
@pytest.mark.parametrize("method", ["whitened", "fisher", "nystrom", "ppm", "auto"])
def test_round_trip_is_exact(family: str, method: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    dense_count = parameter_count(model)
    result = lrcompress.factorize(
        model, byte_tokenizer(), keep_ratio=0.6, method=method, rank_multiple=2, **SETTINGS
    )
    assert result.model.kept == parameter_count(model) < dense_count == result.model.dense
    assert result.ffn.keep_ratio == pytest.approx(0.6, abs=0.05)  # ranks are multiples of 2 of 32
    lrcompress.save(model, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    changed = [linear for linear in result.linears if linear.form is not None]
    assert len(list(compressed_layers(loaded))) == len(changed) > 0
    assert torch.equal(logits(loaded), logits(model))
    uncounted = {f"{name}.{b}" for name, _ in compressed_layers(model) for b in ("weight", "order")}
    uncounted |= {name for name in model.state_dict() if name.endswith("experts.down_proj")}
    saved_names = model.state_dict().keys() - uncounted
    buffers = sum(b.numel() for name, b in model.named_buffers() if name in saved_names)
    assert saved_tensors(tmp_path / "out")["parameters"] == parameter_count(model) + buffers


@pytest.mark.parametrize("family", FAMILIES | MIXTURES)
def test_loaded_model_is_ordinary(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    lrcompress.factorize(model, rank=8, method="svd")
    lrcompress.save(model, tmp_path / "a")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    loaded.save_pretrained(tmp_path / "b")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "b", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in low_rank_parameters(again)} == {torch.bfloat16}
    assert torch.isfinite(again.float()(input_ids=torch.tensor([[1, 2, 3]])).logits).all()
    before = [parameter.clone() for parameter in low_rank_parameters(loaded)]
    batch = tokens()  # so many that they reach all experts
    loaded.train()(input_ids=batch, labels=batch).loss.backward()
    torch.optim.SGD(loaded.parameters(), lr=0.1).step()
    after = low_rank_parameters(loaded)
    assert all(not torch.equal(x, y) for x, y in zip(before, after, strict=True))


@pytest.mark.parametrize("family", FAMILIES | MIXTURES)
def test_merging_gives_the_stock_architecture(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    lrcompress.factorize(model, rank=8, method="svd")
    expected = logits(model)
    to_stock(model)
    stock = tiny_model(family)
    assert {n: p.shape for n, p in model.named_parameters()} == {
        n: p.shape for n, p in stock.named_parameters()
    }
    with unpacked(model), unpacked(stock):
        for spec in find_ffns(stock).linears:
            assert type(model.get_submodule(spec.name)) is type(stock.get_submodule(spec.name))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not hasattr(loaded.config, "quantization_config")
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES | MIXTURES)
def test_narrowed_model_becomes_stock(family: str, tmp_path: Path) -> None:
    """One width everywhere becomes a smaller intermediate_size, where the config has one."""
    model = tiny_model(family)
    lrcompress.factorize(
        model, byte_tokenizer(), keep_ratio=0.6, method="nystrom", rank_multiple=2, **SETTINGS
    )
    expected, narrow = logits(model), parameter_count(model)
    to_stock(model)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not any(compressed_layers(loaded))
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-3, atol=1e-3)
    assert narrow <= parameter_count(loaded) <= parameter_count(tiny_model(family))
    if family in {"llama", "gpt2", "opt", "phi3", "falcon"}:
        assert parameter_count(loaded) < parameter_count(tiny_model(family))


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "mixtral"])
def test_generates(family: str) -> None:
    model = tiny_model(family)
    lrcompress.factorize(model, rank=8, method="svd")
    out = model.generate(torch.tensor([[1, 2]]), max_new_tokens=4, do_sample=False)
    assert out.shape[0] == 1
    assert 2 < out.shape[1] <= 6


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon", "mixtral"])
def test_without_the_import_loading_raises(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    lrcompress.factorize(model, rank=8, method="svd")
    lrcompress.save(model, tmp_path / "out")
    script = (
        "import sys; from transformers import AutoModelForCausalLM as M\n"
        "assert not any(m.startswith('lrcompress') for m in sys.modules)\n"
        f"M.from_pretrained({str(tmp_path / 'out')!r})"
    )
    process = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert process.returncode == 1
    assert "mismatched" in process.stderr


# in gpt_oss experts are transposed and have biases; llama4 scales the inputs of experts
UNSUPPORTED_MIXTURE = MIXTURE | {
    "intermediate_size_mlp": INNER,
    "layer_types": ["full_attention"] * BLOCKS,
}


@pytest.mark.parametrize("family", ["gpt_oss", "llama4_text"])
def test_unsupported_experts_are_named_and_refused(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(MIXTURES, family, UNSUPPORTED_MIXTURE)
    model = tiny_model(family)
    with unpacked(model), pytest.raises(InputError, match=r"mixture-of-experts tensors \(model\."):
        select(model)
    with pytest.raises(InputError, match="otherwise not laid out"):
        lrcompress.factorize(model, rank=4, method="svd")


def test_every_layout_has_a_family_that_tests_it() -> None:
    rows = set()
    for family in (*FAMILIES, *MIXTURES, *MORE_MIXTURES):
        for block in find_blocks(tiny_model(family))[1]:
            paths = {name for name, _ in block.named_modules()}
            # a block takes the first layout that fits
            rows.add(next((n for n, row in enumerate(LAYOUTS) if row.keys() <= paths), None))
    assert rows - {None} == set(range(len(LAYOUTS)))
