"""Whether vLLM's server gives what transformers gives, for one checkpoint, through the OpenAI API.

    python benchmarks/served.py DIR --python .venv-serve/bin/python [--text pydoc:test]

Runs in the environment of lrcompress and starts vLLM's server of DIR by the Python of its own, on
the loopback address and one thread: once in float32, for the greedy continuations of five prompts
and the log-probabilities of the text's tokens, and once in bfloat16, for its perplexity. Exits with
1 where a continuation differs, a log-probability by more than 1e-3, or the perplexity by more than
0.5 % from that of transformers in float32.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import torch

import lrcompress
from lrcompress.data.corpora import read_corpus
from lrcompress.data.windows import Window, Windowing, corpus_windows
from lrcompress.evaluation.perplexity import token_losses

PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 5, 32, 64
URL = "http://127.0.0.1:{port}"
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
}


@contextmanager
def server(python: Path, folder: Path, dtype: str, length: int, port: int) -> Iterator[str]:
    """The address of a server of `folder`, which is stopped afterwards.

    Without torch.compile, which takes minutes where each block has widths of its own.
    """
    # the program `vllm` does not start where the package has another name, such as vllm-cpu
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", folder]
    command += ["--served-model-name", "model", "--dtype", dtype]
    options = ["--host", "127.0.0.1", "--port", str(port), "--max-model-len", str(length)]
    log = Path(tempfile.gettempdir(), f"vllm-{dtype}.log").open("w")  # noqa: SIM115
    process = subprocess.Popen(
        [*command, *options, "--enforce-eager", "--no-enable-prefix-caching"],
        env=os.environ | ENVIRONMENT,
        stdout=log,
        stderr=log,
    )
    try:
        wait(process, URL.format(port=port), log.name)
        yield URL.format(port=port)
    finally:
        process.terminate()
        process.wait()
        log.close()


def wait(process: subprocess.Popen[bytes], url: str, log: str) -> None:
    while True:
        try:
            urllib.request.urlopen(f"{url}/health")
            return
        except urllib.error.URLError:
            if process.poll() is not None:
                raise click.ClickException(f"vLLM ended: see {log}") from None
            time.sleep(1)


def complete(url: str, prompt: list[int], **options: Any) -> Any:
    """The first choice of a completion of token ids."""
    body = {"model": "model", "prompt": prompt, "temperature": 0} | options
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)["choices"][0]


def served_losses(url: str, window: Window) -> torch.Tensor:
    """Negative log-likelihood (nats) of the scored tokens, shape (scored,)."""
    tokens = window.tokens.tolist()
    scores = complete(url, tokens, max_tokens=1, prompt_logprobs=0)["prompt_logprobs"]
    losses = [-score[str(t)]["logprob"] for score, t in zip(scores[1:], tokens[1:], strict=True)]
    return torch.tensor(losses[-window.scored :])


def served_greedy(url: str, prompt: list[int]) -> list[int]:
    choice = complete(
        url,
        prompt,
        max_tokens=NEW_TOKENS,
        min_tokens=NEW_TOKENS,
        logprobs=0,
        return_tokens_as_token_ids=True,
    )
    return [int(token.removeprefix("token_id:")) for token in choice["logprobs"]["tokens"]]


def greedy(model: Any, prompt: list[int]) -> list[int]:
    tokens = model.generate(
        torch.tensor([prompt]),
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
    )
    return list[int](tokens[0, len(prompt) :].tolist())


@click.command(help=__doc__)
@click.argument("folder", type=click.Path(exists=True, path_type=Path))
@click.option("--python", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--text", default="pydoc:test")
@click.option("--windows", default=6)
@click.option("--length", default=512)
@click.option("--port", default=8123)
def main(folder: Path, python: Path, text: str, windows: int, length: int, port: int) -> None:
    model, tokenizer = lrcompress.load(folder)
    model.float().eval()
    selected = corpus_windows(
        read_corpus(text, "test"), tokenizer, Windowing(length, None, windows)
    )
    prompts = [
        window.tokens[start : start + PROMPT_TOKENS].tolist()
        for window in selected
        for start in range(0, length - PROMPT_TOKENS, length // PROMPTS)
    ][:PROMPTS]
    with torch.no_grad():
        losses = torch.cat([token_losses(model, window) for window in selected])
        continuations = [greedy(model, prompt) for prompt in prompts]
    with server(python, folder, "float32", length + NEW_TOKENS, port) as url:
        exact = torch.cat([served_losses(url, window) for window in selected])
        equal = [served_greedy(url, p) == c for p, c in zip(prompts, continuations, strict=True)]
    with server(python, folder, "bfloat16", length + NEW_TOKENS, port) as url:
        rounded = torch.cat([served_losses(url, window) for window in selected])
    difference = float((exact - losses).abs().max())
    perplexity, half = (math.exp(x.double().mean()) for x in (losses, rounded))
    click.echo(f"greedy, {NEW_TOKENS} tokens: {sum(equal)} of {len(prompts)} prompts equal")
    click.echo(f"float32: largest difference of {len(losses)} log-probabilities {difference:.1e}")
    click.echo(f"bfloat16: perplexity {half:.4f}, transformers in float32 {perplexity:.4f}")
    click.echo(f"{text}: {windows} windows of {length} tokens")
    sys.exit(not (all(equal) and difference <= 1e-3 and abs(half / perplexity - 1) <= 5e-3))


if __name__ == "__main__":
    main()
