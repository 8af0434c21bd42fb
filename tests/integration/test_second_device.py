"""The core of lrcompress on a second device: no operation mixes devices, no transfer is hidden.

INTENDED lists every function that moves a value between the devices, with its reason.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import reduce
from typing import Any

import pytest
import torch

import lrcompress
from lrcompress.benchmark.ffn import bench_ffn
from lrcompress.benchmark.model import bench_models
from lrcompress.benchmark.throughput import generation_seconds
from lrcompress.compression.calibration.token_sums import TokenSums
from lrcompress.config import FFNBenchSettings, ModelBenchSettings
from lrcompress.layers.lowrank import PivotedLinear, compressed_layers
from lrcompress.layers.optimize import optimize
from lrcompress.methods import channel_selection, linalg
from lrcompress.training.losses import (
    hidden_error,
    kl_divergence,
    token_loss,
    top_k_divergence,
)
from lrcompress.training.self_guided import Guidance, guide_pairs
from lrcompress.training.trainable import balance, pack
from tests.second_device import SECOND, Transfers, moved, second_device, weights
from tests.tiny import byte_tokenizer, tiny_model, tokens

# function -> why it moves values between the devices
INTENDED = {
    # text, and numbers that are reported
    "compression.calibration.moments.measure_moments": "tokens, once a sample",
    "compression.calibration.moments.measure_errors": "tokens, once a sample",
    "evaluation.perplexity.scored_logits": "tokens, once a window",
    "evaluation.perplexity.perplexity": "the loss, once a window",
    "data.generated._first_tokens": "the first tokens, once a text",
    "data.generated._continued": "tokens that were written, once a batch",
    "layers.block_runner.BlockRunner._run_base": "tokens, once a sample",
    "compression.replace_layers._sampled": "the spectrum of a report, once a linear",
    "compression.calibration.token_sums.TokenSums.outlier_share": "a number of the report",
    "compression.block_error.BlockError.energy": "the held-out energy of a block, once a sample",
    "compression.block_error.BlockError.mean": "the held-out error of a block, once a sample",
    "compression.refine.Refinement._optimizer": "learning rates, once a block",
    # checks, whose errors name the linear
    "compression.planning.check_weights": "once a linear",
    "compression.calibration.moments._require_finite": "once a moment",
    "compression.anchored.RidgeFit.add": "once a sample and linear",
    "layers.block_runner._equal_values": "once a block",
    "compression.hidden_streams.HiddenStreams.adds_to_residual": "once a block",
    # calibration
    "compression.calibration.outliers.outlier_rows": "the number of outliers, once a sample",
    "compression.calibration.token_sums.TokenSums.add": "the energy of a sample",
    "compression.calibration.probes.ProbeErrors._output_hook": "an error, once a probe and sample",
    "compression.calibration.probes._narrowed": "the order of channels, once an FFN",
    # choices: the plan is made on the CPU
    "compression.planning.Planning.candidates": "the order of channels, once an FFN",
    "methods.candidates._curves": "errors by rank, once a linear and width",
    "methods.channel_selection.order_channels": "whether channels are left, once an update",
    "methods.channel_selection._Residual.__init__": "the error without channels, once an FFN",
    "methods.channel_selection._Residual.choose": "the largest gain outside, once an update",
    "methods.channel_selection._Residual._compact": "how many are left, once an update",
    "methods.channel_selection._choose": "small matrices and the choice, once an update",
    "methods.channel_selection.fold_into_down": "the kept channels, once an FFN and width",
    "methods.narrowing.keep_channels": "the kept channels, once an FFN",
    "methods.narrowing._block": "the kept channels, once a moment",
    "methods.nystrom.Nystrom.narrow": "the ridge, once an FFN and width",
    # decompositions
    "methods.linalg.damped": "whether a moment is zero, once a decomposition",
    "methods.linalg.WeightedNorm._root": "whether Cholesky succeeded, once a decomposition",
    "methods.linalg._floor": "once a decomposition",
    "methods.linalg.decompose": "the total energy, once a decomposition",
    "methods.linalg.TruncatedSVD.error": "once a decomposition",
    "methods.svd.DiagonalSVD.metric": "whether a moment is zero, once a linear",
    "methods.linalg._interpolation": "the order of pivots, and two numbers an exchange",
    "methods.linalg._exchange": "a number an exchange",
    "compression.replace_layers._input_sizes": "whether inputs are zero, once a linear",
    "compression.replace_layers.fill": "pivots, once a linear",
    "compression.anchored.RidgeFit.weight": "whether inputs are zero, once a linear",
    # experts
    "layers.experts.Experts.forward": "how many tokens each expert gets, which splits them",
    # benchmarks, outside of what is timed
    "benchmark.throughput.generation_seconds": "the prompt, before the clock starts",
    "benchmark.throughput.training_step_seconds": "the batch, before the clock starts",
    "benchmark.ffn._low_rank": "a random permutation, once a layer",
    "layers.optimize._absorb_order": "a permutation, once a layer",
}

TEXT: dict[str, Any] = {"calibration": "pydoc", "num_samples": 8, "seq_len": 32}
BUDGET: dict[str, Any] = {"keep_ratio": 0.6, "rank_multiple": 2}
CASES: dict[str, dict[str, Any]] = {
    "auto": {"method": "auto"},
    "auto, gpt2": {"method": "auto", "family": "gpt2"},
    "whitened": {"method": "whitened"},
    "fisher, factored": {"method": "fisher", "form": "factored"},
    "asvd": {"method": "asvd"},
    "svd": {"method": "svd"},
    "ppm": {"method": "ppm"},
    "nystrom, phi3": {"method": "nystrom", "family": "phi3"},
    "experts": {"method": "whitened", "family": "mixtral", "num_samples": 2},
    "anchored": {"method": "auto", "sequential": "anchored"},
    "refined": {"method": "whitened", "refine": True, "refine_epochs": 1},
    "searched": {"method": "ppm", "keep_ratio": None, "max_perplexity_increase": 0.5}
    | {"validation": "pydoc", "max_samples": 2},
}


def factorized(case: dict[str, Any], prepare: Callable[[Any], Any]) -> Any:
    model = prepare(tiny_model(case.get("family", "llama")))
    settings = {key: value for key, value in case.items() if key != "family"}
    lrcompress.factorize(model, byte_tokenizer(), **(TEXT | BUDGET | settings))
    return model


def hidden(transfers: Transfers) -> set[str]:
    """The functions that move values and are not listed."""
    return transfers.places - INTENDED.keys()


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_factorizing_gives_the_same_on_a_second_device(case: dict[str, Any]) -> None:
    expected = factorized(case, lambda model: model).state_dict()
    with second_device() as transfers:
        model = factorized(case, moved)
        assert all(parameter.device == SECOND for parameter in model.parameters())
        actual = weights(model)
    assert hidden(transfers) == set()
    # experts are views of fused weights on the CPU, and tensors of their own elsewhere
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, rtol=1e-3, atol=1e-4)


def test_text_that_the_model_writes() -> None:
    with second_device() as transfers:
        factorized({"method": "whitened", "calibration": "self"}, moved)
    assert hidden(transfers) == set()


@pytest.mark.parametrize("is_optimized", [False, True])
@pytest.mark.parametrize("method", ["svd", "ppm"])
@pytest.mark.parametrize("form", ["factored", "pivoted"])
def test_layers_transfer_nothing(form: str, method: str, is_optimized: bool) -> None:
    with second_device() as transfers:
        model, batch = factorized({"method": method, "form": form}, moved), tokens().to(SECOND)
        if is_optimized:
            optimize(model)
        transfers.counts.clear()
        model(input_ids=batch, labels=batch).loss.backward()
        generation_seconds(model, batch, 2)
    assert not transfers.counts


def test_losses_transfer_nothing() -> None:
    with second_device() as transfers:
        student = torch.randn(40, 23, device=SECOND, requires_grad=True)
        teacher, labels = torch.randn(40, 23, device=SECOND), torch.arange(23, device=SECOND)
        top = teacher.log_softmax(-1).topk(4)
        log_p = torch.cat([top.values, top.values[:, :1]], dim=-1)
        losses = [
            kl_divergence(student, teacher, 2.0),
            top_k_divergence(student, top.indices, log_p, 1.0),
            token_loss(student[:23], labels),
            hidden_error((student, student[None]), (teacher, teacher[None])),
        ]
        torch.stack(losses).sum().backward()  # type: ignore[no-untyped-call]
        assert student.grad is not None
        assert student.grad.device == SECOND
    assert not transfers.counts


def test_training_transfers_nothing_in_a_step() -> None:
    dense = tiny_model()
    guides = {name: module for name, module in dense.named_modules() if name}
    with second_device() as transfers:
        model = factorized({"method": "svd", "form": "pivoted"}, moved).train()
        batch, _ = tokens().to(SECOND), moved(dense)
        stored = balance(model)
        guidance = Guidance(steps=4, reduced=False, seed=0)
        transfers.counts.clear()
        with guidance.guiding(guide_pairs(model, guides)):
            model(input_ids=batch, labels=batch).loss.backward()
        assert not transfers.counts
        pack(model, stored)
    assert hidden(transfers) == set()
    assert any(isinstance(layer, PivotedLinear) for _, layer in compressed_layers(model))


def test_benchmarks() -> None:
    with second_device() as transfers:
        models = {name: moved(tiny_model()) for name in ("dense", "again")}
        short = {"prompt_length": 8, "new_tokens": 2, "training_length": 8, "repeats": 3}
        assert len(bench_models(models, ModelBenchSettings(batch_sizes=(1,), **short))) == 6
        sizes: dict[str, Any] = {
            "width": 64,
            "ffn_width": 128,
            "tokens": (4,),
            "dtypes": ("float32",),
        }
        sizes |= {"forms": ("pivoted",), "repeats": 3}
        settings = FFNBenchSettings(**sizes, keep_ratios=(0.5,), backward=True, device="lazy")
        assert {str(timing.name) for timing in bench_ffn(settings)} >= {"dense", "pivoted 0.5"}
    assert hidden(transfers) == set()


def test_choosing_channels_transfers_a_few_times_in_32_channels() -> None:
    width = 3 * channel_selection.CHANNELS_PER_UPDATE
    root = torch.randn(16, width, dtype=torch.float64)
    moment = root.T @ root + torch.eye(width, dtype=torch.float64)
    expected = channel_selection.order_channels(moment, root)
    with second_device() as transfers:
        order = channel_selection.order_channels(moment.to(SECOND), root.to(SECOND))
        assert order.channels.tolist() == expected.channels.tolist()
    steps = [n for (place, _), n in transfers.counts.items() if place.endswith("_choose")]
    assert sum(steps) < width / 2


def test_every_listed_function_exists() -> None:
    for place in INTENDED:
        names = place.split(".")
        modules = (i for i in range(len(names), 0, -1) if _is_module(names[:i]))
        split = next(modules)
        module = importlib.import_module(".".join(["lrcompress", *names[:split]]))
        assert reduce(getattr, names[split:], module)


def _is_module(names: list[str]) -> bool:
    try:
        return bool(importlib.import_module(".".join(["lrcompress", *names])))
    except ImportError:
        return False


@pytest.mark.parametrize("place", ["linalg", "sums"])
def test_a_planted_tensor_of_the_cpu_is_found(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: an operation of both devices is an error."""
    if place == "linalg":
        pairs = linalg.leading_eigenpairs
        monkeypatch.setattr(
            linalg, "leading_eigenpairs", lambda g, r: [t.cpu() for t in pairs(g, r)]
        )
    else:
        add = TokenSums.add
        monkeypatch.setattr(TokenSums, "add", lambda s, k, v, n: add(s, k, v, torch.ones(len(v))))
    with second_device(), pytest.raises(RuntimeError, match="the same device"):
        factorized({"method": "whitened"}, moved)


def test_a_planted_transfer_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    # a function whose code belongs to lrcompress, as a fault there would
    source = "def slow(layer, x):\n    float(x.detach().sum())\n    return forward(layer, x)\n"
    scope: dict[str, Any] = {"__name__": "lrcompress.layers.lowrank"}
    scope["forward"] = PivotedLinear.forward
    exec(source, scope)
    monkeypatch.setattr(PivotedLinear, "forward", scope["slow"])
    with second_device() as transfers:
        model = factorized({"method": "svd", "form": "pivoted"}, moved)
        model(input_ids=tokens().to(SECOND))
    assert hidden(transfers) == {"layers.lowrank.slow"}


def test_the_device_is_as_strict_as_a_gpu() -> None:
    with second_device():
        x = torch.ones(2, 2, device=SECOND)
        with pytest.raises(RuntimeError, match="the same device"):
            x @ torch.ones(2, 2)
        with pytest.raises(TypeError, match="numpy"):
            x.numpy()
        with pytest.raises(RuntimeError, match="generator"):
            torch.randn(2, device=SECOND, generator=torch.Generator())
        assert (x * torch.tensor(2.0)).device == SECOND  # a number of the CPU is allowed
