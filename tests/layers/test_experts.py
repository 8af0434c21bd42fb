"""Mixtures of experts: each expert is factorized by the tokens it reads; others are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import lrcompress
from lrcompress.benchmark import flops
from lrcompress.compression.calibration.moments import MomentStatistics, measure_moments
from lrcompress.compression.factorize import NOT_ANCHORED
from lrcompress.config import ModelSettings
from lrcompress.layers.experts import Experts, fused_experts, is_fused
from lrcompress.layers.ffn_layouts import ffn_parameters, find_ffns, select
from lrcompress.layers.lowrank import compressed_layers
from lrcompress.layers.model_info import parameter_count
from lrcompress.layers.moe import unpacked
from lrcompress.layers.optimize import optimize
from lrcompress.methods.types import LinearSpec
from lrcompress.runtime.errors import InputError
from lrcompress.training.fsdp import placement
from tests.conftest import SMALL, invoke
from tests.tiny import (
    BLOCKS,
    EXPERTS,
    INNER,
    MIXTURES,
    WIDTH,
    assert_loads_without_lrcompress,
    byte_tokenizer,
    finetuned,
    logits,
    saved_model,
    tiny_model,
    tokens,
)

SETTINGS: dict[str, Any] = {"num_samples": 4, "seq_len": 48, "rank_multiple": 2}
FFN, EXPERT = ["gate", "up", "down"], ["gate_up", "down"] * EXPERTS


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense mixtral with its tokenizer."""
    return saved_model(tmp_path_factory.mktemp("mixture") / "model", "mixtral")


@pytest.fixture(scope="module")
def factorized_mixture(mixture: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The mixtral of `mixture`, factorized."""
    out = tmp_path_factory.mktemp("small") / "model"
    flags = ("--keep-ratio", "0.6", "--method", "fisher", *SMALL)
    result = invoke("factorize", mixture, "--out", out, *flags)
    assert result.exit_code == 0, result.output
    return out


@pytest.mark.parametrize("family", MIXTURES)
def test_every_expert_is_found(family: str) -> None:
    model = tiny_model(family)
    parameters = ffn_parameters(model)
    with unpacked(model):
        finding = find_ffns(model)
        assert ffn_parameters(model) == parameters
    ungated = ["up", "down"]
    roles = {
        "qwen2_moe": (FFN + EXPERT) * 2,
        "glm4_moe": FFN + FFN + EXPERT,
        "granitemoehybrid": ["gate_up", "down", *EXPERT] * 2,  # a shared expert in each block
        "jamba": FFN + EXPERT,  # a dense block, then one of experts
        "nemotron_h": ungated + ungated + ungated * EXPERTS,  # dense, shared expert, experts
    }
    assert [spec.role for spec in finding.linears] == roles.get(family, EXPERT * BLOCKS)
    assert parameters == sum(spec.dense_parameters for spec in finding.linears)
    assert not finding.experts


@pytest.mark.parametrize("family", MIXTURES)
def test_experts_compute_what_the_fused_ones_do(family: str) -> None:
    """And give the same gradients; afterwards the fused ones are back, after an error too."""
    model = tiny_model(family)
    fused_before = dict(fused_experts(model))
    expected, gradients = logits(model), _gradients(model)
    with unpacked(model):
        assert not dict(fused_experts(model))
        torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
        for name, gradient in _gradients(model).items():
            scale = float(gradients[name].abs().max())
            torch.testing.assert_close(gradient, gradients[name], rtol=1e-3, atol=1e-4 * scale)
    assert {name: id(module) for name, module in fused_experts(model)} == {
        name: id(module) for name, module in fused_before.items()
    }
    with pytest.raises(ZeroDivisionError), unpacked(model):
        raise ZeroDivisionError
    assert dict(fused_experts(model)).keys() == fused_before.keys()


def _gradients(model: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    batch = tokens()
    model(input_ids=batch, labels=batch).loss.backward()
    named = {n: p.grad for n, p in model.named_parameters() if ".experts." not in n}
    return {name: gradient.clone() for name, gradient in named.items() if gradient is not None}


def test_only_experts_of_the_supported_layout_are_recognized() -> None:
    (_, module), *_ = fused_experts(tiny_model("mixtral"))
    for flag in ("is_transposed", "has_bias"):
        setattr(module, flag, True)
        assert not is_fused(module)
        setattr(module, flag, False)
    assert is_fused(module)
    module.register_buffer("scale", torch.ones(1))
    assert not is_fused(module)


def _moments(model: Any, sample: torch.Tensor) -> tuple[tuple[LinearSpec, ...], MomentStatistics]:
    with unpacked(model):
        linears = select(model)
    return linears, measure_moments(model, linears, sample, gradient_samples=len(sample))


def _routed(model: Any, sample: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Of each block the inputs of its experts (tokens, width), and the experts of each token."""
    calls: list[tuple[torch.Tensor, torch.Tensor]] = []
    hooks = [
        module.register_forward_pre_hook(lambda _, args: calls.append((args[0], args[1])))
        for _, module in fused_experts(model)
    ]
    model(input_ids=sample)
    for hook in hooks:
        hook.remove()
    return calls


@torch.no_grad()
def test_an_expert_has_the_moments_of_its_own_tokens() -> None:
    model, sample = tiny_model("mixtral", num_experts_per_tok=1), tokens(1, 200)
    routed = _routed(model, sample)
    linears, moments = _moments(model, sample)
    compared = 0
    for number, spec in enumerate(s for s in linears if s.role == "gate_up"):
        hidden, chosen = routed[spec.block]
        inputs = hidden[(chosen == number % EXPERTS).any(1)].double()
        if len(inputs) >= WIDTH:
            compared += 1
            moment = moments.statistics(spec).second_moment
            torch.testing.assert_close(moment, inputs.T @ inputs / 200, rtol=1e-4, atol=1e-6)
    assert compared >= 2
    assert {name for name, _ in moments.undersampled_experts()} != {spec.ffn for spec in linears}


@torch.no_grad()
def test_an_expert_without_tokens_gets_its_mixtures_mean() -> None:
    sample = tokens(1, 3)
    model = tiny_model("mixtral", num_experts_per_tok=1, num_experts=8)
    routed = _routed(model, sample)
    linears, moments = _moments(model, sample)
    empty = {name for name, count in moments.undersampled_experts() if count == 0}
    assert len(empty) >= BLOCKS * 5
    for spec in (spec for spec in linears if spec.ffn in empty):
        statistics = moments.statistics(spec)
        moment = statistics.second_moment
        assert moment is not None
        assert statistics.gradient_moment is not None
        if spec.role == "gate_up":  # as many tokens as inputs, of 3
            hidden = routed[spec.block][0].double()
            mean = hidden.T @ hidden / len(hidden)
            torch.testing.assert_close(moment, mean * WIDTH / 3, rtol=1e-4, atol=1e-6)
        else:  # the other experts give the scale of the moment, and nothing else
            value = moment[0, 0]
            assert value > 0
            assert torch.equal(moment, value * torch.eye(INNER).double())


@pytest.mark.parametrize("method", ["svd", "asvd", "whitened", "fisher", "nystrom", "ppm", "auto"])
def test_few_tokens_give_a_warning_and_finite_weights(method: str) -> None:
    model = tiny_model("mixtral", num_experts_per_tok=1, num_experts=8)
    settings: dict[str, Any] = {
        "num_samples": 1,
        "seq_len": 4,
        "rank_multiple": 2,
        "calibration": "pydoc",
    }
    result = lrcompress.factorize(
        model, byte_tokenizer(), keep_ratio=0.6, method=method, **settings
    )
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())
    assert bool(logits(model).isfinite().all())
    assert result.ffn.keep_ratio == pytest.approx(0.6, abs=0.03)
    warning = "16 of 16 experts were given fewer calibration tokens than they have inputs"
    assert any(note.startswith(warning) for note in result.notes) == (method != "svd")


@pytest.mark.parametrize("ranks", ["uniform", "loss_aware"])
@pytest.mark.parametrize("form", ["factored", "pivoted"])
def test_budgets_are_met_exactly(ranks: str, form: str) -> None:
    model = tiny_model("qwen2_moe")
    dense = parameter_count(model)
    result = lrcompress.factorize(
        model, byte_tokenizer(), keep_ratio=0.5, method="fisher", ranks=ranks, form=form, **SETTINGS
    )
    assert result.model.kept == parameter_count(model) < result.model.dense == dense
    assert result.ffn.keep_ratio == pytest.approx(0.5, abs=0.02)
    assert result.ffn.kept == ffn_parameters(model)
    expert_ranks = {linear.rank for linear in result.linears if linear.spec.mixture}
    assert len(expert_ranks) > 1  # every matrix of every expert has its own rank


def test_experts_can_be_left_out_and_what_is_left_stays_fused(tmp_path: Path) -> None:
    model = tiny_model("mixtral")
    lrcompress.factorize(model, rank=4, method="svd", dense_first=1)
    names = [name for name, _ in fused_experts(model)]
    assert names == ["model.layers.0.mlp.experts"]
    model = tiny_model("mixtral")
    lrcompress.factorize(model, rank=4, method="svd", include=["*.1.mlp.experts.ffns.2.down"])
    names = [name for name, _ in compressed_layers(model)]
    assert names == ["model.layers.1.mlp.experts.ffns.2.down"]
    for parameter in model.parameters():  # nothing holds the fused tensors any more
        assert parameter.untyped_storage().nbytes() == parameter.nbytes
    lrcompress.save(model, tmp_path / "out")
    assert torch.equal(logits(lrcompress.load(tmp_path / "out")[0]), logits(model))


def test_an_error_leaves_the_model_unchanged() -> None:
    model = tiny_model("mixtral")
    before = logits(model)
    with pytest.raises(InputError, match="rank"):
        lrcompress.factorize(model, rank=1000, method="svd")
    assert len(dict(fused_experts(model))) == BLOCKS
    assert torch.equal(logits(model), before)


def test_optimized_experts_give_the_same() -> None:
    model = tiny_model("qwen3_moe")
    lrcompress.factorize(model, byte_tokenizer(), keep_ratio=0.6, **SETTINGS)
    expected = logits(model)
    with optimize(model):
        torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(logits(model), expected)


def test_a_mixture_goes_through_the_commands(
    mixture: Path, factorized_mixture: Path, text: Path, tmp_path: Path
) -> None:
    inspection = json.loads(invoke("inspect", factorized_mixture, "--json").stdout)
    assert len(inspection["rows"]) == BLOCKS * EXPERTS * 2
    assert inspection["experts"] == []
    result = invoke(
        "eval", factorized_mixture, "--baseline", mixture, "--no-speed", "--perplexity", text,
        "--context-length", "32", "--limit", "2", "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    metrics = json.loads(result.stdout)["metrics"]
    sizes = {m["model"]: m["value"] for m in metrics if m["name"] == "FFN parameters"}
    model = lrcompress.load(mixture)[0]
    assert sizes.popitem()[1] < ffn_parameters(model) * 0.61
    assert sizes.popitem()[1] == ffn_parameters(model) > 0
    bench = invoke(
        "bench", "model", factorized_mixture, "--baseline", mixture, "--prompt-length", "8",
        "--new-tokens", "2", "--repeats", "3", "--batch-size", "1", "--training-length", "8",
        "--json",
    )  # fmt: skip
    assert bench.exit_code == 0, bench.output


@pytest.mark.parametrize(
    "settings",
    [{"train": "all", "learning_rate": 3e-4}, {"train": "lora"}, {"self_guided": "reduced"}],
    ids=str,
)
def test_experts_are_finetuned(
    factorized_mixture: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    record = finetuned(factorized_mixture, tmp_path / "tuned", **settings)["finetuned"]
    assert record["after"] < record["before"]
    before, after = (
        lrcompress.load(path)[0].state_dict() for path in (factorized_mixture, tmp_path / "tuned")
    )
    assert after.keys() == before.keys()
    assert any(not torch.equal(after[n], before[n]) for n in after if ".experts.ffns." in n)


@pytest.mark.parametrize(
    ("form", "arguments", "tolerance"),
    [("dense", "", 1e-4), ("standalone", "trust_remote_code=True", 0)],
)
def test_exports_of_a_mixture_load_without_lrcompress(
    factorized_mixture: Path, tmp_path: Path, form: str, arguments: str, tolerance: float
) -> None:
    out = tmp_path / form
    assert invoke("export", factorized_mixture, "--out", out, "--to", form).exit_code == 0
    assert_loads_without_lrcompress(factorized_mixture, out, arguments, tolerance)


def test_refined_experts_are_no_worse(mixture: Path) -> None:
    model = lrcompress.load(mixture)[0]
    result = lrcompress.factorize(
        model, byte_tokenizer(), keep_ratio=0.5, refine=True, refine_epochs=2, **SETTINGS
    )
    assert len(result.refined) == BLOCKS
    assert all(block.after <= block.before for block in result.refined)


def test_settings_that_do_not_support_experts_are_refused(mixture: Path, tmp_path: Path) -> None:
    command = ("factorize", mixture, "--out", tmp_path / "out", "--keep-ratio", "0.6", *SMALL)
    streamed = invoke(*command, "--streaming", "--calibration", "pydoc")
    assert streamed.exit_code == 2
    assert "streaming does not factorize mixtures of experts" in streamed.stderr
    anchored = invoke(*command, "--sequential", "anchored")
    assert anchored.exit_code == 2
    assert "anchored cannot fit mixtures of experts" in anchored.stderr
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="--shard does not split mixtures of experts"):
        placement(ModelSettings(source=str(mixture)), shard=True)
    with pytest.raises(InputError, match="depend on which experts"):
        flops.analytic_flops(tiny_model("mixtral"), 8)


def test_effort_best_leaves_experts_independent(mixture: Path) -> None:
    best, independent = (lrcompress.load(mixture)[0] for _ in range(2))
    settings = SETTINGS | {"keep_ratio": 0.6, "gradient_samples": 2}
    result = lrcompress.factorize(best, byte_tokenizer(), effort="best", **settings)
    expected = lrcompress.factorize(independent, byte_tokenizer(), **settings)
    assert torch.equal(logits(best), logits(independent))
    assert result.notes == (*expected.notes, NOT_ANCHORED)


def test_effort_best_anchors_what_is_left_without_experts() -> None:
    best, independent = (tiny_model("glm4_moe") for _ in range(2))
    settings = SETTINGS | {"keep_ratio": 0.6, "exclude": ["*.experts.*"]}
    result = lrcompress.factorize(best, byte_tokenizer(), effort="best", **settings)
    lrcompress.factorize(independent, byte_tokenizer(), gradient_samples=16, **settings)
    assert NOT_ANCHORED not in result.notes
    assert not torch.equal(logits(best), logits(independent))


def test_new_experts_are_low_rank_from_the_start(tmp_path: Path) -> None:
    config = tiny_model("mixtral").config
    config.save_pretrained(tmp_path / "config")
    result = invoke(
        "pretrain", tmp_path / "config", "--out", tmp_path / "new", "--data", "pydoc",
        "--keep-ratio", "0.5", "--max-steps", "2", "--train-length", "32", "--held-out", "2",
        "--eval-every", "1", "--self-guided", "reduced", "--vocab-size", "300",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    model = lrcompress.load(tmp_path / "new")[0]
    kinds = [type(block.mlp.experts) for block in model.model.layers]
    assert Experts in kinds
