"""What one process of tensor parallelism keeps of a matrix (out, in)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Range = tuple[int, int]  # first index and length


@dataclass(frozen=True)
class Shard:
    """The rows and columns that a process keeps; rows are of outputs, columns of inputs."""

    rows: tuple[Range, ...]
    columns: Range

    @property
    def out_features(self) -> int:
        return sum(length for _, length in self.rows)

    @property
    def in_features(self) -> int:
        return self.columns[1]

    def take_rows(self, matrix: Tensor) -> Tensor:
        return torch.cat([matrix.narrow(0, *rows) for rows in self.rows])

    def take_columns(self, matrix: Tensor) -> Tensor:
        return matrix.narrow(1, *self.columns)


def output_shard(blocks: Sequence[int], in_features: int, rank: int, count: int) -> Shard:
    """Process `rank` of `count` keeps its part of the rows of each block, and all columns."""
    starts = [sum(blocks[:index]) for index in range(len(blocks))]
    rows = (
        (start + rank * (size // count), size // count)
        for start, size in zip(starts, blocks, strict=True)
    )
    return Shard(tuple(rows), (0, in_features))


def input_shard(shape: tuple[int, int], rank: int, count: int) -> Shard:
    """Process `rank` of `count` keeps all rows, and its part of the columns."""
    out_features, in_features = shape
    size = in_features // count
    return Shard(((0, out_features),), (rank * size, size))
