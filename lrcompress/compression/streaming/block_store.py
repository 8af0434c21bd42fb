"""The files that a streaming run keeps of each block until the whole model is saved."""

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

from lrcompress.compression.planning import ModelCandidates
from lrcompress.methods.plan import Candidates, RankCurve, WidthOption
from lrcompress.methods.types import LinearSpec
from lrcompress.runtime.atomic_io import replace_tensors, replace_text, writing_state

# the fields of a RankCurve that are arrays
CURVE_ARRAYS = ("ranks", "parameters", "errors", "costs")
# transformers refuses a safetensors file without it
SAFETENSORS_METADATA = {"format": "pt"}


@dataclass(frozen=True)
class Activations:
    """A file per block and sample with a tensor (1, length, width): hidden states, or gradients."""

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
        """Removes the files of one block."""
        for file in self.folder.glob(f"{block:04}-*.safetensors"):
            file.unlink()


@dataclass(frozen=True)
class BlockFiles:
    """The candidates, finished weights and records of blocks, by the number of the block."""

    folder: Path

    def weights(self, block: int) -> Path:
        return self.folder / f"block-{block:04}.safetensors"

    def _record(self, block: int) -> Path:
        return self.folder / f"block-{block:04}.json"

    def _candidates(self, block: int) -> Path:
        return self.folder / f"choices-{block:04}.json"

    def has(self, block: int) -> bool:
        return self._record(block).is_file() and self.weights(block).is_file()

    def write(self, block: int, weights: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        """Writes a finished block; the record comes last, and marks the block as finished."""
        with writing_state(f"block {block} in {str(self.folder)!r}"):
            replace_tensors(self.weights(block), weights, SAFETENSORS_METADATA)
            replace_text(self._record(block), json.dumps(record))

    def record(self, block: int) -> dict[str, Any]:
        return json.loads(self._record(block).read_text("utf-8"))  # type: ignore[no-any-return]

    def has_candidates(self, block: int) -> bool:
        return self._candidates(block).is_file()

    def write_candidates(self, block: int, candidates: ModelCandidates) -> None:
        content = {
            "choices": [
                {"ffn": c.ffn, "factor": c.factor, "shapes": [_option_to_json(o) for o in c.shapes]}
                for c in candidates.ffns
            ],
            "channels": {name: order.tolist() for name, order in candidates.channels.items()},
        }
        with writing_state(f"the candidates of block {block} in {str(self.folder)!r}"):
            self.folder.mkdir(parents=True, exist_ok=True)
            replace_text(self._candidates(block), json.dumps(content))

    def candidates(self, block: int, linears: Sequence[LinearSpec]) -> ModelCandidates:
        """The candidates of the block's FFNs, whose linears are among `linears`."""
        content = json.loads(self._candidates(block).read_text("utf-8"))
        channels = {name: torch.tensor(order) for name, order in content["channels"].items()}
        ffns = [_candidates_from_json(ffn, linears) for ffn in content["choices"]]
        return ModelCandidates(tuple(ffns), channels)


def _option_to_json(option: WidthOption) -> dict[str, Any]:
    """JSON keeps every bit of a float."""
    curves = [
        {"name": curve.name} | {key: _to_list(getattr(curve, key)) for key in CURVE_ARRAYS}
        for curve in option.curves
    ]
    return {"width": option.width, "error": option.error, "curves": curves}


def _to_list(array: np.ndarray | None) -> list[float] | None:
    return None if array is None else array.tolist()


def _candidates_from_json(content: Mapping[str, Any], linears: Sequence[LinearSpec]) -> Candidates:
    ffn_linears = tuple(linear for linear in linears if linear.ffn == content["ffn"])
    options = [
        WidthOption(option["width"], option["error"], tuple(map(_curve, option["curves"])))
        for option in content["shapes"]
    ]
    return Candidates(content["ffn"], ffn_linears, tuple(options), content["factor"])


def _curve(content: Mapping[str, Any]) -> RankCurve:
    arrays: list[Any] = [
        None if content[key] is None else np.array(content[key]) for key in CURVE_ARRAYS
    ]
    return RankCurve(content["name"], *arrays)


@dataclass(frozen=True)
class StreamFiles:
    """The dense and the compressed hidden states of all samples, in front of a block."""

    folder: Path

    @property
    def _streams(self) -> tuple[Activations, Activations]:
        return Activations(self.folder / "dense"), Activations(self.folder / "compressed")

    def read(self, block: int, samples: int) -> tuple[list[Tensor], list[Tensor]]:
        dense, compressed = (
            [stream.read(block, sample) for sample in range(samples)] for stream in self._streams
        )
        return dense, compressed

    def write(self, block: int, states: tuple[Sequence[Tensor], Sequence[Tensor]]) -> None:
        """`states` are the dense and the compressed ones, (1, length, width) for each sample."""
        for stream, samples in zip(self._streams, states, strict=True):
            for sample, hidden in enumerate(samples):
                stream.write(block, sample, hidden)

    def drop(self, block: int) -> None:
        for stream in self._streams:
            stream.drop(block)
