"""Compression methods and rank policies by their recipe names.

Values are "module:Class" strings, so that reading the names imports no torch.
"""

from __future__ import annotations

METHODS = {
    "svd": "lrcompress.methods.svd:PlainSVD",
    "asvd": "lrcompress.methods.svd:DiagonalSVD",
    "whitened": "lrcompress.methods.svd:WhitenedSVD",
    "fisher": "lrcompress.methods.svd:FisherSVD",
    "nystrom": "lrcompress.methods.nystrom:Nystrom",
    "ppm": "lrcompress.methods.ppm:PPM",
    "auto": "lrcompress.methods.auto:Auto",
}
# methods whose errors estimate the rise of the loss, so that errors of different linears compare
ESTIMATE_LOSS = ("fisher", "nystrom", "auto")
# methods that need no calibration
READ_NO_TEXT = ("svd",)

ALLOCATORS = {
    "uniform": "lrcompress.methods.allocators.uniform:Uniform",
    "loss_aware": "lrcompress.methods.allocators.loss_aware:LossAware",
}
