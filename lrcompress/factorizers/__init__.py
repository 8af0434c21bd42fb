"""Factorization methods by their recipe names."""

from __future__ import annotations

# name -> where its class lives; strings, so that reading the names imports no torch
FACTORIZERS = {
    "svd": "lrcompress.factorizers.svd:PlainSVD",
    "asvd": "lrcompress.factorizers.svd:DiagonalSVD",
    "whitened": "lrcompress.factorizers.svd:WhitenedSVD",
}
