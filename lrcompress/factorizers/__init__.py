"""Compression methods by their recipe names."""

from __future__ import annotations

# name -> where its class lives; strings, so that reading the names imports no torch
FACTORIZERS = {
    "svd": "lrcompress.factorizers.svd:PlainSVD",
    "asvd": "lrcompress.factorizers.svd:DiagonalSVD",
    "whitened": "lrcompress.factorizers.svd:WhitenedSVD",
    "fisher": "lrcompress.factorizers.svd:FisherSVD",
    "nystrom": "lrcompress.factorizers.nystrom:Nystrom",
    "auto": "lrcompress.factorizers.nystrom:Auto",
}
# methods whose errors estimate the rise of the loss, so that they compare across linears
ESTIMATE_LOSS = ("fisher", "nystrom", "auto")
