"""The shards of tensor parallelism make up the whole matrix."""

from __future__ import annotations

import torch

from vllm_lrcompress.shards import input_shard, output_shard


def test_output_shards_take_a_part_of_each_block() -> None:
    """gate (4 rows) and up (4 rows) in one matrix: each process gets 2 rows of both."""
    matrix = torch.arange(8 * 3).view(8, 3)
    shards = [output_shard((4, 4), 3, rank, 2) for rank in range(2)]
    assert torch.equal(shards[0].take_rows(matrix), matrix[[0, 1, 4, 5]])
    assert torch.equal(shards[1].take_rows(matrix), matrix[[2, 3, 6, 7]])
    assert all((s.out_features, s.in_features) == (4, 3) for s in shards)
    assert torch.equal(shards[1].take_columns(matrix), matrix)


def test_input_shards_take_columns() -> None:
    matrix = torch.arange(2 * 6).view(2, 6)
    shards = [input_shard((2, 6), rank, 3) for rank in range(3)]
    assert torch.equal(torch.cat([s.take_columns(matrix) for s in shards], 1), matrix)
    assert all((s.out_features, s.in_features) == (2, 2) for s in shards)
    assert torch.equal(shards[2].take_rows(matrix), matrix)
