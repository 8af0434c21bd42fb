"""What `factorize` costs as models grow: seconds and peak memory by stage, exponents, predictions.

    python benchmarks/scale.py OUT [--sizes 135M,360M] [--methods auto,nystrom,whitened]
                               [--ways memory,streaming] [--growth width,depth,tokens]
                               [--blocks N] [--samples 16] [--length 512] [--device cpu]

Models are llamas with random weights; 3B and 8B are some of their blocks. Each case is a process
of its own, whose costs are the `stages` of its lrcompress.json. OUT/scale.json keeps finished
cases, so that further calls add to them, and OUT/scale.md shows all; each device needs its own OUT.
CPU seconds change less than wall seconds while other programs run. Predictions are marked as
such: the measured cost of a stage times the ratio of its operations, or operations over the speed
of a GPU.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from scipy import stats
from streaming import byte_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM

# bytes of a number in float32 and in float64
FLOAT32, FLOAT64 = 4, 8
# shares of the channels at which narrowing and low rank are combined, and all channels
WIDTH_SHARES = (1.0, 0.85, 0.7, 0.55, 0.4)


@dataclass(frozen=True)
class Shape:
    """A llama. `inner` is the width inside an FFN; `experts` is 0 for a dense model."""

    width: int
    inner: int
    heads: int
    key_value_heads: int
    blocks: int
    vocabulary: int
    experts: int = 0

    @property
    def attention_parameters(self) -> int:
        keys = self.width * self.key_value_heads // self.heads
        return 2 * self.width**2 + 2 * self.width * keys

    @property
    def block_parameters(self) -> int:
        return self.attention_parameters + 3 * self.width * self.inner * max(self.experts, 1)

    @property
    def parameters(self) -> int:
        return self.blocks * self.block_parameters + self.width * self.vocabulary

    def moment_bytes(self) -> int:
        """Of one block: float64 for inputs, float32 for gradients."""
        inputs, gradients = self.width**2 + self.inner**2, 2 * self.inner**2 + self.width**2
        return (FLOAT64 * inputs + FLOAT32 * gradients) * max(self.experts, 1)


WHOLE = {
    "135M": Shape(576, 1536, 9, 3, 30, 49152),
    "360M": Shape(960, 2560, 15, 5, 32, 49152),
    "1.2B": Shape(2048, 8192, 32, 8, 16, 128256),
    "3B": Shape(3072, 8192, 24, 8, 28, 128256),
    "8B": Shape(4096, 14336, 32, 8, 32, 128256),
    "70B": Shape(8192, 28672, 64, 8, 80, 128256),
    "moe": Shape(512, 704, 8, 8, 6, 49152, experts=8),
    "tiny": Shape(64, 192, 4, 4, 2, 512),
}
# blocks that are measured of models that do not fit
SOME_BLOCKS = {"3B": 3, "8B": 2}
GROWTH = {
    "width": (384, 576, 768, 1152, 1536),
    "depth": (2, 4, 8, 16),
    "tokens": (4, 8, 16, 32),
}
SMALL = Shape(576, 1536, 9, 3, 2, 8192)


@dataclass(frozen=True)
class Case:
    """A run of `factorize` on `samples` of `length` tokens, `gradients` of them with gradients."""

    name: str
    shape: Shape
    method: str = "auto"
    way: str = "memory"
    samples: int = 16
    gradients: int = 4
    length: int = 512
    device: str = "cpu"

    @property
    def key(self) -> str:
        whole = WHOLE.get(self.name, self.shape)
        usual = SOME_BLOCKS.get(self.name, whole.blocks)
        blocks = "" if self.shape.blocks == usual else f", {self.shape.blocks} blocks"
        place = "" if self.device == "cpu" else f", {self.device}"
        return f"{self.name}, {self.method}, {self.way}, {self.samples} samples{blocks}{place}"


def cases(sizes: Iterable[str], methods: Sequence[str], ways: Sequence[str]) -> Iterator[Case]:
    """The models of `sizes` by every method and way; experts are not streamed."""
    for size in sizes:
        whole = WHOLE[size]
        shape = replace(whole, blocks=SOME_BLOCKS.get(size, whole.blocks))
        for method in methods:
            for way in ways:
                if way == "memory" or not shape.experts:
                    yield Case(size, shape, method, way)


def growth_cases(axes: Iterable[str]) -> Iterator[Case]:
    """Small models, named by the axis in which they differ and their position on it."""
    for axis in axes:
        for value in GROWTH[axis]:
            shape, samples = SMALL, 16
            if axis == "width":
                heads = value // 64
                inner = value * 8 // 3
                shape = Shape(value, inner, heads, heads, SMALL.blocks, SMALL.vocabulary)
            elif axis == "depth":
                shape = replace(SMALL, blocks=value)
            else:
                samples = value
            yield Case(f"{axis} {value}", shape, samples=samples, gradients=samples // 4)


def adapted(case: Case, arguments: argparse.Namespace) -> Case:
    """`case` on the device of the command line; cases of --growth keep their sizes."""
    case = replace(case, device=arguments.device)
    if case.name not in WHOLE:
        return case
    blocks = min(case.shape.blocks, arguments.blocks or case.shape.blocks)
    samples = arguments.samples
    return replace(
        case,
        shape=replace(case.shape, blocks=blocks),
        samples=samples,
        gradients=samples // 4,
        length=arguments.length,
    )


def save_random_model(shape: Shape, folder: Path) -> None:
    """Writes a model with random float32 weights, in shards."""
    common: dict[str, Any] = {
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.width,
        "intermediate_size": shape.inner,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.key_value_heads,
        "num_hidden_layers": shape.blocks,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
    }
    torch.manual_seed(0)
    if shape.experts:
        experts = {"moe_intermediate_size": shape.inner, "num_experts": shape.experts}
        shared = {"shared_expert_intermediate_size": shape.inner, "num_experts_per_tok": 2}
        model: Any = Qwen2MoeForCausalLM(Qwen2MoeConfig(**common, **experts, **shared))
    else:
        model = LlamaForCausalLM(LlamaConfig(**common))
    model.save_pretrained(folder, max_shard_size="2GB")
    byte_tokenizer().save_pretrained(folder)


# a process knows best what it took of a GPU
WRITE_GPU_MEMORY = """
import runpy, sys, torch
from pathlib import Path
file, *sys.argv = sys.argv[1:]
try:
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
finally:
    if torch.cuda.is_initialized():
        Path(file).write_text(str(torch.cuda.max_memory_allocated()))
"""


def measure(case: Case, folder: Path) -> dict[str, Any]:
    """The costs of `case` by stage; its model is written to `folder` unless it is there."""
    dense, out = folder / "dense", folder / f"{case.method}-{case.way}-{case.samples}"
    if not dense.is_dir():
        save_random_model(case.shape, dense)
    arguments = {
        "keep-ratio": 0.6,
        "method": case.method,
        "calibration": "pydoc",
        "num-samples": case.samples,
        "gradient-samples": case.gradients,
        "seq-len": case.length,
        "device": case.device,
        "out": out,
    }
    flags = [word for key, value in arguments.items() for word in (f"--{key}", str(value))]
    way = "--streaming" if case.way == "streaming" else "--no-streaming"
    peak = folder / "peak"
    words = ["-c", WRITE_GPU_MEMORY, str(peak), "lrcompress", "factorize", str(dense), *flags, way]
    process = subprocess.run([sys.executable, *words], check=False, capture_output=True)
    if process.returncode:
        raise SystemExit(process.stderr.decode())
    stages = json.loads((out / "lrcompress.json").read_text("utf-8"))["stages"]
    return {
        "name": case.name,
        "method": case.method,
        "way": case.way,
        "shape": vars(case.shape),
        "samples": case.samples,
        "gradients": case.gradients,
        "length": case.length,
        "threads": torch.get_num_threads(),
        "device": case.device,
        "gpu_memory": int(peak.read_text()) if peak.exists() else None,
        "stages": stages,
    }


def exponents(points: Mapping[int, Mapping[str, float]]) -> dict[str, tuple[float, float, float]]:
    """Stage -> exponent b of seconds ~ x^b with its 95 % interval, from seconds by stage at each x.

    Least squares of logarithms. Stages of less than half a second are left out: they are constant.
    """
    found: dict[str, tuple[float, float, float]] = {}
    positions = sorted(points)
    for stage in points[positions[0]]:
        seconds = [points[x].get(stage, 0.0) for x in positions]
        if len(positions) < 3 or max(seconds) < 0.5 or min(seconds) <= 0:
            continue
        fit = stats.linregress(np.log(positions), np.log(seconds))
        spread = stats.t.ppf(0.975, len(positions) - 2) * fit.stderr
        found[stage] = (float(fit.slope), float(fit.slope - spread), float(fit.slope + spread))
    return found


@dataclass(frozen=True)
class Work:
    """Operations of a stage in float32 or less, and in float64; and bytes that it has to move."""

    products: float = 0.0
    products64: float = 0.0
    bytes: float = 0.0

    @property
    def size(self) -> float:
        """For ratios of the work of one stage at two sizes."""
        return self.products + 2 * self.products64 or self.bytes


def work(shape: Shape, samples: int, gradients: int, length: int) -> dict[str, Work]:
    """The leading terms of every stage of method auto on a dense model.

    A forward pass takes 2 operations for each parameter and token, and one with gradients three
    times as many, because blocks run forward twice. Moments are symmetric: half of their products
    is computed.
    """
    d, n, blocks = shape.width, shape.inner, shape.blocks
    probes = min(6, samples // 8)
    plain = max(samples - probes - gradients, 0) * length
    inputs, outputs = d**2 + n**2, 2 * n**2 + d**2
    passes = 6 * blocks * shape.block_parameters + 4 * shape.vocabulary * d
    weights = FLOAT32 * shape.parameters
    grams = sum(6 * d**2 * s * n + 3 * d * (s * n) ** 2 for s in WIDTH_SHARES) * 2
    folds = sum((s * n) ** 3 / 3 + 2 * d * (s * n) ** 2 for s in WIDTH_SHARES[1:])
    moments = shape.moment_bytes() * blocks
    return {
        "loading": Work(bytes=weights),
        "second_moments": Work(
            plain * blocks * (2 * shape.block_parameters + inputs), bytes=moments * plain / length
        ),
        "gradients": Work(
            gradients * length * (passes + blocks * (inputs + outputs)), bytes=moments * gradients
        ),
        "choices_of_channels": Work(products64=blocks * (6 * n**3 + 4 * d * n**2)),
        "choices_of_ranks": Work(products64=blocks * (grams + folds + 20 * d**3)),
        "probes": Work(probes * length * passes, blocks * (n**3 / 3 + 2 * d * n**2)),
        "factors": Work(products64=blocks * (grams / 3 + folds / 3 + 27 * d**3)),
        "pivots": Work(products64=blocks * 6 * d**2 * n),
        "saving": Work(bytes=weights),
    }


def predicted(row: Mapping[str, Any], whole: Shape) -> dict[str, float]:
    """PREDICTION: CPU seconds by stage of `whole` on the machine that measured `row`."""
    amount = (row["samples"], row["gradients"], row["length"])
    measured, asked = work(Shape(**row["shape"]), *amount), work(whole, *amount)
    return {
        stage: cost["cpu_seconds"] * asked[stage].size / measured[stage].size
        for stage, cost in row["stages"].items()
        if stage in asked and measured[stage].size
    }


@dataclass(frozen=True)
class GPU:
    """Operations per second of products and of float64, and bytes per second, as reached."""

    flops: float
    flops64: float
    bandwidth: float

    def seconds(self, stage: Work) -> float:
        arithmetic = stage.products / self.flops + stage.products64 / self.flops64
        return max(arithmetic, stage.bytes / self.bandwidth)


def stage_names(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(stage for row in rows for stage in row["stages"]))


def markdown_table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Empty where there are no rows."""
    rows = list(rows)
    if not rows:
        return ""
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def cost_table(rows: Sequence[Mapping[str, Any]], cell: Callable[[Mapping[str, Any]], str]) -> str:
    """A row for each case; `cell` makes the text of one stage's costs."""
    names = stage_names(rows)
    return markdown_table(
        ["model", "blocks", "method", "way", *(name.replace("_", " ") for name in names)],
        (
            [row["name"], str(row["shape"]["blocks"]), row["method"], row["way"]]
            + [cell(row["stages"][name]) if name in row["stages"] else "" for name in names]
            for row in rows
        ),
    )


def growth_table(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = []
    for axis in GROWTH:
        points = {
            int(row["name"].split()[1]): {s: c["cpu_seconds"] for s, c in row["stages"].items()}
            for row in rows
            if row["name"].startswith(f"{axis} ")
        }
        for stage, (slope, low, high) in exponents(points).items() if points else ():
            lines.append([axis, stage.replace("_", " "), f"{slope:.2f} ({low:.2f} to {high:.2f})"])
    return markdown_table(["grows with", "stage", "exponent of CPU seconds, 95 % interval"], lines)


def prediction_table(rows: Sequence[Mapping[str, Any]], gpu: GPU) -> str:
    """Whole models from the largest dense model that was measured in memory by auto."""
    measured = [
        r for r in rows if r["name"] in WHOLE and (r["method"], r["way"]) == ("auto", "memory")
    ]
    dense = [
        row for row in measured if not row["shape"]["experts"] and row.get("device", "cpu") == "cpu"
    ]
    if not dense:
        return ""
    largest = max(dense, key=lambda row: Shape(**row["shape"]).width)
    amount = (largest["samples"], largest["gradients"], largest["length"])
    lines = []
    for name in ("1.2B", "3B", "8B", "70B"):
        shape = WHOLE[name]
        here = predicted(largest, shape)
        longest = max(here, key=here.__getitem__)
        on_gpu = sum(gpu.seconds(stage) for stage in work(shape, *amount).values())
        moments = shape.moment_bytes()
        in_memory = FLOAT32 * shape.parameters + moments * shape.blocks
        streamed = 2 * (FLOAT32 * shape.block_parameters + moments)
        minutes = [f"{sum(here.values()) / 60:,.0f}", f"{longest} {here[longest] / 60:,.0f}"]
        memory = [f"{size / 2**30:,.0f}" for size in (in_memory, streamed)]
        lines.append([name, *minutes, f"{on_gpu / 60:,.1f}", *memory])
    titles = ["model", "CPU minutes here", "longest stage", "minutes on the GPU"]
    titles += ["GiB of weights and moments, in memory", "of two blocks and their moments"]
    source = f"From {largest['name']} with {largest['shape']['blocks']} blocks"
    return f"{source}. Nothing here was run.\n\n{markdown_table(titles, lines)}"


def report(rows: Sequence[Mapping[str, Any]], gpu: GPU) -> str:
    models = [row for row in rows if row["name"] in WHOLE]
    mib = 2**20
    parts = {
        "CPU seconds (wall seconds) by stage": cost_table(
            models, lambda cost: f"{cost['cpu_seconds']:.1f} ({cost['seconds']:.1f})"
        ),
        "Peak memory of the process by stage, MiB": cost_table(
            models, lambda cost: "" if cost["memory"] is None else f"{cost['memory'] / mib:,.0f}"
        ),
        "Growth": growth_table(rows),
        f"PREDICTION of whole models, and of a GPU with {gpu.flops:.3g} FLOP/s, {gpu.flops64:.3g} "
        f"in float64 and {gpu.bandwidth:.3g} bytes/s": prediction_table(rows, gpu),
    }
    return "\n".join(f"## {title}\n\n{text}" for title, text in parts.items() if text)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--sizes", default="135M,360M,moe", help=", ".join(WHOLE))
    parser.add_argument("--methods", default="auto,nystrom,whitened")
    parser.add_argument("--ways", default="memory,streaming")
    parser.add_argument("--growth", default="width,depth,tokens")
    parser.add_argument("--blocks", type=int, help="measure at most so many of each of --sizes")
    parser.add_argument("--samples", type=int, default=16, help="of the models of --sizes")
    parser.add_argument("--length", type=int, default=512, help="tokens of a sample")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--gpu-flops", type=float, default=300e12, help="default: a third of H100's"
    )
    parser.add_argument("--gpu-flops64", type=float, default=10e12)
    parser.add_argument("--gpu-bandwidth", type=float, default=2e12)
    arguments = parser.parse_args()
    sizes, methods, ways, axes = (
        [word for word in words.split(",") if word]
        for words in (arguments.sizes, arguments.methods, arguments.ways, arguments.growth)
    )
    gpu = GPU(arguments.gpu_flops, arguments.gpu_flops64, arguments.gpu_bandwidth)
    arguments.out.mkdir(parents=True, exist_ok=True)
    file = arguments.out / "scale.json"
    rows: dict[str, dict[str, Any]] = json.loads(file.read_text("utf-8")) if file.exists() else {}
    asked = [*cases(sizes, methods, ways), *growth_cases(axes)]
    asked = [adapted(case, arguments) for case in asked]
    missing = [case for case in asked if case.key not in rows]
    for _, group in groupby(missing, lambda case: case.shape):
        with tempfile.TemporaryDirectory(dir=arguments.out) as folder:
            for case in group:
                rows[case.key] = measure(case, Path(folder))
                total = sum(cost["cpu_seconds"] for cost in rows[case.key]["stages"].values())
                click.echo(f"{case.key}: {total:,.1f} CPU seconds")
                file.write_text(json.dumps(rows, indent=1) + "\n", "utf-8")
    (arguments.out / "scale.md").write_text(report(list(rows.values()), gpu), "utf-8")
    click.echo(report(list(rows.values()), gpu))


if __name__ == "__main__":
    main()
