"""Rank policies by their recipe names."""

from __future__ import annotations

# name -> where its class lives; strings, so that reading the names imports nothing
ALLOCATORS = {
    "uniform": "lrcompress.allocators.uniform:Uniform",
    "loss_aware": "lrcompress.allocators.loss_aware:LossAware",
}
