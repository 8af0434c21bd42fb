"""Optimized FFNs: same outputs, gradients and checkpoints; undoing restores them bit for bit."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import lrcompress
from lrcompress.checkpoint.export.dense import to_stock
from lrcompress.layers.ffn_layouts import find_ffns
from lrcompress.layers.fused import FUSED, SharedInput
from lrcompress.layers.lowrank import compressed_layers
from lrcompress.layers.optimize import optimize
from tests.tiny import FAMILIES, byte_tokenizer, logits, tiny_model, tokens


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def low_rank(family: str, form: str = "pivoted", **changes: Any) -> Any:
    model = tiny_model(family, **changes)
    lrcompress.factorize(model, rank=16, method="svd", form=form)
    return model


def fused_layers(model: nn.Module) -> dict[str, nn.Module]:
    kinds = tuple(FUSED.values())
    return {name: layer for name, layer in compressed_layers(model) if isinstance(layer, kinds)}


@pytest.mark.parametrize("form", ["factored", "pivoted"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_the_same_and_goes_back(family: str, form: str) -> None:
    model = low_rank(family, form)
    expected = logits(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with optimize(model):
        # layers that blocks share stay as they are
        optimized = {} if family == "zamba" else dict(compressed_layers(model))
        assert fused_layers(model).keys() == optimized.keys()
        assert_close(logits(model), expected)
        one_token = model(input_ids=tokens()[:1, :1]).logits  # few tokens take other kernels
    assert not fused_layers(model)
    assert_close(model(input_ids=tokens()[:1, :1]).logits, one_token)
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "opt", "gpt_neox"])
@pytest.mark.parametrize("method", ["nystrom", "auto"])
def test_narrowed_and_mixed_ffns(family: str, method: str) -> None:
    model = tiny_model(family)
    settings: dict[str, Any] = {"num_samples": 4, "seq_len": 48, "rank_multiple": 2}
    lrcompress.factorize(model, byte_tokenizer(), keep_ratio=0.5, method=method, **settings)
    expected = logits(model)
    optimize(model)
    assert_close(logits(model), expected)


FACTORS = {"factored": ("A.weight", "B.weight"), "pivoted": ("Z.weight", "C.weight")}


def channel_orders(model: Any) -> dict[str, torch.Tensor]:
    """By linear that computes channels: its outputs in the order of down's pivots.

    Where gate and up are one matrix, both halves are in this order.
    """
    orders: dict[str, torch.Tensor] = {}
    linears = find_ffns(model).linears
    for down in (spec for spec in linears if spec.role == "down"):
        order = getattr(model.get_submodule(down.name), "order", torch.empty(0)).long()
        for spec in linears:
            if spec.ffn == down.ffn and spec.role != "down":
                both_halves = torch.cat([order, order + len(order)])
                orders[spec.name] = both_halves if spec.role == "gate_up" else order
    return orders


@pytest.mark.parametrize("length", [4, 24])  # few tokens are rows in memory, many columns
@pytest.mark.parametrize("form", ["factored", "pivoted"])
@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "starcoder2"])
def test_gradients_are_the_same(family: str, form: str, length: int) -> None:
    model, batch = low_rank(family, form), tokens(2, length)

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    orders = channel_orders(model)
    expected = gradients()
    with optimize(model):
        actual = gradients()
    assert actual.keys() == expected.keys()
    assert all(f"{name}.{factor}" in actual for name in orders for factor in FACTORS[form])
    for name, gradient in actual.items():
        linear, is_outer, _ = name.rpartition(".B." if form == "factored" else ".C.")
        permuted = is_outer and form == "pivoted" and linear in orders
        rows = orders[linear] if permuted else slice(None)
        assert_close(gradient, expected[name][rows])


@pytest.mark.parametrize("form", ["factored", "pivoted"])
def test_training_and_saving_while_optimized(form: str, tmp_path: Path) -> None:
    """The saved model loads without being optimized, and has the trained weights."""
    model = low_rank("llama", form)
    names = {name: tensor.shape for name, tensor in model.state_dict().items()}
    undo = optimize(model)
    model.train()(input_ids=tokens(), labels=tokens()).loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.01).step()
    trained = logits(model.eval())
    lrcompress.save(model, tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert {name: tensor.shape for name, tensor in loaded.state_dict().items()} == names
    assert_close(logits(loaded), trained)
    undo.close()
    assert_close(logits(model), trained)


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def test_gate_and_up_read_their_input_once() -> None:
    """One product gives both their inner activations; without room for it they are made apart."""
    model = low_rank("llama", "factored")
    optimize(model)
    mlp = model.model.layers[0].mlp
    inputs: list[Any] = []
    for linear in (mlp.gate_proj, mlp.up_proj):
        linear.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
    x = torch.randn(2, 5, 32)
    with torch.no_grad():
        joined = mlp(x)
    gate, up = inputs
    assert isinstance(gate, SharedInput)
    assert gate is up
    first, second = gate.inner
    assert _memory(first) == _memory(second)  # parts of one product
    assert_close(first, mlp.gate_proj.A(x).flatten(0, 1))
    model.double()  # moves every weight to memory of its own
    with torch.no_grad():
        apart = mlp(x.double())
        first, second = inputs[-1].inner
    assert _memory(first) != _memory(second)
    assert_close(apart.float(), joined)


def test_the_order_of_pivots_is_absorbed() -> None:
    model = low_rank("llama", "pivoted")
    state = {n: t for n, t in model.state_dict().items() if n.endswith(".order")}
    orders = [order for name, order in state.items() if "down" in name]
    assert any(not torch.equal(order, torch.arange(len(order))) for order in orders)
    optimize(model)
    for name, layer in compressed_layers(model):
        assert isinstance(layer.order, torch.Tensor)
        in_order = torch.equal(layer.order, torch.arange(len(layer.order)))
        assert in_order == name.endswith("down_proj")


def test_the_order_is_not_absorbed_where_another_tensor_depends_on_it() -> None:
    """Such as the weights of a norm between the channels and down."""
    model = low_rank("llama", "pivoted")
    for block in model.model.layers:
        mlp = block.mlp
        scale = nn.Parameter(torch.rand(mlp.down_proj.in_features))
        mlp.register_parameter("scale", scale)
        mlp.down_proj.register_forward_pre_hook(lambda _, x, s=scale: (x[0] * s,))
    expected = logits(model)
    optimize(model)
    assert_close(logits(model), expected)


def test_adapters_are_left_as_they_are() -> None:
    from lrcompress.training.trainable import with_adapters

    model = with_adapters(low_rank("llama"), 2, 0)
    expected = logits(model)
    optimize(model.base_model.model)
    assert not fused_layers(model)
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("form", ["factored", "pivoted"])
def test_adapters_added_after_optimizing_take_effect(form: str) -> None:
    from lrcompress.training.trainable import with_adapters

    model, other = low_rank("llama", form), low_rank("llama", form)
    optimize(model)
    model, other = with_adapters(model, 2, 0), with_adapters(other, 2, 0)
    with torch.no_grad():
        for adapted in (model, other):
            for name, parameter in adapted.named_parameters():
                if "lora_B" in name and ".down_proj." in name:
                    parameter.fill_(0.1)  # LoRA starts from zero
    assert_close(logits(model), logits(other))
    assert not torch.allclose(logits(model), logits(low_rank("llama", form)), atol=1e-2)


@pytest.mark.parametrize("form", ["factored", "pivoted"])
def test_copied_and_merged_while_optimized(form: str) -> None:
    model = low_rank("llama", form)
    expected = logits(model)
    optimize(model)
    assert_close(logits(copy.deepcopy(model)), expected)
    to_stock(model)
    torch.testing.assert_close(logits(model), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("length", [5, 12])  # few tokens are rows in memory, many columns
@pytest.mark.parametrize("form", ["factored", "pivoted"])
def test_compiles_as_one_graph(form: str, length: int) -> None:
    model = low_rank("llama", form)
    mlp, x = model.model.layers[0].mlp, torch.randn(2, length, 32)
    with torch.no_grad():
        expected = mlp(x)
        optimize(model)
        compiled: Any = torch.compile(mlp, fullgraph=True, backend="aot_eager")
        assert_close(compiled(x), expected)
