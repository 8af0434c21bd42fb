"""What is said of memory before the start: its parts, where it is recorded, the table in docs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lrcompress.compression.calibration.moments import measure_moments
from lrcompress.compression.footprint import ALLOWANCE, LIBRARIES, MemoryEstimate, work_space
from lrcompress.compression.planning import Planning
from lrcompress.compression.serving import Serving
from lrcompress.compression.streaming.footprint import FootprintInputs
from lrcompress.config.recipe import Recipe
from lrcompress.layers.ffn_layouts import find_ffns
from lrcompress.layers.model_info import weight_bytes
from lrcompress.runtime.memory import gibibytes
from lrcompress.runtime.progress import silent
from tests.conftest import SMALL, invoke
from tests.tiny import (
    BLOCKS,
    EXPERTS,
    FAMILIES,
    INNER,
    MIXTURES,
    MORE_MIXTURES,
    SHARED_FFNS,
    WIDTH,
    tiny_model,
    tokens,
)

DOCS = Path(__file__).parents[2] / "docs" / "devices.md"


def estimate(model: Any, **settings: Any) -> MemoryEstimate:
    recipe = Recipe(
        model={"source": "any"},
        calibration={"data": "pydoc", "num_samples": 4},
        factorize={"keep_ratio": 0.8} | settings,
    )
    return MemoryEstimate.of(model, recipe)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_weights_and_moments_are_exact(family: str) -> None:
    model = tiny_model(family)
    linears = find_ffns(model).linears
    moments = measure_moments(model, linears, tokens(), gradient_samples=1)
    sums = (*moments.input_sums.sums.values(), *moments.gradient_sums.sums.values())
    assert estimate(model).moments == sum(tensor.nbytes for tensor in sums)
    assert estimate(model).weights == weight_bytes(model)


@pytest.mark.parametrize("family", [*FAMILIES, *MIXTURES, *SHARED_FFNS, *MORE_MIXTURES])
def test_every_family_has_an_estimate(family: str) -> None:
    """The default, whose text the model writes, needs heads and vocabulary of the config."""
    recipe = Recipe(model={"source": "any"}, factorize={"keep_ratio": 0.8})
    model = tiny_model(family)
    memory = MemoryEstimate.of(model, recipe)
    assert memory.weights == weight_bytes(model)
    assert memory.moments > 0
    assert memory.activations > ALLOWANCE


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_config_with_other_names_has_an_estimate(attention: str) -> None:
    """Code of a model's own may call heads otherwise, or list them by block."""
    recipe = Recipe(model={"source": "any"}, factorize={"keep_ratio": 0.8})
    model = tiny_model(attn_implementation=attention)
    known, named = MemoryEstimate.of(model, recipe), dict(vars(model.config))
    heads = named.pop("num_attention_heads")
    for keys in ({"num_attention_heads": [1, heads]}, {}):
        model.config = SimpleNamespace(**named, **keys, _attn_implementation=attention)
        model.config.get_text_config = lambda decoder, config=model.config: config
        estimate = MemoryEstimate.of(model, recipe)
        assert estimate == known if keys else estimate.total > known.weights + known.moments
        for key in ("hidden_size", "num_key_value_heads", "head_dim"):
            named.pop(key, None)


def test_every_expert_has_moments() -> None:
    inputs, gradients = WIDTH**2 + INNER**2, (2 * INNER) ** 2 + WIDTH**2
    model = tiny_model("mixtral")
    assert estimate(model).moments == BLOCKS * EXPERTS * (8 * inputs + 4 * gradients)


def test_a_method_takes_what_it_needs() -> None:
    model = tiny_model()
    full, inputs, none = (estimate(model, method=m) for m in ("auto", "whitened", "svd"))
    assert full.moments > inputs.moments > none.moments == 0
    # what passes free is used again
    assert full.algebra + full.activations > inputs.algebra + inputs.activations
    assert full.activations > inputs.activations > none.activations
    assert full.total == sum(vars(full).values())


def test_a_meta_model_tells_as_much() -> None:
    model = tiny_model()
    assert estimate(tiny_model().to("meta")) == estimate(model)


def test_the_estimate_is_said_and_recorded_beside_the_peak(dense: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = invoke("factorize", dense, "--out", out, "--keep-ratio", "0.6", *SMALL)
    said = re.search(r"takes about ([\d.]+ GiB) of memory: .* for weights", result.output)
    memory = json.loads((out / "lrcompress.json").read_text("utf-8"))["memory"]
    assert said is not None
    assert said[1] == gibibytes(memory["estimated"])
    if memory["measured"] is not None:
        assert memory["measured"] > 2**27
        assert re.search(r"Memory at its peak: [\d.]+ GiB; [\d.]+ GiB were", result.output)


# the shapes of SmolLM2 135M, Llama 3.2 1B, Llama 3.1 8B and 70B: hidden size, channels, blocks,
# heads, heads of keys, vocabulary, whether the embedding is the output layer
SHAPES = {
    "135M": (576, 1536, 30, 9, 3, 49152, True),
    "1.2B": (2048, 8192, 16, 32, 8, 128256, True),
    "8B": (4096, 14336, 32, 32, 8, 128256, False),
    "70B": (8192, 28672, 80, 64, 8, 128256, False),
}
KEYS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "vocab_size", "tie_word_embeddings",
)  # fmt: skip


def memory_of(size: str, command: str) -> int:
    """The bytes that `command` takes for a model of `size`."""
    flags = dict(re.findall(r"--([\w-]+) ?([\w.]*)", command))
    config = AutoConfig.for_model("llama", **dict(zip(KEYS, SHAPES[size], strict=True)))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, flags["dtype"]))
    recipe = Recipe(
        model={"source": "any"},
        calibration={"data": flags.get("calibration", "self")},
        factorize={"keep_ratio": 0.8, "streaming": "streaming" in flags},
    )
    if not recipe.factorize.streaming:
        return MemoryEstimate.of(model, recipe).total
    linears = find_ffns(model).linears
    serving = Serving.of(model, linears, recipe.factorize, silent)
    steps, planning = (
        work_space(model, linears, recipe),
        Planning.of(recipe.factorize, 0.8, serving),
    )
    writes_text = "calibration" not in flags
    return FootprintInputs(steps, planning, 8, writes_text).memory(LIBRARIES)


def test_the_table_in_docs_has_the_numbers_of_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    rows = re.findall(
        r"^\| (\S+) \| `(.*?)` \| .*? \| ([\d,.]+ GiB) \|", DOCS.read_text("utf-8"), re.MULTILINE
    )
    assert {size for size, _, _ in rows} == set(SHAPES)
    expected = [(size, command, gibibytes(memory_of(size, command))) for size, command, _ in rows]
    assert rows == expected
