"""What the plug-in of vLLM reads in config.json, and how it refuses what it does not know."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.serving.damage import BLOCK, READ_FROM_CONFIG
from vllm_lrcompress.records import CheckpointError, ExpectedTensors, LinearRecord, read_records


def config(**record: Any) -> dict[str, Any]:
    return {"format_version": 1, "quant_method": "lowrank", "modules": {"m": record}}


def test_records_of_every_form() -> None:
    pivoted = read_records(config(form="pivoted", shape=[6, 5], rank=2))["m"]
    assert pivoted == LinearRecord("m", "pivoted", 6, 5, 2)
    assert pivoted.bias == "C.bias"
    assert pivoted.tensors() == {
        "weight": (1,), "Z.weight": (2, 3), "C.weight": (6, 2), "order": (5,),
    }  # fmt: skip
    factored = read_records(config(form="factored", shape=[6, 5], rank=2))["m"]
    assert factored.bias == "B.bias"
    assert factored.tensors() == {"weight": (1,), "A.weight": (2, 5), "B.weight": (6, 2)}
    narrowed = read_records(config(form="narrowed", shape=[6, 5]))["m"]
    assert (narrowed.bias, narrowed.tensors()) == ("bias", {"weight": (6, 5)})


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ({"form": "narrowed", "shape": [6]}, r"m: shape \[6\] in config.json is not \[out, in\]"),
        ({"form": "narrowed", "shape": [6, 0]}, r"m: shape \[6, 0\]"),
        ({"form": "narrowed", "shape": [6, True]}, r"m: shape \[6, True\]"),
        ({"form": "factored", "shape": [6, 5]}, r"m: rank None in config.json is not in 1\.\.5"),
        ({"form": "pivoted", "shape": [6, 5], "rank": 6}, r"m: rank 6 in config.json"),
        ({"shape": [6, 5]}, "m: its record in config.json has no known form"),
    ],
)
def test_damaged_records(record: dict[str, Any], problem: str) -> None:
    with pytest.raises(CheckpointError, match=problem):
        read_records(config(**record))


def test_a_record_that_is_none() -> None:
    empty: tuple[Any, ...] = (None, {}, [])
    for modules in empty:
        with pytest.raises(CheckpointError, match="has no modules"):
            read_records({"format_version": 1, "modules": modules})


def test_experts_are_refused_with_the_remedy() -> None:
    name = "model.layers.0.mlp.experts.ffns.3.down"
    with pytest.raises(CheckpointError, match=r"experts are not served: .*--to dense"):
        read_records({"format_version": 1, "modules": {name: {}}})


@pytest.mark.parametrize("damage", READ_FROM_CONFIG, ids=lambda damage: damage.__name__)
def test_damaged_configs(damage: Any, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((checkpoint / "config.json").read_text())
    damage(tmp_path)
    with pytest.raises(CheckpointError) as error:
        read_records(json.loads((tmp_path / "config.json").read_text())["quantization_config"])
    assert READ_FROM_CONFIG[damage] in str(error.value)
    assert "\n" not in str(error.value)


def test_tensors_as_they_arrive() -> None:
    expected = ExpectedTensors(BLOCK, {"A.weight": (2, 5), "B.weight": (6, 2)})
    expected.receive("A.weight", (2, 5))
    with pytest.raises(CheckpointError, match=f"{BLOCK}: B.weight missing"):
        expected.require_all()
    with pytest.raises(CheckpointError, match=r"B.weight has shape \[2, 6\] .* and \[6, 2\]"):
        expected.receive("B.weight", (2, 6))
    with pytest.raises(CheckpointError, match=r"unexpected tensor C\.weight"):
        expected.receive("C.weight", (2, 6))
    expected.receive("B.weight", (6, 2))
    expected.require_all()
