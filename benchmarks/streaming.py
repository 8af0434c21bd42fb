"""Peak memory of `factorize --streaming`, and whether its weights equal those made in memory.

    python benchmarks/streaming.py [--gib 1.5] [--method whitened] [--folder FOLDER]

Writes a llama with random float32 weights and many blocks to FOLDER, which needs about four times
the model's size. Each way runs in a process of its own. The numbers are the peak of its resident
memory minus that of a bare interpreter with torch imported. Exits with 1 where the weights differ,
or where streaming takes more than --limit MiB or than it states before it starts.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
import torch
from safetensors import safe_open
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WIDTH, INNER, HEADS = 512, 1408, 8
BLOCK_BYTES = 4 * (4 * WIDTH**2 + 3 * WIDTH * INNER)
ARGUMENTS = (
    *("--keep-ratio", "0.6", "--calibration", "pydoc", "--num-samples", "8"),
    *("--gradient-samples", "4", "--seq-len", "256", "--device", "cpu"),
)


def save_random_model(folder: Path, size: float) -> None:
    """Writes a random model of `size` bytes, in shards."""
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_attention_heads=HEADS,
        num_hidden_layers=round(size / BLOCK_BYTES),
        max_position_embeddings=1024,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="400MB")
    byte_tokenizer().save_pretrained(folder)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": 0} | {character: i for i, character in enumerate(alphabet, 1)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<s>")


# a process measures its own peak: getrusage of a child starts at its parent's memory
WRITE_PEAK = """
import runpy, sys, torch
from pathlib import Path
from lrcompress.runtime.memory import peak_memory
file, *sys.argv = sys.argv[1:]
try:
    with peak_memory() as memory:
        if sys.argv:
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
finally:
    Path(file).write_text(str(memory.peak))
"""


def measure(folder: Path, *command: str) -> tuple[float, float, str]:
    """Peak of resident memory in MiB, seconds, and stderr of a process that runs a module."""
    started, file = time.perf_counter(), folder / "peak"
    words = [sys.executable, "-c", WRITE_PEAK, str(file), *command]
    process = subprocess.run(words, check=False, stderr=subprocess.PIPE, text=True)
    if process.returncode:
        raise SystemExit(process.stderr)
    return int(file.read_text()) / 2**20, time.perf_counter() - started, process.stderr


def count_unequal(streamed: Path, in_memory: Path) -> tuple[int, int]:
    """The number of tensors, and of those that are not equal bit for bit."""
    first, second = _files_of_tensors(streamed), _files_of_tensors(in_memory)
    if first.keys() != second.keys():
        raise SystemExit(f"not the same tensors: {sorted(first.keys() ^ second.keys())[:3]}")
    unequal = sum(not torch.equal(_read(first[n], n), _read(second[n], n)) for n in first)
    return len(first), unequal


def _files_of_tensors(folder: Path) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            files |= dict.fromkeys(tensors.keys(), file)
    return files


def _read(file: Path, name: str) -> torch.Tensor:
    with safe_open(file, "pt") as tensors:
        tensor: torch.Tensor = tensors.get_tensor(name)
        return tensor


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--gib", type=float, default=1.5)
    parser.add_argument("--method", default="whitened")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--limit", type=float, default=600.0, help="MiB")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        save_random_model(folder / "dense", arguments.gib * 2**30)
        size = sum(f.stat().st_size for f in (folder / "dense").glob("*.safetensors")) / 2**20
        bare, _, _ = measure(folder)
        click.echo(f"weights {size:,.0f} MiB; bare interpreter with torch {bare:,.0f} MiB")
        peaks, limit = {}, arguments.limit
        for way in ("streaming", "no-streaming"):
            out = str(folder / way)
            command = ("lrcompress", "factorize", str(folder / "dense"), "--out", out, *ARGUMENTS)
            flags = ("--method", arguments.method, f"--{way}")
            peak, seconds, errors = measure(folder, *command, *flags)
            peaks[way] = peak - bare
            click.echo(f"--{way}: {peaks[way]:,.0f} MiB above it, {seconds:,.0f} s")
            if statement := re.search(r"at most ([\d,.]+) MiB", errors):
                stated = float(statement[1].replace(",", "")) - bare
                click.echo(f"--{way} stated: at most {stated:,.0f} MiB above it")
                limit = min(limit, stated)
        count, unequal = count_unequal(folder / "streaming", folder / "no-streaming")
        click.echo(f"{count} tensors, {unequal} of them not equal bit for bit")
    if unequal or peaks["streaming"] > limit:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
