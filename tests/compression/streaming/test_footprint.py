"""The footprint that is announced bounds what a streaming run writes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lrcompress.compression.streaming.factorize import StreamingCompressor
from lrcompress.config.recipe import Recipe
from lrcompress.models.offload import OffloadedModel
from lrcompress.runtime.progress import silent
from tests.tiny import saved_model


@pytest.mark.parametrize(
    "flags",
    [{"method": "auto"}, {"method": "whitened", "sequential": "anchored"}, {"method": "svd"}],
    ids=str,
)
def test_what_is_kept_stays_within_what_is_said(tmp_path: Path, flags: dict[str, str]) -> None:
    dense = saved_model(tmp_path / "dense", num_hidden_layers=4)
    text = {"data": "pydoc", "num_samples": 9, "seq_len": 256, "gradient_samples": 2}
    settings = {"keep_ratio": 0.6, "streaming": True} | flags
    recipe = Recipe(model={"source": str(dense)}, calibration=text, factorize=settings)
    messages: list[str] = []
    source, work = OffloadedModel.load(recipe.model, tmp_path), tmp_path / "work"
    StreamingCompressor(recipe, source, work, silent, messages.append).run()
    written = sum(file.stat().st_size for file in work.rglob("*.safetensors"))
    (disk,) = (
        float(number.replace(",", "")) for number in re.findall(r"and ([\d,.]+) MiB", messages[0])
    )
    assert written / 2**20 < disk < 3 * written / 2**20
