"""Second moments equal a direct computation; hooks do not outlive the pass."""

from __future__ import annotations

import pytest
import torch

import lrcompress
from lrcompress.compression.calibration import activations
from lrcompress.compression.calibration.activations import block_activations, kept_blocks
from lrcompress.compression.calibration.moments import measure_moments
from lrcompress.data.packing import IGNORED
from lrcompress.layers import bfloat16_linears
from lrcompress.layers.block_runner import BlockRunner, sample_score_gradients
from lrcompress.layers.ffn_layouts import find_blocks, select
from lrcompress.runtime.errors import InputError
from tests.tiny import byte_tokenizer, tiny_model, tokens


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_second_moment_of_every_linear(family: str) -> None:
    model = tiny_model(family)
    linears = select(model)
    seen: dict[str, list[torch.Tensor]] = {spec.name: [] for spec in linears}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, x, rows=rows: rows.append(x[0].detach().flatten(0, -2).double())
        )
        for name, rows in seen.items()
    ]
    sample = tokens(3, 20)
    moments = measure_moments(model, linears, sample)
    for handle in handles:
        handle.remove()
    for spec in linears:
        x = torch.cat(seen[spec.name])
        assert x.shape == (60, spec.in_features)
        moment = moments.statistics(spec).second_moment
        assert moment is not None
        assert moment.dtype == torch.float64
        torch.testing.assert_close(moment, x.T @ x / 60, rtol=1e-5, atol=1e-6)


def test_gate_and_up_share_one_moment() -> None:
    linears = select(tiny_model())
    moments = measure_moments(tiny_model(), linears, tokens(1, 8))
    assert len(moments.input_sums.sums) == 4  # two blocks: gate with up, and down
    assert moments.statistics(linears[0]).second_moment is not None


def test_hooks_are_removed_even_after_an_error() -> None:
    model = tiny_model()
    linears = select(model)
    with pytest.raises(IndexError):
        measure_moments(model, linears, torch.full((1, 4), 99_999))
    for spec in linears:
        assert not model.get_submodule(spec.name)._forward_pre_hooks


def test_non_finite_activations_name_the_linear() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[0].post_attention_layernorm.weight.fill_(1e25)
    with pytest.raises(InputError, match=r"model\.layers\.0\.mlp\.gate_proj is not finite"):
        lrcompress.factorize(
            model,
            byte_tokenizer(),
            keep_ratio=0.5,
            method="whitened",
            calibration="pydoc",
            num_samples=2,
            seq_len=32,
        )


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("trained", [True, False])
def test_gradient_moment_of_every_linear(family: str, trained: bool) -> None:
    model = tiny_model(family).train().requires_grad_(trained)
    linears = select(model)
    sample = tokens(2, 20)
    moments = measure_moments(model, linears, sample, gradient_samples=len(sample))
    assert model.training
    assert all(p.requires_grad == trained and p.grad is None for p in model.parameters())
    plain = measure_moments(model, linears, sample)
    seen: dict[str, list[torch.Tensor]] = {spec.name: [] for spec in linears}
    model.eval().requires_grad_(True)
    handles = [
        model.get_submodule(name).register_full_backward_hook(
            lambda _, __, g, rows=rows: rows.append(g[0].flatten(0, -2).double())
        )
        for name, rows in seen.items()
    ]
    for index, row in enumerate(sample):
        logits = model(input_ids=row[None]).logits[0]
        generator = torch.Generator().manual_seed(index)
        logits.backward(sample_score_gradients(logits.detach(), generator))
    for handle in handles:
        handle.remove()
    for spec in linears:
        g = torch.cat(seen[spec.name])
        statistics = moments.statistics(spec)
        assert statistics.gradient_moment is not None
        torch.testing.assert_close(
            statistics.gradient_moment.double(), g.T @ g / 40, rtol=1e-4, atol=1e-6
        )
        torch.testing.assert_close(statistics.second_moment, plain.statistics(spec).second_moment)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_moments_do_not_depend_on_which_activations_are_kept(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(family)
    linears, sample = select(model), tokens(2, 20)
    blocks = len(find_blocks(model)[1])
    assert kept_blocks(model, 20) == blocks > 1
    kept = measure_moments(model, linears, sample, gradient_samples=2)
    for count in (blocks - 1, 0):
        monkeypatch.setattr(activations, "KEPT_BYTES", count * block_activations(model, 20))
        assert kept_blocks(model, 20) == count
        recomputed = measure_moments(model, linears, sample, gradient_samples=2)
        for name, moment in kept.gradient_sums.sums.items():
            assert torch.equal(recomputed.gradient_sums.sums[name], moment)
        for name, moment in kept.input_sums.sums.items():
            assert torch.equal(recomputed.input_sums.sums[name], moment)


def test_only_predictions_of_labels_have_gradients() -> None:
    model, sample = tiny_model(), tokens(2, 20)
    linears = select(model)
    labels = sample.clone()
    labels[0, 5:] = IGNORED
    labels[1] = IGNORED
    moments = measure_moments(model, linears, sample, gradient_samples=2, labels=labels)
    whole = measure_moments(model, linears, sample, gradient_samples=2, labels=sample)
    last = max(spec.block for spec in linears)
    for spec in linears:
        moment, all_of_it = moments.gradient_moment(spec), whole.gradient_moment(spec)
        assert moment is not None
        assert all_of_it is not None
        assert 0 < float(moment.trace()) < float(all_of_it.trace())
        if spec.block == last and spec.role == "down":  # behind it, no token reads another
            assert torch.linalg.matrix_rank(moment) <= 4
            assert torch.linalg.matrix_rank(all_of_it) > 4


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_no_more_activations_are_kept_than_estimated(attention: str) -> None:
    model = tiny_model("llama", attn_implementation=attention)
    length = 256
    embedded = model.get_input_embeddings()(tokens(1, length)).detach().requires_grad_(True)
    arguments = BlockRunner(model, tokens(2, length)).arguments[0]
    model.requires_grad_(False)
    storages: dict[int, int] = {}

    def record(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        output = model.model.layers[0](embedded, *arguments[0], **arguments[1])
    del output
    assert 0.5 < sum(storages.values()) / block_activations(model, length) <= 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gradients_survive_low_precision_and_the_models_own_checkpointing(
    dtype: torch.dtype,
) -> None:
    linears, sample = select(tiny_model()), tokens(2, 20)
    exact = measure_moments(tiny_model(), linears, sample, gradient_samples=len(sample))
    model = tiny_model().to(dtype)
    model.activation_checkpointing_enable()
    rounded = measure_moments(model.train(), linears, sample, gradient_samples=len(sample))
    for spec in linears:
        a, b = exact.statistics(spec).gradient_moment, rounded.statistics(spec).gradient_moment
        assert a is not None
        assert b is not None
        assert float((a - b).norm() / a.norm()) < (0.1 if dtype == torch.bfloat16 else 1e-5)


def test_products_in_bfloat16_hardly_move_moments(monkeypatch: pytest.MonkeyPatch) -> None:
    model, sample = tiny_model(), tokens(2, 64)
    linears = select(model)
    exact = measure_moments(model, linears, sample, gradient_samples=2)
    monkeypatch.setattr(bfloat16_linears, "MINIMUM_WIDTH", 1)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    rounded = measure_moments(model, linears, sample, gradient_samples=2)
    for spec in linears:
        a, b = exact.statistics(spec), rounded.statistics(spec)
        for x, y in ((a.second_moment, b.second_moment), (a.gradient_moment, b.gradient_moment)):
            assert x is not None
            assert y is not None
            assert 0 < float((x - y).norm() / x.norm()) < 0.1
