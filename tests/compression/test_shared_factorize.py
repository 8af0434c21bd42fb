"""factorize on two processes: samples and linears are shared, the result is that of one."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from lrcompress.checkpoint.export.dense import to_stock
from lrcompress.models.loading import load
from tests import worker
from tests.compression.streaming.test_factorize import record, weights
from tests.tiny import saved_model
from tests.training.test_devices import run_torchrun

TEXT = {"data": ["pydoc"], "num_samples": 9, "gradient_samples": 3, "seq_len": 64}
SEQUENTIAL = {"sequential": "anchored"}
# so that the tiny models become low rank in every block
LOW_RANK = {"method": "auto", "method_options": {"shrinkage": 0, "output_shrinkage": 0}}
# float32 sums of gradients in another order; those of inputs are in float64
ROUNDING = 1e-5


@dataclass(frozen=True)
class Jobs:
    folder: Path
    recipes: dict[str, dict[str, Any]]

    def linears(self, name: str) -> list[list[str]]:
        """What each process decomposed."""
        seen = [json.loads((self.folder / f"{name}.{rank}.json").read_text()) for rank in (0, 1)]
        assert [one["error"] for one in seen] == [None, None]
        return [one["linears"] for one in seen]

    def alone(self, name: str) -> Path:
        out = self.folder / f"{name}.alone"
        seen = worker.factorize({"recipe": self.recipes[name], "out": str(out)})
        assert seen["error"] is None
        return out


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    folder = tmp_path_factory.mktemp("shared")
    llama = saved_model(folder / "llama", num_hidden_layers=3)
    opt = saved_model(folder / "opt", "opt")
    recipes = {
        "auto": _recipe(llama, **LOW_RANK),
        "whitened": _recipe(opt, method="whitened"),
        "refined": _recipe(llama, method="whitened", **SEQUENTIAL) | {"refine": {"enabled": True}},
        "streamed": _recipe(llama, **LOW_RANK, streaming=True),
        "walked": _recipe(opt, method="whitened", streaming=True, **SEQUENTIAL),
        "nowhere": _recipe(folder / "nowhere"),
        "no_rank": _recipe(llama, keep_ratio=None, rank=500),
        "own_text": _recipe(llama, streaming=True) | {"calibration": {"seq_len": 64}},
    }
    found = [
        {"name": name, "recipe": recipe, "out": str(folder / name)}
        for name, recipe in recipes.items()
    ]
    (folder / "jobs.json").write_text(json.dumps(found))
    run_torchrun("-m", "tests.worker", str(folder))
    return Jobs(folder, recipes)


def _recipe(source: Path, **settings: Any) -> dict[str, Any]:
    settings = {"keep_ratio": 0.6, "rank_multiple": 2} | settings
    return {"model": {"source": str(source)}, "calibration": TEXT, "factorize": settings}


@pytest.mark.parametrize("name", ["auto", "whitened"])
def test_shared_in_memory(jobs: Jobs, name: str) -> None:
    """Sums are rounded otherwise: the same plan, and the same layers but for that."""
    alone, shared = jobs.alone(name), jobs.folder / name
    first, second = record(alone), record(shared)
    for one, other in zip(first["linears"], second["linears"], strict=True):
        assert {k: v for k, v in one.items() if type(v) is not float} == {
            k: v for k, v in other.items() if type(v) is not float
        }
    models = [load(folder)[0] for folder in (alone, shared)]
    for model in models:
        to_stock(model.requires_grad_(False))
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        assert float(((one - other).norm() / one.norm()).detach()) < ROUNDING
    main, other = jobs.linears(name)
    assert main
    assert other
    assert not {*main} & {*other}


@pytest.mark.parametrize("name", ["streamed", "walked"])
def test_shared_streaming_is_the_same_bit_for_bit(jobs: Jobs, name: str) -> None:
    alone, shared = jobs.alone(name), jobs.folder / name
    first, second = weights(alone), weights(shared)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert record(alone) == record(shared)
    main, other = jobs.linears(name)
    assert not {*main} & {*other}
    assert bool(other) == (name == "streamed")  # anchored fits go from block to block


def test_what_goes_from_block_to_block_is_done_by_the_main_process(jobs: Jobs) -> None:
    main, other = jobs.linears("refined")
    assert len(main) == len({*main}) == 9
    assert not other
    first, second = (record(f) for f in (jobs.alone("refined"), jobs.folder / "refined"))
    for one, two in zip(first["refined"], second["refined"], strict=True):
        assert one["after"] == pytest.approx(two["after"], rel=1e-2)


@pytest.mark.parametrize(
    ("name", "words"),
    [("nowhere", "does not exist"), ("no_rank", "rank 500"), ("own_text", "--calibration")],
)
def test_every_process_ends_and_the_main_one_says_why(jobs: Jobs, name: str, words: str) -> None:
    main, other = (
        json.loads((jobs.folder / f"{name}.{rank}.json").read_text())["error"] for rank in (0, 1)
    )
    assert main[0] == "InputError"
    assert words in main[1]
    assert other[0] == "MainProcessFailedError"
    assert not (jobs.folder / name).exists()
