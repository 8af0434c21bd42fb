"""factorize in two processes, which share samples and linears: the same result as in one."""

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
from tests.tiny import saved_model, saved_record, saved_weights
from tests.worker import run_torchrun

TEXT = {"data": ["pydoc"], "num_samples": 9, "gradient_samples": 3, "seq_len": 64}
SEQUENTIAL = {"sequential": "anchored"}
# options with which the tiny models become low-rank in every block
LOW_RANK = {"method": "auto", "method_options": {"shrinkage": 0, "output_shrinkage": 0}}
# relative; processes add float32 sums of gradients in another order
ROUNDING = 1e-5


@dataclass(frozen=True)
class Jobs:
    folder: Path
    recipes: dict[str, dict[str, Any]]

    def linears(self, name: str) -> list[list[str]]:
        """The linears that each process decomposed."""
        reports = [self.report(name, rank) for rank in (0, 1)]
        assert [report["error"] for report in reports] == [None, None]
        return [report["linears"] for report in reports]

    def report(self, name: str, rank: int) -> dict[str, Any]:
        """What a process wrote about a job."""
        report: dict[str, Any] = json.loads((self.folder / f"{name}.{rank}.json").read_text())
        return report

    def alone(self, name: str) -> Path:
        """The output of the same job in this process."""
        out = self.folder / f"{name}.alone"
        report = worker.factorize({"recipe": self.recipes[name], "out": str(out)})
        assert report["error"] is None
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
        "own_text": _recipe(llama, streaming=True)
        | {"calibration": {"seq_len": 64, "num_samples": 4}},
    }
    jobs = [
        {"name": name, "recipe": recipe, "out": str(folder / name)}
        for name, recipe in recipes.items()
    ]
    (folder / "jobs.json").write_text(json.dumps(jobs))
    run_torchrun("-m", "tests.worker", str(folder))
    return Jobs(folder, recipes)


def _recipe(source: Path, **settings: Any) -> dict[str, Any]:
    settings = {"keep_ratio": 0.6, "rank_multiple": 2} | settings
    return {"model": {"source": str(source)}, "calibration": TEXT, "factorize": settings}


@pytest.mark.parametrize("name", ["auto", "whitened"])
def test_shared_in_memory(jobs: Jobs, name: str) -> None:
    """The same plan, and the same layers apart from the rounding of sums."""
    alone, shared = jobs.alone(name), jobs.folder / name
    first, second = saved_record(alone), saved_record(shared)
    for linear, shared_linear in zip(first["linears"], second["linears"], strict=True):
        assert {k: v for k, v in linear.items() if type(v) is not float} == {
            k: v for k, v in shared_linear.items() if type(v) is not float
        }
    models = [load(folder)[0] for folder in (alone, shared)]
    for model in models:
        to_stock(model.requires_grad_(False))
    for weight, shared_weight in zip(*(model.parameters() for model in models), strict=True):
        assert float(((weight - shared_weight).norm() / weight.norm()).detach()) < ROUNDING
    main, other = jobs.linears(name)
    assert main
    assert other
    assert not {*main} & {*other}


@pytest.mark.parametrize("name", ["streamed", "walked", "own_text"])
def test_shared_streaming_is_the_same_bit_for_bit(jobs: Jobs, name: str) -> None:
    alone, shared = jobs.alone(name), jobs.folder / name
    first, second = saved_weights(alone), saved_weights(shared)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert saved_record(alone) == saved_record(shared)


@pytest.mark.parametrize("name", ["streamed", "walked"])
def test_streamed_linears_are_decomposed_once(jobs: Jobs, name: str) -> None:
    main, other = jobs.linears(name)
    assert not {*main} & {*other}
    assert bool(other) == (name == "streamed")  # anchored fits go from block to block


def test_what_goes_from_block_to_block_is_done_by_the_main_process(jobs: Jobs) -> None:
    main, other = jobs.linears("refined")
    assert len(main) == len({*main}) == 9
    assert not other
    first, second = (saved_record(f) for f in (jobs.alone("refined"), jobs.folder / "refined"))
    for block, shared_block in zip(first["refined"], second["refined"], strict=True):
        assert block["after"] == pytest.approx(shared_block["after"], rel=1e-2)


@pytest.mark.parametrize(
    ("name", "words"),
    [("nowhere", "does not exist"), ("no_rank", "rank 500")],
)
def test_every_process_ends_and_the_main_one_says_why(jobs: Jobs, name: str, words: str) -> None:
    main, other = (jobs.report(name, rank)["error"] for rank in (0, 1))
    assert main[0] == "InputError"
    assert words in main[1]
    assert other[0] == "MainProcessFailedError"
    assert not (jobs.folder / name).exists()
