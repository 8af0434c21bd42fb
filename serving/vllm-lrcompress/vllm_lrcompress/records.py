"""The record of the changed layers in config.json: what it says, and which tensors follow from it.

This is docs/checkpoint.md of lrcompress, format version 1. Nothing here needs vLLM or torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

FORMAT_VERSION = 1
FORMS = ("factored", "pivoted", "narrowed")

INTACT = "get an intact copy of the checkpoint"


class CheckpointError(Exception):
    """A checkpoint that cannot be served; the text is one sentence with the remedy.

    It is no ValueError, because pydantic would put that into an error of its own.
    """


@dataclass(frozen=True)
class LinearRecord:
    """One changed linear: W (out_features, in_features), of `rank` unless it is narrowed."""

    name: str
    form: str
    out_features: int
    in_features: int
    rank: int | None = None

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Path below the module -> shape of every tensor but the bias."""
        if self.rank is None:
            return {"weight": (self.out_features, self.in_features)}
        guard = {"weight": (1,)}
        if self.form == "factored":
            return guard | {
                "A.weight": (self.rank, self.in_features),
                "B.weight": (self.out_features, self.rank),
            }
        return guard | {
            "Z.weight": (self.rank, self.in_features - self.rank),
            "C.weight": (self.out_features, self.rank),
            "order": (self.in_features,),
        }

    @property
    def bias(self) -> str:
        """The path of the bias below the module; its shape is (out_features)."""
        return {"factored": "B.bias", "pivoted": "C.bias", "narrowed": "bias"}[self.form]


def read_records(config: Mapping[str, Any]) -> dict[str, LinearRecord]:
    """The records of a `quantization_config` by module name.

    Raises CheckpointError where it has another version, is damaged, or names experts.
    """
    version = config.get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"the checkpoint has low-rank format version {version!r}, this vllm-lrcompress reads "
            f"version {FORMAT_VERSION}: install the vllm-lrcompress of the lrcompress that wrote it"
        )
    modules = config.get("modules")
    if not isinstance(modules, Mapping) or not modules:
        raise CheckpointError(f"quantization_config of config.json has no modules: {INTACT}")
    return {name: _read_record(name, record) for name, record in modules.items()}


def _read_record(name: str, record: Any) -> LinearRecord:
    if ".ffns." in name:
        raise CheckpointError(
            f"{name}: compressed experts are not served: serve what `lrcompress export DIR "
            "--out OUT --to dense` writes, or factorize with --exclude '*.experts.*'"
        )
    if not isinstance(record, Mapping) or record.get("form") not in FORMS:
        raise CheckpointError(f"{name}: its record in config.json has no known form: {INTACT}")
    form, shape, rank = record["form"], record.get("shape"), record.get("rank")
    if not (isinstance(shape, list) and len(shape) == 2 and all(map(_is_size, shape))):
        raise CheckpointError(f"{name}: shape {shape!r} in config.json is not [out, in]: {INTACT}")
    out_features, in_features = shape
    if form == "narrowed":
        return LinearRecord(name, form, out_features, in_features)
    if not _is_size(rank) or rank > min(shape):
        raise CheckpointError(
            f"{name}: rank {rank!r} in config.json is not in 1..{min(shape)}: {INTACT}"
        )
    return LinearRecord(name, form, out_features, in_features, rank)


def _is_size(number: Any) -> bool:
    return type(number) is int and number >= 1


class ExpectedTensors:
    """The tensors that one module of the model has to get, and those that it got."""

    def __init__(self, module: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.module = module
        self.shapes = dict(shapes)
        self.arrived: set[str] = set()

    def receive(self, path: str, shape: tuple[int, ...]) -> None:
        """Notes a tensor at `path` below the module; CheckpointError where it does not fit."""
        expected = self.shapes.get(path)
        if expected is None:
            raise CheckpointError(f"{self.module}: unexpected tensor {path}: {INTACT}")
        if expected != shape:
            raise CheckpointError(
                f"{self.module}: {path} has shape {list(shape)} in the checkpoint and "
                f"{list(expected)} by config.json: {INTACT}"
            )
        self.arrived.add(path)

    def require_all(self) -> None:
        """Raises CheckpointError where a tensor has not arrived."""
        missing = sorted(self.shapes.keys() - self.arrived)
        if missing:
            raise CheckpointError(
                f"{self.module}: {', '.join(missing)} missing in the checkpoint: {INTACT}"
            )


def bad_order(module: str) -> CheckpointError:
    """The refusal of a pivoted layer whose `order` is no permutation of its inputs."""
    return CheckpointError(f"{module}: its order does not name each input once: {INTACT}")
