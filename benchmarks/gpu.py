"""What gpu.sh needs beside the commands: a model, decode by CUDA graphs, one JSON and its tables.

    python benchmarks/gpu.py model DIR --shape 7B          writes a random llama
    python benchmarks/gpu.py graphs DIR --out FILE         times decode of the models below DIR
    python benchmarks/gpu.py start OUT                     writes the machine into OUT/gpu.json
    python benchmarks/gpu.py record OUT PART ...           adds the results of a part, or its error
    python benchmarks/gpu.py table OUT/gpu.json            prints the tables of docs/results.md

Only numbers of OUT/gpu.json are in the tables: a part that did not run is not there, and one that
failed says so.
"""

from __future__ import annotations

import argparse
import inspect
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import click

RESULTS = ("bench.json", "scale.json", "graphs.json")
TIMED_OUT = (124, 137)  # exit codes of `timeout`
# passes before a graph is captured, and passes that one timing repeats
WARM_UP, CALLS = 3, 16
EAGER, GRAPH = "eager", "CUDA graph"


def write_model(folder: Path, shape: str) -> None:
    from scale import Shape, save_random_model

    shapes = {
        "7B": Shape(4096, 11008, 32, 32, 2, 32000),
        "tiny": Shape(64, 192, 4, 4, 2, 512),
    }
    save_random_model(shapes[shape], folder)


def time_decode(models: Path, arguments: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
    """Seconds of one token for each sequence, of every model below `models`, in turns.

    Gives the rows of one path and batch size at a time; what cannot be captured comes last.
    """
    import torch

    from lrcompress.benchmark.timer import run_alternating, seconds_per_call
    from lrcompress.runtime.progress import silent

    loaded = {name: load(models / name, arguments.device) for name in model_names(models)}
    device, repeats = torch.device(arguments.device), arguments.repeats
    paths = (EAGER, GRAPH) if device.type == "cuda" else (EAGER,)
    for path, batch_size in product(paths, map(int, arguments.batch_size.split(","))):
        steps, length = WARM_UP + CALLS * (repeats + 1), arguments.prompt_length
        runs = {name: decode_step(m, batch_size, length, steps) for name, m in loaded.items()}
        if path == GRAPH:
            runs = {name: captured(run) for name, run in runs.items()}
        timed = partial(seconds_per_call, device=device, calls=CALLS)
        seconds = run_alternating(runs, repeats, timed, silent, "")
        setting = {"batch_size": batch_size, "path": path}
        yield [setting | {"name": name, "seconds": values} for name, values in seconds.items()]


def model_names(folder: Path) -> list[str]:
    """The models in `folder`, the dense one first."""
    names = sorted(file.parent.name for file in folder.glob("*/config.json"))
    return sorted(names, key=lambda name: name != "dense")


def load(folder: Path, device: str) -> Any:
    """An optimized model in bfloat16."""
    from lrcompress.config import ModelSettings
    from lrcompress.layers.optimize import optimize
    from lrcompress.models.loading import load_model

    settings = ModelSettings(source=str(folder), device=device, dtype="bfloat16")
    model = load_model(settings)[0].eval()
    optimize(model)
    return model


def decode_step(model: Any, batch_size: int, length: int, steps: int) -> Callable[[], None]:
    """A call that adds a token to each sequence, at most `steps` times; tensors keep their places.

    The cache has its full size from the start, as a CUDA graph needs it.
    """
    import torch
    from transformers import StaticCache

    from lrcompress.benchmark.throughput import random_tokens

    cache = StaticCache(config=model.config, max_cache_len=length + steps)
    names = inspect.signature(model.forward).parameters
    keywords = {"cache" if "cache" in names else "past_key_values": cache, "use_cache": True}
    prompt = random_tokens([model], batch_size, length).to(model.device)
    token = prompt[:, -1:].clone()

    @torch.no_grad()
    def step() -> None:
        token.copy_(model(input_ids=token, **keywords).logits[:, -1:].argmax(-1))

    with torch.no_grad():
        model(input_ids=prompt, logits_to_keep=1, **keywords)
    return step


def captured(step: Callable[[], None]) -> Callable[[], None]:
    """`step` as a CUDA graph."""
    import torch

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    replay: Callable[[], None] = graph.replay
    return replay


def machine(device: str) -> dict[str, Any]:
    import torch

    from lrcompress.benchmark.timer import describe_machine
    from lrcompress.runtime.packages import versions

    about = describe_machine(torch.device(device)) | versions()
    if device == "cuda":
        about |= {"memory": torch.cuda.get_device_properties(0).total_memory}
        about |= {"cuda": torch.version.cuda}
    return about


def result_of(folder: Path, log: Path, status: int, limit: int) -> dict[str, Any]:
    """The error of a part, None where it has none, and what the part wrote, by file."""
    files = [file for name in RESULTS for file in sorted(folder.rglob(name))]
    results = {str(file.relative_to(folder)): json.loads(file.read_text("utf-8")) for file in files}
    for file in sorted(folder.glob("*/lrcompress.json")):
        if quantized := json.loads(file.read_text("utf-8")).get("quantized"):
            results[f"{file.parent.name}/quantized"] = quantized
    error = None
    if status in TIMED_OUT:
        error = f"not finished in {limit} s"
    elif status:
        lines = [line for line in log.read_text("utf-8", "replace").splitlines() if line.strip()]
        error = lines[-1].strip() if lines else f"exit code {status}"
    return {"error": error, "results": results}


def table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def bench_table(bench: Mapping[str, Any]) -> str:
    """Every timing of a bench.json."""
    rows = []
    for timing in bench["timings"]:
        setting = ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in timing["setting"].items())
        cells = [setting.removeprefix("pass "), timing["name"], f"{1000 * timing['median']:.4g}"]
        if speedup := timing.get("speedup"):
            spread = f"{speedup['ratio']:.2f} ({speedup['low']:.2f}–{speedup['high']:.2f})"
            cells += [spread, f"{speedup['ideal']:.2f}"]
        else:
            cells += ["", ""]
        peak = timing["peak"]
        rows.append([*cells, "" if peak is None else f"{peak / 2**20:,.0f}"])
    titles = ["pass", "model", "ms", "speed-up", "ideal", "peak MiB"]
    title = Path(bench["title"]).name  # a model is named by its folder, not by where that is
    return f"{title}\n\n{table(titles, rows)}"


def graph_table(timings: Sequence[Mapping[str, Any]]) -> str:
    """Decode by batch size and path, and the speed-up over dense on the same path."""
    dense = {
        (row["batch_size"], row["path"]): row["seconds"]
        for row in timings
        if row["name"] == "dense"
    }
    rows = []
    for row in timings:
        baseline = dense[row["batch_size"], row["path"]]
        ratio = median(d / s for d, s in zip(baseline, row["seconds"], strict=True))
        cells = [str(row["batch_size"]), row["path"], row["name"]]
        speedup = "" if row["name"] == "dense" else f"{ratio:.2f}"
        rows.append([*cells, f"{1000 * median(row['seconds']):.4g}", speedup])
    return table(["batch", "path", "model", "ms a token", "speed-up"], rows)


def scale_table(cases: Mapping[str, Any]) -> str:
    """Seconds by stage of each case, and its peak memory on the device."""
    parts = []
    for name, case in cases.items():
        seconds = {s.replace("_", " "): cost["seconds"] for s, cost in case["stages"].items()}
        rows = [[stage, f"{cost:,.1f}"] for stage, cost in seconds.items()]
        rows.append(["all", f"{sum(seconds.values()):,.1f}"])
        peak = case["gpu_memory"]
        memory = "" if peak is None else f", at most {peak / 2**30:.1f} GiB of the GPU"
        count = case["shape"]["blocks"]
        blocks = "1 block" if count == 1 else f"{count} blocks"
        parts.append(f"{name}, {blocks}{memory}\n\n{table(['stage', 'seconds'], rows)}")
    return "\n\n".join(parts)


def quantized_line(name: str, quantized: Mapping[str, Any]) -> str:
    before, after = (quantized[key] / 1e6 for key in ("bytes_before", "bytes"))
    return f"{name}: {quantized['weights']}, {before:,.1f} MB before, {after:,.1f} MB after"


def texts(results: Mapping[str, Any]) -> Iterator[str]:
    """Each result of a part as Markdown."""
    for file, content in results.items():
        folder, _, name = file.rpartition("/")
        if name == "bench.json":
            yield bench_table(content)
        elif name == "graphs.json":
            yield graph_table(content)
        elif name == "scale.json":
            yield scale_table(content)
        else:
            yield quantized_line(folder, content)


def report(content: Mapping[str, Any]) -> str:
    """All parts in `content` (gpu.json) as Markdown; says of each that failed why."""
    about = content["machine"]
    sections = [
        f"## {about['device']}\n\ntorch {about['torch']}, lrcompress {about['lrcompress']}."
    ]
    for name, part in content["parts"].items():
        sections.append(f"### {name.replace('_', ' ')}\n\n{part['seconds']:,} s")
        if part["error"]:
            sections.append(f"**Failed**: {part['error']}")
        sections += texts(part["results"])
    return "\n\n".join(sections) + "\n"


def read(out: Path) -> dict[str, Any]:
    file = out / "gpu.json"
    content: dict[str, Any] = json.loads(file.read_text("utf-8")) if file.exists() else {}
    return content


def write(out: Path, content: Mapping[str, Any]) -> None:
    (out / "gpu.json").write_text(json.dumps(content, indent=1) + "\n", "utf-8")


def run_model(arguments: argparse.Namespace) -> None:
    write_model(arguments.folder, arguments.shape)


def run_graphs(arguments: argparse.Namespace) -> None:
    finished: list[dict[str, Any]] = []
    for rows in time_decode(arguments.folder, arguments):
        finished += rows
        arguments.out.write_text(json.dumps(finished, indent=1) + "\n", "utf-8")


def run_start(arguments: argparse.Namespace) -> None:
    parts = read(arguments.out).get("parts", {})
    write(arguments.out, {"machine": machine(arguments.device), "parts": parts})


def run_record(arguments: argparse.Namespace) -> None:
    content = read(arguments.out)
    result = result_of(arguments.folder, arguments.log, arguments.status, arguments.limit)
    content["parts"][arguments.part] = {
        "seconds": arguments.seconds,
        "limit": arguments.limit,
    } | result
    write(arguments.out, content)
    click.echo(f"{arguments.part}: {arguments.seconds} s, {result['error'] or 'finished'}")


def run_table(arguments: argparse.Namespace) -> None:
    click.echo(report(json.loads(arguments.file.read_text("utf-8"))), nl=False)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    commands = top.add_subparsers(required=True)
    model = commands.add_parser("model")
    model.add_argument("folder", type=Path)
    model.add_argument("--shape", default="7B", choices=("7B", "tiny"))
    model.set_defaults(run=run_model)
    graphs = commands.add_parser("graphs")
    graphs.add_argument("folder", type=Path)
    graphs.add_argument("--out", type=Path, required=True)
    graphs.add_argument("--device", default="cuda")
    graphs.add_argument("--batch-size", default="1,8,64")
    graphs.add_argument("--prompt-length", type=int, default=512)
    graphs.add_argument("--repeats", type=int, default=7)
    graphs.set_defaults(run=run_graphs)
    start = commands.add_parser("start")
    start.add_argument("out", type=Path)
    start.add_argument("--device", default="cuda")
    start.set_defaults(run=run_start)
    record = commands.add_parser("record")
    record.add_argument("out", type=Path)
    record.add_argument("part")
    for name in ("--folder", "--log"):
        record.add_argument(name, type=Path, required=True)
    for name in ("--status", "--seconds", "--limit"):
        record.add_argument(name, type=int, required=True)
    record.set_defaults(run=run_record)
    show = commands.add_parser("table")
    show.add_argument("file", type=Path)
    show.set_defaults(run=run_table)
    return top


def main() -> None:
    arguments = parser().parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
