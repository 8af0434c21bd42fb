"""Perplexity and speed of GGUF files in llama.cpp, the first file being the dense model.

    python benchmarks/llama_cpp.py perplexity DENSE.gguf SMALL.gguf... --text TEXT [--windows 6]
    python benchmarks/llama_cpp.py speed DENSE.gguf SMALL.gguf... [--rounds 9]

Needs the package xllamacpp, llama.cpp's server as a Python module. Flash attention and the cache
(float16) are llama.cpp's defaults, as people serve; one thread unless --threads says more.

perplexity: the windows are those of `lrcompress eval --perplexity TEXT --context-length 1024`, cut
by the tokenizer of the first file, and exp of the mean negative log-likelihood of their scored
tokens is printed. The server gives log-probabilities of the next token alone, so it is asked once
for each token, with the tokens before it in its cache: minutes for a small model.

speed: every round times each file in turn, a prefill of --prompt tokens and --new decoding steps
after it, by the server's own clocks. Printed are medians in tokens per second, the median ratio to
the first file in the same round, and the smallest and largest ratio.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import xllamacpp

from lrcompress.data.corpora import read_corpus
from lrcompress.data.windows import Window, Windowing, corpus_windows
from lrcompress.models.loading import load_tokenizer

BIAS = 1000  # more than logits differ by
ALL = 10**6  # more than the tokens of a vocabulary


class Served:
    """A GGUF file in llama.cpp's server, with room for `length` tokens."""

    def __init__(self, file: Path, length: int, threads: int) -> None:
        parameters = xllamacpp.CommonParams()
        parameters.model.path = str(file)
        parameters.n_ctx, parameters.n_parallel = length, 1
        parameters.n_batch = parameters.n_ubatch = length
        parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = threads
        parameters.warmup = parameters.fit_params = False
        parameters.verbosity = -1
        self.server = xllamacpp.Server(parameters)

    def ask(self, prompt: Sequence[int], **request: Any) -> Any:
        request |= {"prompt": list(prompt), "temperature": 0, "ignore_eos": True}
        return self.server.handle_completions(request)

    def loss(self, prompt: Sequence[int], target: int, letter: int) -> float:
        """Negative log-likelihood (nats) of the token `target` after `prompt`.

        The server reports the probability that the token it chooses had before a bias made it
        choose that token. It says nothing of a part of a character; then it is asked for a letter,
        and for the probabilities of all tokens.
        """
        position = self._position(prompt, target, 1)
        if position is not None:
            return -float(position["logprob"])
        position = self._position(prompt, letter, ALL)
        return next(-float(e["logprob"]) for e in position["top_logprobs"] if e["id"] == target)

    def _position(self, prompt: Sequence[int], token: int, count: int) -> Any:
        """What the server says of the position after `prompt`, with `token` chosen."""
        answer = self.ask(prompt, n_predict=1, n_probs=count, logit_bias=[[token, BIAS]])
        logprobs = answer["choices"][0]["logprobs"]
        return logprobs["content"][0] if logprobs else None

    def rates(self, prompt: Sequence[int], new: int) -> tuple[float, float]:
        """Tokens per second of a prefill, and of `new` decoding steps after it."""
        timings = self.ask(prompt, n_predict=new, cache_prompt=False)["timings"]
        assert (timings["prompt_n"], timings["predicted_n"]) == (len(prompt), new)
        return timings["prompt_per_second"], timings["predicted_per_second"]


def perplexity(options: argparse.Namespace) -> None:
    tokenizer = load_tokenizer(str(options.files[0]), None, False)
    windowing = Windowing(options.context, None, options.windows)
    windows = corpus_windows(read_corpus(options.text, "test"), tokenizer, windowing)
    count = sum(window.scored for window in windows)
    click.echo(f"{len(windows)} windows, {count} tokens scored")
    click.echo("| file | MB | perplexity | over the first |\n|---|---|---|---|")
    first = None
    for file in options.files:
        served = Served(file, options.context + 1, options.threads)
        value = math.exp(sum(total_loss(served, window, tokenizer) for window in windows) / count)
        first = first or value
        click.echo(f"| {file.name} | {megabytes(file)} | {value:.3f} | {value / first:.3f} |")


def total_loss(served: Served, window: Window, tokenizer: Any) -> float:
    """Summed negative log-likelihood (nats) of the scored tokens of a window."""
    tokens, letter = (
        window.tokens.tolist(),
        tokenizer("a", add_special_tokens=False)["input_ids"][0],
    )
    positions = range(len(tokens) - window.scored, len(tokens))
    return sum(served.loss(tokens[:i], tokens[i], letter) for i in positions)


def speed(options: argparse.Namespace) -> None:
    length = options.prompt + options.new + 1
    served = [Served(file, length, options.threads) for file in options.files]
    ids = np.random.default_rng(0).integers(100, 10_000, options.prompt).tolist()
    for model in served:
        model.rates(ids, options.new)  # reads the file
    rounds = [[model.rates(ids, options.new) for model in served] for _ in range(options.rounds)]
    rates = np.array(rounds)  # (rounds, files, 2)
    click.echo(f"{options.rounds} rounds in turn, {options.threads} thread(s), tokens per second")
    click.echo("| file | MB | prefill | over the first | decode | over the first |")
    click.echo("|---|---|---|---|---|---|")
    for index, file in enumerate(options.files):
        cells = [cell(rates[:, index, kind], rates[:, 0, kind]) for kind in (0, 1)]
        click.echo(f"| {file.name} | {megabytes(file)} | {' | '.join(cells)} |")


def cell(rates: np.ndarray[Any, Any], first: np.ndarray[Any, Any]) -> str:
    ratios = rates / first
    spread = f"{np.median(ratios):.2f} ({ratios.min():.2f}–{ratios.max():.2f})"
    return f"{np.median(rates):.1f} | {spread}"


def megabytes(file: Path) -> str:
    return f"{file.stat().st_size / 1e6:.0f}"


def main() -> None:
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(required=True)
    for measure in (perplexity, speed):
        command = commands.add_parser(measure.__name__)
        command.add_argument("files", nargs="+", type=Path)
        command.add_argument("--threads", type=int, default=1)
        command.set_defaults(measure=measure)
    add = commands.choices["perplexity"].add_argument
    add("--text", required=True)
    add("--windows", type=int, default=6)
    add("--context", type=int, default=1024)
    add = commands.choices["speed"].add_argument
    add("--rounds", type=int, default=9)
    add("--prompt", type=int, default=128)
    add("--new", type=int, default=64)
    options = parser.parse_args()
    options.measure(options)


if __name__ == "__main__":
    main()
