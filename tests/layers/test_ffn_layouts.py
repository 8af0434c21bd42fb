"""Every family: found, calibrated, factorized, saved, loaded bit for bit, trained, merged."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

import lrcompress
from lrcompress.checkpoint.export.dense import to_stock
from lrcompress.checkpoint.export.standalone import export_standalone
from lrcompress.checkpoint.folder import saved_tensors
from lrcompress.compression.factorize import _join_tied
from lrcompress.layers.experts import EXPERT_LIST
from lrcompress.layers.ffn_layouts import (
    LAYOUTS,
    _layout,
    find_blocks,
    find_ffns,
    has_experts,
    select,
)
from lrcompress.layers.lowrank import LowRankLinear, compressed_layers, dense_weight
from lrcompress.layers.model_info import parameter_count
from lrcompress.layers.moe import unpacked
from lrcompress.runtime.errors import InputError
from tests.tiny import (
    BLOCKS,
    EXPERTS,
    FAMILIES,
    INNER,
    MIXTURE,
    MIXTURES,
    MORE_MIXTURES,
    OTHER_CLASSES,
    WIDTH,
    byte_tokenizer,
    logits,
    tiny_model,
    tokens,
)

GATED = {
    "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "granite", "smollm3",
    "olmo2", "olmo3", "stablelm", "cohere", "helium", "exaone4", "ernie4_5", "lfm2",
    "falcon_h1", "bamba", "zamba", "recurrent_gemma", "qwen3_5_text", "gemma3n_text", "gemma4_text",
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
    assert [spec.role for spec in linears] == roles * (1 if family == "zamba" else BLOCKS)
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
    low_rank = [name for name, m in model.named_modules() if isinstance(m, LowRankLinear)]
    uncounted = {f"{name}.{buffer}" for name in low_rank for buffer in ("weight", "order")}
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


def test_unsupported_experts_are_named_and_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MIXTURES, "gpt_oss", UNSUPPORTED_MIXTURE)
    model = tiny_model("gpt_oss")
    with unpacked(model), pytest.raises(InputError, match=r"mixture-of-experts tensors \(model\."):
        select(model)
    with pytest.raises(InputError, match="otherwise not laid out"):
        lrcompress.factorize(model, rank=4, method="svd")


def test_unsupported_experts_beside_other_ffns_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MIXTURES, "llama4_text", UNSUPPORTED_MIXTURE)
    model = tiny_model("llama4_text")
    result = lrcompress.factorize(model, rank=4, method="svd")
    assert {linear.spec.ffn.rpartition(".")[2] for linear in result.linears} == {"shared_expert"}
    (note,) = result.notes
    assert "4 mixture-of-experts tensors stay dense, such as model.layers.0.feed_forward" in note


def test_every_layout_has_a_family_that_tests_it() -> None:
    used = []
    for family in (*FAMILIES, *MIXTURES, *MORE_MIXTURES):
        model = tiny_model(family)
        with unpacked(model):
            used += [layout for module in model.modules() if (layout := _layout(module))]
    assert [layout for layout in LAYOUTS if layout not in used] == []


@pytest.mark.parametrize("family", ["jamba", "nemotron_h", "glm4_moe"])
def test_experts_and_dense_ffns_of_one_model_are_both_found(family: str) -> None:
    model = tiny_model(family)
    with unpacked(model):
        ffns = {spec.ffn: spec for spec in select(model)}
    experts = {name: spec.mixture for name, spec in ffns.items() if spec.mixture}
    places = {  # blocks of dense FFNs and of shared experts, and the mixture
        "jamba": ([0], "model.layers.1.feed_forward.experts"),
        "nemotron_h": ([1, 3], "model.layers.3.mixer.experts"),
        "glm4_moe": ([0, 1], "model.layers.1.mlp.experts"),
    }
    dense_blocks, mixture = places[family]
    assert [ffns[name].block for name in ffns if name not in experts] == dense_blocks
    assert experts == {f"{mixture}.{EXPERT_LIST}.{n}": mixture for n in range(EXPERTS)}


def test_an_ffn_that_blocks_share_is_one(tmp_path: Path) -> None:
    """In zamba2 adapters of each block stand between the shared linears."""
    model = tiny_model("zamba2")
    assert [spec.block for spec in select(model)] == [1, 1]
    dense, before = parameter_count(model), logits(model)
    uses = []
    result = lrcompress.factorize(
        model, byte_tokenizer(), keep_ratio=0.6, method="fisher", rank_multiple=2, **SETTINGS
    )
    assert [linear.form for linear in result.linears] == ["pivoted"] * 2
    assert result.model.kept == parameter_count(model) < dense
    for block in (1, 3):
        ffn = model.model.layers[block].shared_transformer.feed_forward
        assert type(ffn.down_proj).__name__ == "PivotedLinear"
        uses.append(ffn.down_proj.C.weight)
    assert uses[0] is uses[1]
    expected = logits(model)
    assert not torch.allclose(expected, before)
    lrcompress.save(model, tmp_path / "small")
    for folder in ("small", "again"):
        loaded, _ = lrcompress.load(tmp_path / folder)
        assert torch.equal(logits(loaded), expected)
        assert parameter_count(loaded) == result.model.kept
        lrcompress.save(loaded, tmp_path / ("again" if folder == "small" else "last"))
    export_standalone(loaded, None, tmp_path / "alone", {})  # compares outputs
    to_stock(loaded)
    assert parameter_count(loaded) == dense


def test_calibration_sees_every_use_of_a_shared_ffn() -> None:
    model, calls = tiny_model("zamba"), []
    specs = select(model)
    _join_tied(model, specs)
    ffn = model.get_submodule(specs[0].ffn)
    for name in ("gate_proj", "up_proj", "down_proj"):
        ffn.get_submodule(name).register_forward_hook(lambda *_: calls.append(1))
    logits(model)
    assert len(calls) == 3 * 2


class ListedExperts(torch.nn.Module):
    """Experts as code outside transformers has them: a list of FFNs."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = torch.nn.ModuleList(tiny_model().model.layers[0].mlp for _ in range(EXPERTS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.experts[0](x)  # type: ignore[no-any-return]


def test_experts_in_a_list_are_a_mixture() -> None:
    model = tiny_model()
    model.model.layers[1].mlp = ListedExperts()
    specs = find_ffns(model).linears
    assert [spec.mixture for spec in specs if spec.block == 0] == [""] * 3
    mixture = "model.layers.1.mlp.experts"
    assert {(s.ffn, s.mixture) for s in specs if s.block == 1} == {
        (f"{mixture}.{n}", mixture) for n in range(EXPERTS)
    }
    assert has_experts(model)
    assert not has_experts(tiny_model())


def test_ffns_that_mix_channels_are_not_narrowed() -> None:
    """In gemma3n the activations that are kept depend on mean and variance over channels."""
    model = tiny_model("gemma3n_text", activation_sparsity_pattern=[0.95, 0.0])
    specs = find_ffns(model).linears
    assert [spec.channelwise for spec in specs] == [False] * 3 + [True] * 3
    message = r"model.layers.0.mlp cannot be narrowed.* --exclude 'model.layers.0.mlp.\*'"
    with pytest.raises(InputError, match=message):
        lrcompress.factorize(model, byte_tokenizer(), keep_ratio=0.6, method="nystrom", **SETTINGS)
    result = lrcompress.factorize(
        model, byte_tokenizer(), keep_ratio=0.4, method="auto", **SETTINGS
    )
    narrowed = {linear.spec.block for linear in result.linears if _is_narrowed(linear)}
    assert narrowed == {1}


def _is_narrowed(linear: Any) -> bool:
    spec = linear.spec
    return bool(linear.shape != (spec.out_features, spec.in_features))


def test_a_norm_over_the_channels_prevents_narrowing() -> None:
    model = tiny_model()
    model.model.layers[0].mlp.norm = torch.nn.LayerNorm(INNER)
    specs = find_ffns(model).linears
    assert [spec.channelwise for spec in specs] == [False] * 3 + [True] * 3


@pytest.mark.parametrize(
    "name", ["LlavaForConditionalGeneration", "Gemma3ForConditionalGeneration"]
)
def test_blocks_are_those_of_the_language_model(name: str) -> None:
    """Also where an encoder of images has as many, and far larger ones."""
    model_type, keys = OTHER_CLASSES[name]
    vision = keys["vision_config"] | {"num_hidden_layers": BLOCKS, "intermediate_size": 512}
    config = AutoConfig.for_model(model_type, **(keys | {"vision_config": vision}))
    model = getattr(transformers, name)(config)
    assert find_blocks(model)[0] == "model.language_model.layers"


@pytest.mark.parametrize("family", ["falcon_mamba", "rwkv"])
def test_a_suggested_pattern_matches_linears_of_the_model(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = {"hidden_size": WIDTH, "num_hidden_layers": BLOCKS, "attention_hidden_size": WIDTH}
    monkeypatch.setitem(FAMILIES, family, keys)
    model = tiny_model(family)
    with pytest.raises(InputError, match="no feed-forward linears known") as error:
        select(model)
    (pattern,) = re.findall(r"--include '(.*)'", str(error.value))
    assert select(model, include=[pattern])
