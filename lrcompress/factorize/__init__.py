"""Factorization methods by their recipe names."""

from __future__ import annotations

# name -> where its class lives; strings, so that reading the names imports no torch
FACTORIZERS = {
    "svd": "lrcompress.factorize.svd:PlainSVD",
    "asvd": "lrcompress.factorize.svd:DiagonalSVD",
    "whitened": "lrcompress.factorize.svd:WhitenedSVD",
}
