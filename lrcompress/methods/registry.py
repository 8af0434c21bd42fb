"""Compression methods and rank policies by their recipe names."""

from __future__ import annotations

# name -> where its class lives; strings, so that reading the names imports no torch
METHODS = {
    "svd": "lrcompress.methods.svd:PlainSVD",
    "asvd": "lrcompress.methods.svd:DiagonalSVD",
    "whitened": "lrcompress.methods.svd:WhitenedSVD",
    "fisher": "lrcompress.methods.svd:FisherSVD",
    "nystrom": "lrcompress.methods.nystrom:Nystrom",
    "auto": "lrcompress.methods.auto:Auto",
}
# methods whose errors estimate the rise of the loss, so that they compare across linears
ESTIMATE_LOSS = ("fisher", "nystrom", "auto")

# name -> where its class lives; strings, so that reading the names imports nothing
ALLOCATORS = {
    "uniform": "lrcompress.methods.allocators.uniform:Uniform",
    "loss_aware": "lrcompress.methods.allocators.loss_aware:LossAware",
}
