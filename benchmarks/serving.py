"""Decode and prefill in vLLM of compressed FFNs over dense ones, at width 2048: two random blocks.

    .venv/bin/python benchmarks/serving.py write OUT           # in the environment of lrcompress
    .venv-serve/bin/python benchmarks/serving.py time OUT      # in that of vLLM (make test-serve)

Each form gets `--keep` of the dense FFN's parameters. Every model has a process of its own, in
bfloat16, with torch.compile where `--compile` is given, and takes its turn in each round, from
another start. Decode is the time of 65 new tokens less that of one. The ratio is the median of
those of the rounds. The overhead of a form is what one of its linears costs beside its parameters,
as a number of parameters of the narrowed model: the unit of `overheads` in
lrcompress/methods/targets.py. Results go to OUT/serving.json and to the terminal.
`write --hidden 256 --width 512` and `time --rounds 1` is a dry run of a minute.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import random
import statistics
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import click

VOCABULARY, BLOCKS, HEAD = 512, 2, 64
PROMPT, NEW_TOKENS = 16, 64
# name -> batch, tokens of each prompt, new tokens
WORKLOADS = {
    "decode, batch 1": (1, PROMPT, 1 + NEW_TOKENS),
    "decode, batch 32": (32, PROMPT, 1 + NEW_TOKENS),
    "prefill, 1 x 512": (1, 512, 1),
    "prefill, 32 x 64": (32, 64, 1),
}
FORMS = ("dense", "narrowed", "factored", "pivoted")


def rank(form: str, keep: float, hidden: int, width: int) -> int:
    """The rank, a multiple of 16, with which a matrix keeps `keep` of its parameters."""
    total, product = hidden + width, keep * hidden * width
    exact = (
        product / total if form == "factored" else (total - math.sqrt(total**2 - 4 * product)) / 2
    )
    return round(exact / 16) * 16


def records(form: str, keep: float, hidden: int, width: int) -> dict[str, dict[str, Any]]:
    """The records of all blocks."""
    more = {} if form == "narrowed" else {"rank": rank(form, keep, hidden, width)}
    if form == "narrowed":
        width = round(keep * width / 32) * 32
    shapes = {
        "gate_proj": [width, hidden],
        "up_proj": [width, hidden],
        "down_proj": [hidden, width],
    }
    return {
        f"model.layers.{block}.mlp.{name}": {"form": form, "shape": shape} | more
        for block in range(BLOCKS)
        for name, shape in shapes.items()
    }


def parameters(record: dict[str, Any]) -> int:
    """Of a linear."""
    (rows, columns), r = record["shape"], record.get("rank")
    if record["form"] == "factored":
        return int(r * (rows + columns))
    return int(r * (rows + columns - r) if r else rows * columns)


def write(out: Path, keep: float, hidden: int, width: int) -> None:
    """Saves a random llama for each form, and the parameters of its FFN linears."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    import lrcompress
    from lrcompress.layers.lowrank import PivotedLinear, rebuild

    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=width,
        num_hidden_layers=BLOCKS,
        num_attention_heads=hidden // HEAD,
        num_key_value_heads=max(1, hidden // HEAD // 4),
        vocab_size=VOCABULARY,
        max_position_embeddings=1024,
    )
    sizes = {"dense": 3 * BLOCKS * hidden * width}
    for form in FORMS:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        if form != "dense":
            changed = records(form, keep, hidden, width)
            sizes[form] = sum(map(parameters, changed.values()))
            rebuild(model, changed)
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.detach().normal_(0, 0.02)
            if isinstance(module, PivotedLinear):
                module.order.copy_(torch.randperm(module.in_features))
        lrcompress.save(model, out / form)
    (out / "sizes.json").write_text(json.dumps(sizes))


def serve(folder: str, threads: int, compiled: bool, connection: Connection) -> None:
    """Answers (batch, prompt length, new tokens) with seconds, until it is told None."""
    os.environ |= {
        "OMP_NUM_THREADS": str(threads),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
    }
    from vllm import LLM

    llm = LLM(
        folder,
        dtype="bfloat16",
        enable_prefix_caching=False,
        enforce_eager=not compiled,
        max_model_len=1024,
        max_num_batched_tokens=4096,
        max_num_seqs=32,
        skip_tokenizer_init=True,
    )
    connection.send("ready")
    while workload := connection.recv():
        connection.send(seconds(llm, *workload))


def seconds(llm: Any, batch: int, length: int, new_tokens: int) -> float:
    """The time to generate from random prompts."""
    from vllm import SamplingParams

    prompts = [
        {"prompt_token_ids": random.choices(range(VOCABULARY), k=length)} for _ in range(batch)
    ]
    parameters = SamplingParams(
        max_tokens=new_tokens,
        min_tokens=new_tokens,
        ignore_eos=True,
        temperature=0,
        detokenize=False,
    )
    start = time.perf_counter()
    llm.generate(prompts, parameters, use_tqdm=False)
    return time.perf_counter() - start


def ask(connection: Connection, workload: tuple[int, int, int]) -> float:
    connection.send(workload)
    return float(connection.recv())


def tokens_per_second(connection: Connection, workload: tuple[int, int, int]) -> float:
    batch, length, new_tokens = workload
    taken = ask(connection, workload)
    if new_tokens == 1:
        return batch * length / taken
    return batch * (new_tokens - 1) / (taken - ask(connection, (batch, length, 1)))


def measure(
    out: Path, rounds: int, threads: int, compiled: bool
) -> dict[str, dict[str, list[float]]]:
    """Workload -> form -> tokens per second of each round; written to OUT after each."""
    context = multiprocessing.get_context("spawn")
    connections: dict[str, Connection] = {}
    for form in FORMS:
        connections[form], end = context.Pipe()
        arguments = (str(out / form), threads, compiled, end)
        context.Process(target=serve, args=arguments, daemon=True).start()
        end.close()  # so that `recv` ends where the process does
        connections[form].recv()
    speeds: dict[str, dict[str, list[float]]] = {
        name: {form: [] for form in FORMS} for name in WORKLOADS
    }
    for turn in range(-1, rounds):  # the first round warms up
        order = FORMS[turn % len(FORMS) :] + FORMS[: turn % len(FORMS)]
        for name, workload in WORKLOADS.items():
            for form in order:
                speed = tokens_per_second(connections[form], workload)
                if turn >= 0:
                    speeds[name][form].append(speed)
        (out / "serving.json").write_text(json.dumps(speeds, indent=2))
    for connection in connections.values():
        connection.send(None)
    return speeds


def table(speeds: dict[str, dict[str, list[float]]], sizes: dict[str, int]) -> str:
    lines = ["| workload | form | tokens/s | over dense | overhead |", "|---|---|---|---|---|"]
    for name, forms in speeds.items():
        for form, values in forms.items():
            ratios = over_dense(form, forms)
            cost = overhead(form, forms, sizes)
            shown = "" if cost is None else f"{cost:,.0f}"
            lines.append(f"| {name} | {form} | {spread(values)} | {spread(ratios)} | {shown} |")
    return "\n".join(lines)


def over_dense(form: str, speeds: dict[str, list[float]]) -> list[float]:
    """The ratio of each round."""
    return [value / dense for value, dense in zip(speeds[form], speeds["dense"], strict=True)]


def overhead(form: str, speeds: dict[str, list[float]], sizes: dict[str, int]) -> float | None:
    """What a linear costs beside its parameters, in parameters.

    The narrowed model against the dense one tells the time of a parameter; None where it is no
    faster, and for these two forms.
    """
    times = {name: 1 / statistics.median(over_dense(name, speeds)) for name in speeds}
    if form in ("dense", "narrowed") or times["narrowed"] >= times["dense"]:
        return None
    per_parameter = (times["dense"] - times["narrowed"]) / (sizes["dense"] - sizes["narrowed"])
    more = (times[form] - times["narrowed"]) / per_parameter - (sizes[form] - sizes["narrowed"])
    return more / (3 * BLOCKS)


def spread(values: list[float]) -> str:
    """Median, smallest and largest value."""
    return f"{statistics.median(values):.4g} ({min(values):.4g} to {max(values):.4g})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("step", choices=("write", "time"))
    parser.add_argument("out", type=Path)
    parser.add_argument("--keep", type=float, default=0.6)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--width", type=int, default=5632)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    if options.step == "write":
        write(options.out, options.keep, options.hidden, options.width)
        return
    speeds = measure(options.out, options.rounds, options.threads, options.compile)
    click.echo(table(speeds, json.loads((options.out / "sizes.json").read_text())))


if __name__ == "__main__":
    main()
