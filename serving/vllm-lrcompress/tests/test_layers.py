"""Each process of tensor parallelism computes its part of a layer; no engine is started."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import (
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)

from vllm_lrcompress.geometry import Widths
from vllm_lrcompress.layers import LowRankLinearMethod
from vllm_lrcompress.products import Matrix
from vllm_lrcompress.records import CheckpointError, LinearRecord

HIDDEN, WIDTH = 8, 12
Tensors = dict[str, Tensor]


@pytest.fixture(autouse=True)
def no_process_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's parameters ask for the process, which no layer here does."""
    monkeypatch.setattr("vllm.model_executor.parameter.get_tensor_model_parallel_rank", lambda: 0)
    monkeypatch.setattr(
        "vllm.model_executor.parameter.get_tensor_model_parallel_world_size", lambda: 1
    )


def record(name: str, form: str, shape: tuple[int, int], rank: int | None = None) -> LinearRecord:
    return LinearRecord(f"mlp.{name}", form, *shape, rank)


def random_tensors(linear: LinearRecord) -> Tensors:
    tensors = {path: torch.randn(shape) for path, shape in linear.tensors().items()}
    if "order" in tensors:
        tensors["order"] = torch.randperm(linear.in_features).int()
    return tensors


def product(linear: LinearRecord, tensors: Tensors) -> Tensor:
    """W (out, in), by the formulas of docs/checkpoint.md."""
    if linear.form == "factored":
        return tensors["B.weight"] @ tensors["A.weight"]
    if linear.form == "narrowed":
        return tensors["weight"]
    C, Z, order = tensors["C.weight"], tensors["Z.weight"], tensors["order"].long()
    W = torch.empty(linear.out_features, linear.in_features)
    W[:, order] = C @ torch.cat([torch.eye(len(Z)), Z], dim=1)
    return W


def bare_layer(kind: Any, shape: tuple[int, int], rank: int, count: int, **more: Any) -> Any:
    """A layer of vLLM with the sizes that its constructor would set, without process groups."""
    layer: Any = kind.__new__(kind)
    nn.Module.__init__(layer)
    sizes = {"output_size": shape[0], "input_size": shape[1], "has_bias": False}
    for name, value in (sizes | {"tp_rank": rank, "tp_size": count} | more).items():
        setattr(layer, name, value)
    return layer


def loaded(layer: Any, linears: list[LinearRecord], tensors: list[Tensors]) -> LowRankLinearMethod:
    """The method of `layer`, after all tensors have arrived."""
    names = [linear.name for linear in linears]
    method = LowRankLinearMethod(names, linears, Widths(), transposed=False)
    method.create_weights(layer, 0, [], 0, 0, torch.float32, weight_loader=layer.weight_loader)
    shards = ("q", "k", "v") if isinstance(layer, QKVParallelLinear) else (0, 1)
    for shard, part in zip(shards, tensors, strict=False):
        for path, tensor in part.items():
            door = layer
            for name in path.split("."):
                door = getattr(door, name)
            door.weight_loader(door, tensor, *((shard,) if len(tensors) > 1 else ()))
    method.process_weights_after_loading(layer)
    for module in layer.modules():
        if isinstance(module, Matrix):
            module.quant_method.process_weights_after_loading(module)
    return method


LOW_RANK = [("factored", 3), ("pivoted", 3)]


@pytest.mark.parametrize("up", [*LOW_RANK, ("narrowed", None)])
@pytest.mark.parametrize("gate", [*LOW_RANK, ("narrowed", None)])
@pytest.mark.parametrize("count", [1, 2])
def test_gate_and_up(gate: Any, up: Any, count: int) -> None:
    """Narrowed from 16 to 12 channels; two factored ones share one product."""
    linears = [record("gate", gate[0], (WIDTH, HIDDEN), gate[1]),
               record("up", up[0], (WIDTH, HIDDEN), up[1])]  # fmt: skip
    tensors, x = [random_tensors(linear) for linear in linears], torch.randn(5, HIDDEN)
    outputs = []
    for rank in range(count):
        layer = bare_layer(
            MergedColumnParallelLinear, (32, HIDDEN), rank, count, output_sizes=[16, 16]
        )
        outputs.append(loaded(layer, linears, tensors).apply(layer, x))
        assert layer.output_sizes == [WIDTH, WIDTH]
        assert hasattr(layer, "joint") == (gate[0] == up[0] == "factored")
    for index, (linear, part) in enumerate(zip(linears, tensors, strict=True)):
        whole = torch.cat([output.chunk(2, -1)[index] for output in outputs], -1)
        torch.testing.assert_close(whole, x @ product(linear, part).T)


@pytest.mark.parametrize(("form", "rank_of"), LOW_RANK)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_gate_and_up_that_are_stored_as_one(form: str, rank_of: int, count: int) -> None:
    linear = record("gate_up", form, (2 * WIDTH, HIDDEN), rank_of)
    tensors, x = random_tensors(linear), torch.randn(5, HIDDEN)
    halves = []
    for rank in range(count):
        layer = bare_layer(
            MergedColumnParallelLinear, (36, HIDDEN), rank, count, output_sizes=[18, 18]
        )
        halves.append(loaded(layer, [linear], [tensors]).apply(layer, x).chunk(2, -1))
    whole = torch.cat([half[0] for half in halves] + [half[1] for half in halves], -1)
    torch.testing.assert_close(whole, x @ product(linear, tensors).T)


@pytest.mark.parametrize(("form", "rank_of"), [*LOW_RANK, ("narrowed", None)])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_down(form: str, rank_of: int | None, count: int) -> None:
    """Processes hold a part of the inputs each, and their outputs are added."""
    linear = record("down", form, (HIDDEN, WIDTH), rank_of)
    tensors, x = random_tensors(linear), torch.randn(5, WIDTH)
    total = torch.zeros(5, HIDDEN)
    for rank in range(count):
        layer = bare_layer(RowParallelLinear, (HIDDEN, 16), rank, count)
        method = loaded(layer, [linear], [tensors])
        total += method.apply(layer, x.chunk(count, -1)[rank].contiguous())
    torch.testing.assert_close(total, x @ product(linear, tensors).T)


def test_keys_that_several_processes_share() -> None:
    """Four heads of queries and two of keys and values, in four processes."""
    size = 4
    linears = [
        record("q", "factored", (4 * size, HIDDEN), 3),
        record("k", "pivoted", (2 * size, HIDDEN), 3),
        record("v", "factored", (2 * size, HIDDEN), 2),
    ]
    heads = {"head_size": size, "v_head_size": size, "total_num_heads": 4, "total_num_kv_heads": 2}
    heads |= {"num_heads": 1, "num_kv_heads": 1, "num_kv_head_replicas": 2}
    tensors, x = [random_tensors(linear) for linear in linears], torch.randn(5, HIDDEN)
    q, k, v = (x @ product(*pair).T for pair in zip(linears, tensors, strict=True))
    for rank in range(4):
        layer = bare_layer(QKVParallelLinear, (16 * size, HIDDEN), rank, 4, **heads)
        output = loaded(layer, linears, tensors).apply(layer, x)
        heads_of = ((q, rank), (k, rank // 2), (v, rank // 2))
        expected = [y.narrow(-1, head * size, size) for y, head in heads_of]
        torch.testing.assert_close(output, torch.cat(expected, -1))


@pytest.mark.parametrize(
    ("shape", "count", "problem"),
    [
        ((HIDDEN, 13), 2, "mlp.down: its 13 channels do not divide by tensor_parallel_size=2"),
        ((HIDDEN, 20), 1, r"mlp.down: shape \[8, 20\] in config.json does not fit into \[8, 16\]"),
        ((6, WIDTH), 1, r"mlp.down: shape \[6, 12\] in config.json does not fit into \[8, 16\]"),
    ],
)
def test_shapes_that_do_not_fit(shape: tuple[int, int], count: int, problem: str) -> None:
    layer = bare_layer(RowParallelLinear, (HIDDEN, 16), 0, count)
    with pytest.raises(CheckpointError, match=problem):
        loaded(layer, [record("down", "narrowed", shape)], [])
