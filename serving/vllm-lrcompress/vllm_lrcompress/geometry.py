"""The linears of the checkpoint that one layer of vLLM holds, with their sizes.

vLLM joins linears that read the same input (gate and up, or query, key and value) in one layer;
some families store them joined. A narrowed linear is smaller than the layer was made for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)

from vllm_lrcompress.records import INTACT, CheckpointError, LinearRecord
from vllm_lrcompress.shards import Shard, input_shard, output_shard


@dataclass(frozen=True)
class Linear:
    """One linear of the checkpoint, with its sizes over all processes.

    `dense_blocks` and `dense_in` are those of the layer as vLLM made it. There are several blocks
    where linears are stored as one.
    """

    name: str
    record: LinearRecord | None
    dense_blocks: tuple[int, ...]
    dense_in: int
    shard: Shard

    @property
    def out_features(self) -> int:
        return self.record.out_features if self.record else sum(self.dense_blocks)

    @property
    def in_features(self) -> int:
        return self.record.in_features if self.record else self.dense_in

    @property
    def blocks(self) -> tuple[int, ...]:
        return _blocks(self.out_features, self.dense_blocks)

    @property
    def is_low_rank(self) -> bool:
        return self.record is not None and self.record.rank is not None


def linears_of(
    layer: Any, names: Sequence[str], records: Sequence[LinearRecord | None]
) -> list[Linear]:
    """The linears `names` of a new layer, in its order of outputs.

    Raises CheckpointError where a record does not fit the layer or tensor parallelism.
    """
    sizes = _dense_outputs(layer)
    groups = [tuple(sizes)] if len(names) == 1 else [(size,) for size in sizes]
    return [
        Linear(name, record, dense, layer.input_size, _shard(layer, name, record, dense, index))
        for index, (name, record, dense) in enumerate(zip(names, records, groups, strict=True))
    ]


def _dense_outputs(layer: Any) -> list[int]:
    if isinstance(layer, QKVParallelLinear):
        heads, groups = layer.total_num_heads, layer.total_num_kv_heads
        return [heads * layer.head_size, groups * layer.head_size, groups * layer.v_head_size]
    return list(getattr(layer, "output_sizes", [layer.output_size]))


def _blocks(out_features: int, dense: tuple[int, ...]) -> tuple[int, ...]:
    """Linears that are stored as one are equally narrow."""
    return dense if out_features == sum(dense) else (out_features // len(dense),) * len(dense)


def _shard(
    layer: Any, name: str, record: LinearRecord | None, dense: tuple[int, ...], index: int
) -> Shard:
    shape = (record.out_features, record.in_features) if record else (sum(dense), layer.input_size)
    _check_fit(layer, name, shape, (sum(dense), layer.input_size))
    if isinstance(layer, RowParallelLinear):
        _check_divides(layer, name, shape[1])
        return input_shard(shape, layer.tp_rank, layer.tp_size)
    # where there are fewer keys than processes, some have the same
    copies = getattr(layer, "num_kv_head_replicas", 1) if index else 1
    blocks = _blocks(shape[0], dense)
    for block in blocks:
        _check_divides(layer, name, block * copies)
    return output_shard(blocks, shape[1], layer.tp_rank // copies, layer.tp_size // copies)


def _check_fit(layer: Any, name: str, shape: tuple[int, int], dense: tuple[int, int]) -> None:
    """Only the inner side of an FFN may be narrower than in the dense model."""
    fixed = {0, 1} - _inner_sides(layer)
    too_large = any(size > limit for size, limit in zip(shape, dense, strict=True))
    if too_large or any(shape[side] != dense[side] for side in fixed):
        raise CheckpointError(
            f"{name}: shape {list(shape)} in config.json does not fit into {list(dense)} of the "
            f"model: {INTACT}"
        )


def _inner_sides(layer: Any) -> set[int]:
    """Which of (out, in) may be the inner side of an FFN."""
    if isinstance(layer, QKVParallelLinear):
        return set()
    if isinstance(layer, RowParallelLinear):
        return {1}
    return {0} if isinstance(layer, ColumnParallelLinear) else {0, 1}


def _check_divides(layer: Any, name: str, channels: int) -> None:
    if channels % layer.tp_size:
        raise CheckpointError(
            f"{name}: its {channels} channels do not divide by tensor_parallel_size="
            f"{layer.tp_size}: serve with a size that divides all widths, or factorize with "
            f"--rank-multiple {layer.tp_size * 8}"
        )


class Widths:
    """The width of each FFN, which all of its linears have to agree about."""

    def __init__(self) -> None:
        self.known: dict[tuple[str, int], tuple[str, int]] = {}

    def check(self, layer: Any, linears: Sequence[Linear]) -> None:
        """Compares a new layer with those beside it.

        Linears of one FFN have one parent and, in the dense model, one width.
        """
        for linear in linears:
            parent = linear.name.rpartition(".")[0]
            for dense, width in _inner_widths(layer, linear):
                other, known = self.known.setdefault((parent, dense), (linear.name, width))
                if known != width:
                    raise CheckpointError(
                        f"{linear.name}: its {width} channels are not the {known} of {other}: "
                        f"{INTACT}"
                    )


def _inner_widths(layer: Any, linear: Linear) -> Iterator[tuple[int, int]]:
    """The width of the dense layer, and that of `linear`."""
    sides = _inner_sides(layer)
    is_known = len(sides) == 1  # of a replicated layer, only a narrowed side is an inner one
    if 0 in sides:
        for dense, block in zip(linear.dense_blocks, linear.blocks, strict=True):
            if is_known or dense != block:
                yield dense, block
    if 1 in sides and (is_known or linear.dense_in != linear.in_features):
        yield linear.dense_in, linear.in_features


def resize(layer: Any, linears: Sequence[Linear]) -> None:
    """Makes `layer` as narrow as its linears; its bias and its loader follow these sizes."""
    if isinstance(layer, QKVParallelLinear):
        return
    layer.input_size = linears[0].in_features
    if isinstance(layer, RowParallelLinear):
        layer.input_size_per_partition = linears[0].shard.in_features
        return
    sizes = [block for linear in linears for block in linear.blocks]
    layer.output_size = sum(sizes)
    layer.output_partition_sizes = [size // layer.tp_size for size in sizes]
    layer.output_size_per_partition = sum(layer.output_partition_sizes)
    if hasattr(layer, "output_sizes"):
        layer.output_sizes = sizes
