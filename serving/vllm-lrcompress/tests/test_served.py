"""vLLM computes what transformers computes, for every family and form, and refuses the rest."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import CHECKPOINTS, engine, generate
from safetensors.torch import load_file, save_file

from vllm_lrcompress.records import CheckpointError

SERVED = sorted(folder.name for folder in (CHECKPOINTS / "served").iterdir())
REFUSED = sorted(folder.name for folder in (CHECKPOINTS / "refused").iterdir())
# the largest difference of a log-probability in float32; the models' logits reach hundreds
TOLERANCE = 2e-4
# vLLM's GELU is not the approximation that transformers' BLOOM has
DEVIATING = {"bloom": 1e-2}


def expected(name: str) -> dict[str, Any]:
    text = (CHECKPOINTS / "served" / name / "expected.json").read_text("utf-8")
    values: dict[str, Any] = json.loads(text)
    return values


def served(name: str, **options: Any) -> tuple[list[float], list[int]]:
    prompt, greedy = (expected(name)[key] for key in ("prompt", "greedy"))
    with engine(CHECKPOINTS / "served" / name, **options) as llm:
        return generate(llm, prompt, len(greedy))


def differences(name: str, logprobs: list[float]) -> list[float]:
    return [abs(a - b) for a, b in zip(logprobs, expected(name)["logprobs"], strict=True)]


def assert_exact(name: str, **options: Any) -> None:
    logprobs, greedy = served(name, **options)
    assert max(differences(name, logprobs)) <= DEVIATING.get(name, TOLERANCE)
    assert greedy == expected(name)["greedy"]


@pytest.mark.parametrize("name", SERVED)
def test_families(name: str) -> None:
    assert_exact(name)


def test_compiled() -> None:
    assert_exact("llama", enforce_eager=False)


def test_tensor_parallel() -> None:
    """Two processes; more of them, and other layers, in test_layers.py."""
    assert_exact("llama", tensor_parallel_size=2)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["llama", "opt"])
def test_half_precision(name: str, dtype: str) -> None:
    """The errors are those of transformers in the same type."""
    logprobs, _ = served(name, dtype=dtype)
    errors = differences(name, logprobs)
    assert sum(errors) / len(errors) <= 1.5 * expected(name)["mean_errors"][dtype]


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    """In one sentence, before an engine exists."""
    folder = CHECKPOINTS / "refused" / name
    with pytest.raises(CheckpointError) as error, engine(folder):
        pass
    assert (folder / "refusal.txt").read_text("utf-8") in str(error.value)
    assert "\n" not in str(error.value)


def drop(tensors: dict[str, Any]) -> str:
    tensors.pop("model.layers.1.mlp.gate_proj.A.weight")
    return "model.layers.1.mlp.gate_proj: A.weight missing in the checkpoint"


def drop_bias(tensors: dict[str, Any]) -> str:
    tensors.pop("model.layers.0.mlp.gate_proj.bias")
    return "model.layers.0.mlp.gate_proj: bias missing in the checkpoint"


def drop_dense(tensors: dict[str, Any]) -> str:
    tensors.pop("model.layers.3.mlp.down_proj.weight")
    return "model.layers.3.mlp.down_proj: weight missing in the checkpoint"


def cut(tensors: dict[str, Any]) -> str:
    name = "model.layers.1.mlp.up_proj.C.weight"
    tensors[name] = tensors[name][:-1].clone()
    return r"model.layers.1.mlp.up_proj: C.weight has shape [55, 14]"


def repeat(tensors: dict[str, Any]) -> str:
    tensors["model.layers.1.mlp.down_proj.order"][:] = 0
    return "model.layers.1.mlp.down_proj: its order does not name each input once"


@pytest.mark.parametrize("damage", [drop, drop_bias, drop_dense, cut, repeat])
def test_refused_while_loading(
    damage: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As where the files are not in a local folder: by the layers, tensor by tensor."""
    monkeypatch.setattr("vllm_lrcompress.config.check_folder", lambda *_: None)
    folder = shutil.copytree(CHECKPOINTS / "served" / "llama-biases", tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    refusal = damage(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError) as error, engine(folder):
        pass
    assert refusal in str(error.value)


def test_dummy_weights() -> None:
    """`--load-format dummy` reads no tensor, so none is missed."""
    with engine(CHECKPOINTS / "served" / "llama", load_format="dummy") as llm:
        assert len(generate(llm, [1, 2, 3], 2)[1]) == 2
