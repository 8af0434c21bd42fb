"""The linears of one layer as vLLM modules: low-rank, pivoted, and dense beside them.

Each is `expand(reduce(x))`. `load(path, tensor)` takes one tensor of the checkpoint, whole, and
keeps the shard of this process. Formulas: docs/checkpoint.md of lrcompress.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.model_loader.weight_utils import default_weight_loader

from vllm_lrcompress.records import LinearRecord, bad_order
from vllm_lrcompress.shards import Shard


class Matrix(nn.Module):
    """A weight (out, in) whose product is vLLM's own, which also packs it after loading."""

    weight: nn.Parameter

    def __init__(self, out_features: int, in_features: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.quant_method = UnquantizedLinearMethod()
        self.quant_method.create_weights(
            self,
            in_features,
            [out_features],
            in_features,
            out_features,
            dtype,
            weight_loader=default_weight_loader,
        )

    def fill(self, values: Tensor, first_row: int = 0) -> None:
        self.weight.data[first_row : first_row + len(values)].copy_(values)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.quant_method.apply(self, x)
        return y


class Product(nn.Module, ABC):
    """y = W x of one linear, without its bias."""

    @abstractmethod
    def load(self, path: str, tensor: Tensor) -> None: ...

    def finish(self) -> None:
        """Called once all tensors are loaded, before vLLM packs the matrices."""

    def reduce(self, x: Tensor) -> Tensor:
        return x

    @abstractmethod
    def expand(self, h: Tensor) -> Tensor: ...


class Dense(Product):
    """W itself: a dense or narrowed linear beside low-rank ones in a fused layer."""

    def __init__(self, shard: Shard, dtype: torch.dtype) -> None:
        super().__init__()
        self.shard = shard
        self.W = Matrix(shard.out_features, shard.in_features, dtype)

    def load(self, path: str, tensor: Tensor) -> None:
        self.W.fill(self.shard.take_rows(self.shard.take_columns(tensor)))

    def expand(self, h: Tensor) -> Tensor:
        return self.W(h)


class Factored(Product):
    """W = B A. A may be some rows of a matrix that several products share."""

    def __init__(self, rank: int, shard: Shard, A: Matrix, first_row: int = 0) -> None:
        super().__init__()
        self.shard, self.rank, self.first_row = shard, rank, first_row
        self.A = A
        self.B = Matrix(shard.out_features, rank, A.weight.dtype)

    def load(self, path: str, tensor: Tensor) -> None:
        if path == "A.weight":
            self.A.fill(self.shard.take_columns(tensor), self.first_row)
        elif path == "B.weight":
            self.B.fill(self.shard.take_rows(tensor))

    def reduce(self, x: Tensor) -> Tensor:
        return self.A(x)

    def expand(self, h: Tensor) -> Tensor:
        return self.B(h)


class Pivoted(Product):
    """W = C [I Z] Pᵀ; `order` has the inputs of the pivot columns first, then the others."""

    order: Tensor

    def __init__(self, record: LinearRecord, shard: Shard, dtype: torch.dtype) -> None:
        super().__init__()
        assert record.rank is not None
        self.name, self.rank, self.shard = record.name, record.rank, shard
        self.Z = Matrix(self.rank, record.in_features - self.rank, dtype)
        self.C = Matrix(shard.out_features, self.rank, dtype)
        self.register_buffer("order", torch.arange(record.in_features))

    def load(self, path: str, tensor: Tensor) -> None:
        if path == "Z.weight":
            self.Z.fill(tensor)
        elif path == "C.weight":
            self.C.fill(self.shard.take_rows(tensor))
        elif path == "order":
            self.order.copy_(checked_order(self.name, tensor))

    def reduce(self, x: Tensor) -> Tensor:
        pivots, rest = x.index_select(-1, self.order).tensor_split([self.rank], -1)
        return pivots + self.Z(rest)

    def expand(self, h: Tensor) -> Tensor:
        return self.C(h)


class SplitPivoted(Factored):
    """A pivoted linear whose inputs lie in several processes, as B = C and A = [I Z] Pᵀ.

    The pivots of a process's inputs are not its own, so the columns of A are written out.
    """

    def __init__(self, record: LinearRecord, shard: Shard, dtype: torch.dtype) -> None:
        assert record.rank is not None
        super().__init__(record.rank, shard, Matrix(record.rank, shard.in_features, dtype))
        self.name = record.name
        self.loaded: dict[str, Tensor] = {}

    def load(self, path: str, tensor: Tensor) -> None:
        if path == "C.weight":
            super().load("B.weight", tensor)
        elif path != "weight":
            self.loaded[path] = tensor.clone()

    def finish(self) -> None:
        if not self.loaded:
            return
        Z, order = self.loaded["Z.weight"], checked_order(self.name, self.loaded["order"])
        A = Z.new_empty(self.rank, len(order))
        A[:, order] = torch.cat([torch.eye(self.rank, dtype=Z.dtype, device=Z.device), Z], dim=1)
        super().load("A.weight", A)
        self.loaded.clear()


def checked_order(module: str, order: Tensor) -> Tensor:
    """`order` (in,) as int64; CheckpointError where it does not name each input once."""
    order = order.long()
    if not torch.equal(order.sort().values, torch.arange(len(order), device=order.device)):
        raise bad_order(module)
    return order
