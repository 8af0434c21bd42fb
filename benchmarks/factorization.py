"""Time of one whitened factorization: lrcompress and SVD-LLM's procedure on the same matrices.

    python benchmarks/factorization.py [--out-features 4096] [--in-features 11008] [--repeats 3]

SVD-LLM (arXiv 2403.07378) computes a Cholesky factor L of the second moment in float64 and the full
SVD of W L in float32, and multiplies the right vectors by the inverse of L. Here that inverse is
computed as one of a triangular matrix, which is less work than a general inverse. Both procedures
give factors of the same rank; the script prints their squared errors in the norm of the second
moment. Runs alternate. The ratio is that of the medians, with the smallest and largest ratio of two
neighbouring runs. Exits with 1 where the ratio is below --limit.
"""

from __future__ import annotations

import argparse
import statistics
import time

import click
import torch
from torch import Tensor

from lrcompress.methods.svd import WhitenedSVD
from lrcompress.methods.types import Statistics


def svd_llm(weight: Tensor, moment: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors A (rank, in) and B (out, rank)."""
    L = torch.linalg.cholesky(moment)
    eye = torch.eye(len(L), dtype=L.dtype)
    inverse = torch.linalg.solve_triangular(L, eye, upper=False).float()
    U, S, V = torch.linalg.svd(weight @ L.float(), full_matrices=False)
    root = S[:rank].sqrt()
    return root[:, None] * (V[:rank] @ inverse), U[:, :rank] * root


def ours(weight: Tensor, moment: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The same by the method `whitened`, with its damping."""
    method = WhitenedSVD()
    factors = method.decompose(weight, Statistics(moment), rank).factors(weight, rank)
    return factors.A, factors.B


def problem(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """A random weight (out, in), and a second moment whose spectrum falls as in a real layer."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator) / columns**0.5
    inputs = torch.randn(2 * columns, columns, generator=generator)
    inputs *= torch.arange(1, columns + 1) ** -0.5
    return weight, (inputs.T @ inputs).double() / len(inputs)


def error(weight: Tensor, moment: Tensor, factors: tuple[Tensor, Tensor]) -> float:
    """Squared error of B A in the norm of the moment, over the squared norm of the weight."""
    A, B = (factor.double() for factor in factors)
    residual = weight.double() - B @ A
    energy = ((weight.double() @ moment) * weight).sum()
    return float(((residual @ moment) * residual).sum() / energy)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out-features", type=int, default=4096)
    parser.add_argument("--in-features", type=int, default=11008)
    parser.add_argument("--keep-ratio", type=float, default=0.6)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--limit", type=float, default=2.0, help="smallest ratio that passes")
    arguments = parser.parse_args()
    rows, columns = arguments.out_features, arguments.in_features
    rank = int(arguments.keep_ratio * rows * columns / (rows + columns))
    weight, moment = problem(rows, columns)
    procedures = {"svd_llm": svd_llm, "ours": ours}
    seconds: dict[str, list[float]] = {name: [] for name in procedures}
    click.echo(f"{rows} x {columns}, rank {rank}, {torch.get_num_threads()} threads")
    for repeat in range(arguments.repeats):
        for name in procedures if repeat % 2 == 0 else reversed(procedures):
            started = time.perf_counter()
            factors = procedures[name](weight, moment, rank)
            seconds[name].append(time.perf_counter() - started)
            note = ""
            if repeat == 0:
                note = f", relative squared error {error(weight, moment, factors):.6f}"
            click.echo(f"{name}: {seconds[name][-1]:.1f} s{note}")
    ratios = [slow / fast for slow, fast in zip(*seconds.values(), strict=True)]
    ratio = statistics.median(seconds["svd_llm"]) / statistics.median(seconds["ours"])
    click.echo(f"{ratio:.2f} times as fast ({min(ratios):.2f} to {max(ratios):.2f})")
    if ratio < arguments.limit:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
