"""lrcompress writes and the plug-in of vLLM reads the same format, which docs/checkpoint.md names.

They share no code, so whatever one of them changes has to fail here.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

import lrcompress
from lrcompress.layers.lowrank import FORMS, NARROWED, compressed_layers
from lrcompress.models import hf_quantizer
from lrcompress.runtime.errors import InputError
from tests.conftest import SMALL, invoke
from tests.serving.tiny_checkpoints import PLAN, Plan, random_checkpoint
from tests.tiny import FAMILIES, INNER
from vllm_lrcompress import records as plugin
from vllm_lrcompress.files import check_folder, stored_tensors

SPECIFICATION = Path("docs/checkpoint.md").read_text("utf-8")
COMMANDS = {
    "auto": (),
    "factored": ("--method", "svd", "--form", "factored"),
    "pivoted": ("--method", "svd", "--form", "pivoted"),
    "narrowed": ("--method", "nystrom"),
}


def quantization_config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text("utf-8"))
    return dict[str, Any](config["quantization_config"])


def assert_read_as_written(folder: Path) -> None:
    """The plug-in expects every tensor of the changed layers, in its shape, and no other one."""
    records = plugin.read_records(quantization_config(folder))
    check_folder(folder, records)
    model, _ = lrcompress.load(folder)
    written = {
        f"{name}.{path}": tuple(tensor.shape)
        for name, layer in compressed_layers(model)
        for path, tensor in layer.state_dict().items()
    }
    biases = {f"{r.name}.{r.bias}": (r.out_features,) for r in records.values()}
    read = {
        f"{r.name}.{path}": shape for r in records.values() for path, shape in r.tensors().items()
    }
    assert read | {name: shape for name, shape in biases.items() if name in written} == written
    stored = stored_tensors(folder)
    assert {name: stored[name].shape for name in written} == written


@pytest.mark.parametrize("flags", COMMANDS.values(), ids=COMMANDS)
def test_what_factorize_writes(flags: tuple[str, ...], dense: Path, tmp_path: Path) -> None:
    result = invoke(
        "factorize", dense, "--out", tmp_path / "out", "--keep-ratio", "0.6", *flags, *SMALL
    )
    assert result.exit_code == 0, result.output
    assert_read_as_written(tmp_path / "out")


# the second and fourth block of zamba share its only FFN
PLANS: dict[str, Plan] = {"zamba": ((None, {}), (56, {"gate": "factored", "up": "pivoted"}))}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_and_form(family: str, tmp_path: Path) -> None:
    changes = {"intermediate_size": 2 * INNER} if family == "recurrent_gemma" else {}  # it halves
    random_checkpoint(tmp_path / "out", family, PLANS.get(family, PLAN), **changes)
    assert_read_as_written(tmp_path / "out")
    forms = {record["form"] for record in quantization_config(tmp_path / "out")["modules"].values()}
    assert forms == set(plugin.FORMS)


def test_keys(checkpoint: Path) -> None:
    config = quantization_config(checkpoint)
    assert set(config) == {"quant_method", "format_version", "modules"}
    keys = {form: set[str]() for form in plugin.FORMS}
    for record in config["modules"].values():
        keys[record["form"]] |= record.keys()
    low_rank = {"form", "shape", "rank"}
    assert keys == {"factored": low_rank, "pivoted": low_rank, "narrowed": {"form", "shape"}}


def test_forms_version_and_methods() -> None:
    assert set(plugin.FORMS) == {*FORMS, NARROWED}
    assert plugin.FORMAT_VERSION == hf_quantizer.FORMAT_VERSION
    assert f"format version {plugin.FORMAT_VERSION}" in SPECIFICATION
    registered = Path("serving/vllm-lrcompress/vllm_lrcompress/config.py").read_text("utf-8")
    for method in hf_quantizer.LOW_RANK_METHODS:
        assert f'register_quantization_config("{method}")' in registered


def test_the_specification_lists_every_tensor() -> None:
    table = SPECIFICATION[SPECIFICATION.index("## Tensors") : SPECIFICATION.index("### The guard")]
    listed = set(re.findall(r"`M\.([\w.]+)`", table))
    for form in plugin.FORMS:
        record = plugin.LinearRecord("M", form, 6, 5, None if form == NARROWED else 2)
        assert {*record.tensors(), record.bias} <= listed
        listed_forms = re.findall(rf"\| `{form}` \|", table)
        assert listed_forms


def test_both_refuse_a_newer_version(checkpoint: Path) -> None:
    newer = quantization_config(checkpoint) | {"format_version": plugin.FORMAT_VERSION + 1}
    with pytest.raises(plugin.CheckpointError, match="low-rank format version 2"):
        plugin.read_records(newer)
    with pytest.raises(InputError, match="low-rank format version 2"):
        hf_quantizer.LowRankConfig(**newer)
