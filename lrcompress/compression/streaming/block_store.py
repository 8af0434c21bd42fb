"""What a run that holds one block at a time keeps of each block, until the whole model is saved."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from lrcompress.methods.plan import Candidates, RankCurve, WidthOption
from lrcompress.methods.types import LinearSpec
from lrcompress.runtime.atomic_io import replace_tensors, replace_text, writing_state

ARRAYS = ("ranks", "parameters", "errors")  # of a Curve
FORMAT = {"format": "pt"}  # without it transformers refuses a file


@dataclass(frozen=True)
class Activations:
    """A tensor (1, length, width) for every block and sample: hidden states, or gradients."""

    folder: Path

    def _file(self, block: int, sample: int) -> Path:
        return self.folder / f"{block:04}-{sample:05}.safetensors"

    def has(self, block: int, sample: int) -> bool:
        return self._file(block, sample).is_file()

    def read(self, block: int, sample: int) -> Tensor:
        states: Tensor = load_file(self._file(block, sample))["states"]
        return states

    def write(self, block: int, sample: int, states: Tensor) -> None:
        with writing_state(f"hidden states in {str(self.folder)!r}"):
            replace_tensors(self._file(block, sample), {"states": states.contiguous()})

    def drop(self, block: int) -> None:
        for file in self.folder.glob(f"{block:04}-*.safetensors"):
            file.unlink()


Found = tuple[tuple[Candidates, ...], dict[str, Tensor]]  # of one block, and orders of channels


@dataclass(frozen=True)
class BlockFiles:
    """The choices and the finished weights of blocks, by their number."""

    folder: Path

    def weights(self, block: int) -> Path:
        return self.folder / f"block-{block:04}.safetensors"

    def _record(self, block: int) -> Path:
        return self.folder / f"block-{block:04}.json"

    def _choices(self, block: int) -> Path:
        return self.folder / f"choices-{block:04}.json"

    def has(self, block: int) -> bool:
        return self._record(block).is_file() and self.weights(block).is_file()

    def write(self, block: int, weights: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        """The record comes last: where it is, the block is finished."""
        with writing_state(f"block {block} in {str(self.folder)!r}"):
            replace_tensors(self.weights(block), weights, FORMAT)
            replace_text(self._record(block), json.dumps(record))

    def record(self, block: int) -> dict[str, Any]:
        return json.loads(self._record(block).read_text("utf-8"))  # type: ignore[no-any-return]

    def has_choices(self, block: int) -> bool:
        return self._choices(block).is_file()

    def write_choices(self, block: int, found: Found) -> None:
        choices, channels = found
        content = {
            "choices": [
                {"ffn": one.ffn, "factor": one.factor, "shapes": [*map(_shape, one.shapes)]}
                for one in choices
            ],
            "channels": {name: order.tolist() for name, order in channels.items()},
        }
        with writing_state(f"the choices of block {block} in {str(self.folder)!r}"):
            self.folder.mkdir(parents=True, exist_ok=True)
            replace_text(self._choices(block), json.dumps(content))

    def choices(self, block: int, linears: Sequence[LinearSpec]) -> Found:
        """Of the FFNs that `linears` belong to."""
        content = json.loads(self._choices(block).read_text("utf-8"))
        channels = {name: torch.tensor(order) for name, order in content["channels"].items()}
        found = [_read_choices(one, linears) for one in content["choices"]]
        return tuple(found), channels


def _shape(shape: WidthOption) -> dict[str, Any]:
    """JSON keeps every bit of a float."""
    curves = [
        {"name": c.name} | {key: getattr(c, key).tolist() for key in ARRAYS} for c in shape.curves
    ]
    return {"width": shape.width, "error": shape.error, "curves": curves}


def _read_choices(content: Mapping[str, Any], linears: Sequence[LinearSpec]) -> Candidates:
    own = tuple(linear for linear in linears if linear.ffn == content["ffn"])
    shapes = [
        WidthOption(shape["width"], shape["error"], tuple(map(_read_curve, shape["curves"])))
        for shape in content["shapes"]
    ]
    return Candidates(content["ffn"], own, tuple(shapes), content["factor"])


def _read_curve(content: Mapping[str, Any]) -> RankCurve:
    arrays = (np.array(content[key]) for key in ARRAYS)
    return RankCurve(content["name"], *arrays)


@dataclass(frozen=True)
class StreamFiles:
    """Both streams of hidden states in front of a block, dense and compressed, of all samples."""

    folder: Path

    @property
    def _both(self) -> tuple[Activations, Activations]:
        return Activations(self.folder / "dense"), Activations(self.folder / "compressed")

    def read(self, block: int, samples: int) -> tuple[list[Tensor], list[Tensor]]:
        dense, compressed = ([kept.read(block, i) for i in range(samples)] for kept in self._both)
        return dense, compressed

    def write(self, block: int, streams: tuple[Sequence[Tensor], Sequence[Tensor]]) -> None:
        for kept, states in zip(self._both, streams, strict=True):
            for sample, one in enumerate(states):
                kept.write(block, sample, one)

    def drop(self, block: int) -> None:
        for kept in self._both:
            kept.drop(block)
