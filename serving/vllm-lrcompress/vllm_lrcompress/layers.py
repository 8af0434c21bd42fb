"""The linear method with which vLLM builds, loads and runs a layer that holds changed linears."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config_or_none
from vllm.model_executor.layers.linear import LinearMethodBase, UnquantizedLinearMethod

from vllm_lrcompress.geometry import Linear, Widths, linears_of, resize
from vllm_lrcompress.products import Dense, Factored, Matrix, Pivoted, Product, SplitPivoted
from vllm_lrcompress.records import ExpectedTensors, LinearRecord

SHARD_NAMES = {None: 0, "q": 0, "k": 1, "v": 2}
Loader = Callable[..., None]


class LowRankLinearMethod(LinearMethodBase):
    """Builds, loads and runs one layer.

    `names` are the linears of the checkpoint that the layer holds, and `records` what config.json
    says of each, or None where it is dense. `widths` are those of the model so far. `transposed`
    says that vLLM transposes the matrices of changed linears while it reads them.
    """

    def __init__(
        self,
        names: Sequence[str],
        records: Sequence[LinearRecord | None],
        widths: Widths,
        transposed: bool,
    ) -> None:
        self.names, self.records = names, records
        self.widths, self.transposed = widths, transposed
        self.stock = UnquantizedLinearMethod()

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra: Any,
    ) -> None:
        self.linears = linears_of(layer, self.names, self.records)
        self.expected = [_expected(linear, layer.has_bias) for linear in self.linears]
        self.widths.check(layer, self.linears)
        resize(layer, self.linears)
        self.is_low_rank = any(linear.is_low_rank for linear in self.linears)
        layer.weight_loader = self._checked(layer.weight_loader)
        if self.is_low_rank:
            _add_products(layer, self.linears, params_dtype)
            self._add_doors(layer, params_dtype)
        else:
            shard = self.linears[0].shard
            outputs = [size for linear in self.linears for _, size in linear.shard.rows]
            extra["weight_loader"] = layer.weight_loader
            self.stock.create_weights(
                layer, shard.in_features, outputs, input_size, output_size, params_dtype, **extra
            )

    def _receive(self, path: str, tensor: Tensor, shard_id: Any) -> Tensor:
        """`tensor` as it is in the checkpoint, after its shape was checked."""
        index = SHARD_NAMES.get(shard_id, shard_id)
        if self.transposed and self.records[index] is not None:
            tensor = tensor.t()
        self.expected[index].receive(path, tuple(tensor.shape))
        return tensor

    def _checked(self, stock_loader: Loader) -> Loader:
        """vLLM's loader of weights and biases, behind a check of each tensor."""

        def load(parameter: Any, tensor: Tensor, shard_id: Any = None) -> None:
            is_block = (
                shard_id is not None and len(self.linears) == 1
            )  # the stock loader's own call
            if not is_block:
                tensor = self._receive(
                    "bias" if parameter.ndim == 1 else "weight", tensor, shard_id
                )
            stock_loader(parameter, tensor, *(() if shard_id is None else (shard_id,)))

        return load

    def _add_doors(self, layer: Any, dtype: torch.dtype) -> None:
        """Parameters without numbers, under the names of the checkpoint, that take its tensors."""
        for path in {path for expected in self.expected for path in expected.shapes} - {"bias"}:
            *parents, name = path.split(".")
            module = layer
            for parent in parents:
                if not hasattr(module, parent):
                    module.add_module(parent, nn.Module())
                module = getattr(module, parent)
            kind = torch.int32 if name == "order" else dtype
            door: Any = nn.Parameter(torch.empty(0, dtype=kind), requires_grad=False)
            door.weight_loader = self._door_loader(layer, path)
            module.register_parameter(name, door)

    def _door_loader(self, layer: Any, path: str) -> Loader:
        def load(door: nn.Parameter, tensor: Tensor, shard_id: Any = None) -> None:
            tensor = self._receive(path, tensor, shard_id)
            if path.endswith(".bias"):
                shard = () if shard_id is None else (shard_id,)
                type(layer).weight_loader(layer, layer.bias, tensor, *shard)
            else:
                layer.products[SHARD_NAMES.get(shard_id, shard_id)].load(path, tensor)

        return load

    def process_weights_after_loading(self, layer: Any) -> None:
        """Refuses missing tensors, and removes the doors; vLLM then packs each `Matrix`."""
        config = get_current_vllm_config_or_none()
        if config is None or config.load_config.load_format != "dummy":
            for expected in self.expected:
                expected.require_all()
        if not self.is_low_rank:
            self.stock.process_weights_after_loading(layer)
            return
        for product in layer.products:
            product.finish()
        for path in {path for expected in self.expected for path in expected.shapes}:
            layer._modules.pop(path.partition(".")[0], None)
        layer._parameters.pop("order", None)  # `weight` stays: it tells LoRA the device

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if not self.is_low_rank:
            return self.stock.apply(layer, x, bias)
        outputs = [
            product.expand(h) for product, h in zip(layer.products, _reduced(layer, x), strict=True)
        ]
        y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
        return y if bias is None else y + bias


def _expected(linear: Linear, has_bias: bool) -> ExpectedTensors:
    record = linear.record
    weight: dict[str, tuple[int, ...]] = {"weight": (linear.out_features, linear.in_features)}
    shapes = record.tensors() if record else weight
    bias = {record.bias if record else "bias": (linear.out_features,)} if has_bias else {}
    return ExpectedTensors(linear.name, shapes | bias)


def _add_products(layer: Any, linears: Sequence[Linear], dtype: torch.dtype) -> None:
    """Adds `layer.products`.

    Where all are factored, `layer.joint` has the rows of all their A, and one product gives them.
    """
    layer.ranks = _joint_ranks(linears)
    if layer.ranks:
        layer.joint = Matrix(sum(layer.ranks), linears[0].shard.in_features, dtype)
        starts = [sum(layer.ranks[:index]) for index in range(len(linears))]
        products: list[Product] = [
            Factored(rank, linear.shard, layer.joint, start)
            for linear, rank, start in zip(linears, layer.ranks, starts, strict=True)
        ]
    else:
        products = [_product(linear, dtype) for linear in linears]
    layer.products = nn.ModuleList(products)


def _joint_ranks(linears: Sequence[Linear]) -> list[int]:
    """The ranks of several factored linears, or nothing if there are others among them."""
    ranks = [
        linear.record.rank
        for linear in linears
        if linear.record and linear.record.rank and linear.record.form == "factored"
    ]
    return ranks if 1 < len(ranks) == len(linears) else []


def _product(linear: Linear, dtype: torch.dtype) -> Product:
    record, shard = linear.record, linear.shard
    if record is None or record.rank is None:
        return Dense(shard, dtype)
    if record.form == "factored":
        return Factored(record.rank, shard, Matrix(record.rank, shard.in_features, dtype))
    if shard.in_features < record.in_features:
        return SplitPivoted(record, shard, dtype)
    return Pivoted(record, shard, dtype)


def _reduced(layer: Any, x: Tensor) -> Sequence[Tensor]:
    if layer.ranks:
        h: Sequence[Tensor] = layer.joint(x).split(layer.ranks, dim=-1)
        return h
    return [product.reduce(x) for product in layer.products]
