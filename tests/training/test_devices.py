"""Training on two processes: the results of one process, exact resuming, one error message."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lrcompress.runtime import distributed
from lrcompress.runtime.errors import InputError
from lrcompress.training.loop import last_checkpoint
from tests import worker
from tests.conftest import SMALL, invoke
from tests.tiny import saved_model
from tests.worker import TIMEOUT, run_torchrun, start_torchrun, wait_for

# 5 held-out sequences: two processes do not have the same number of them
SETTINGS: dict[str, Any] = {
    "data": ["pydoc"], "max_steps": 12, "train_length": 60, "held_out": 5, "eval_every": 4,
    "learning_rate": 3e-3, "batch_size": 4,
}  # fmt: skip
LONG = SETTINGS | {"max_steps": 120, "eval_every": 10, "held_out": 2}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
# float32 sums in another order, after 12 steps of Adam
ROUNDING, EXACT = (1e-4, 1e-5), (0.0, 0.0)


@dataclass(frozen=True)
class Runs:
    """The folder with the results of two processes, and their jobs by name."""

    folder: Path
    jobs: dict[str, dict[str, Any]]

    def outcome(self, name: str, rank: int) -> dict[str, Any]:
        """The passes and the error that a process wrote for a job."""
        content: dict[str, Any] = json.loads((self.folder / f"{name}.{rank}.json").read_text())
        return content

    def run_alone(self, name: str) -> dict[str, Any]:
        """Runs a job in this process; its output is called NAME.alone."""
        settings = dict(self.jobs[name]["settings"])
        if settings.pop("shard", False) and "source" in self.jobs[name]:
            settings["parametrization"] = "stored"
        return worker.run(
            self.jobs[name] | {"settings": settings, "out": str(self.folder / f"{name}.alone")}
        )

    def losses(self, out: str) -> torch.Tensor:
        record = json.loads((self.folder / out / "lrcompress.json").read_text())
        trained = record.get("finetuned") or record["pretrained"]
        return torch.tensor(sorted(dict(trained["losses"]).items()))

    def check_same(self, name: str, expected_name: str, tolerance: tuple[float, float]) -> None:
        _check_close(self.losses(name), self.losses(expected_name), tolerance)
        weights = load_file(self.folder / name / "model.safetensors")
        expected = load_file(self.folder / expected_name / "model.safetensors")
        assert weights.keys() == expected.keys()
        for key in weights:
            _check_close(weights[key], expected[key], tolerance)


def _check_close(
    actual: torch.Tensor, expected: torch.Tensor, tolerance: tuple[float, float]
) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance[0], atol=tolerance[1])


@pytest.fixture(scope="module")
def pivoted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A gpt2 without dropout whose FFN weights are pivots and coefficients."""
    return _pivoted(tmp_path_factory.mktemp("pivoted"), "gpt2", **NO_DROPOUT)


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama with a tied embedding that two processes can split evenly."""
    folder = tmp_path_factory.mktemp("tied")
    return _pivoted(folder, "llama", tie_word_embeddings=True, vocab_size=258)


def _pivoted(folder: Path, family: str, **changes: Any) -> Path:
    form = ("--method", "whitened", "--form", "pivoted", "--keep-ratio", "0.6")
    dense = saved_model(folder / "dense", family, **changes)
    result = invoke("factorize", dense, "--out", folder / "small", *form, *SMALL)
    assert result.exit_code == 0, result.output
    return folder / "small"


@pytest.fixture(scope="module")
def runs(
    factorized: Path, pivoted: Path, tied: Path, tmp_path_factory: pytest.TempPathFactory
) -> Runs:
    folder, new = tmp_path_factory.mktemp("devices"), tied.with_name("dense")
    text = folder / "short.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 22)
    jobs = [
        _job(folder, "plain", factorized),
        _job(folder, "passes", factorized, gradient_accumulation=2),
        _job(folder, "epochs", factorized, data=[str(text)]),
        _job(folder, "stopped", factorized, stop=7),
        _job(folder, "stopped", factorized),
        _job(folder, "moved", factorized, stop=7),
        _job(folder, "shard", tied, shard=True, train="all", cross_entropy=0.1),
        _job(folder, "shard_passes", pivoted, shard=True, train="norms", gradient_accumulation=2),
        _job(folder, "uneven", pivoted, shard=True, train="all"),
        _job(folder, "shard_stopped", tied, shard=True, train="all", cross_entropy=0.1, stop=7),
        _job(folder, "shard_stopped", tied, shard=True, train="all", cross_entropy=0.1),
        _job(folder, "timed", factorized, max_steps=None, minutes=0.05),
        _job(folder, "timed_shard", tied, shard=True, train="all", max_steps=None, minutes=0.05),
        _new_job(folder, "new", new, self_guided="full"),
        _new_job(folder, "new_shard", new, shard=True),
        _new_job(folder, "new_dense", new, shard=True, keep_ratio=None),
        _new_job(folder, "new_stopped", new, shard=True, stop=7),
        _new_job(folder, "new_stopped", new, shard=True),
        _new_job(folder, "new_uneven", pivoted.with_name("dense"), shard=True),
        _job(folder, "diverges", factorized, train="all", learning_rate=1e6),
        _job(folder, "nowhere", folder / "nowhere"),
        _job(folder, "no_text", factorized, data=["nowhere.txt"]),
        _job(folder, "killed", factorized, **LONG),
        _job(folder, "undisturbed", factorized, **LONG),
    ]
    _kill_a_run(factorized, folder / "killed")
    (folder / "jobs.json").write_text(json.dumps(jobs))
    run_torchrun("-m", "tests.worker", str(folder))
    return Runs(folder, {job["name"]: job for job in jobs})


def _job(
    folder: Path, name: str, source: Path, stop: int | None = None, **settings: Any
) -> dict[str, Any]:
    where = {"source": str(source), "out": str(folder / name)}
    return {"name": name, "settings": SETTINGS | settings, "stop": stop} | where


def _new_job(
    folder: Path, name: str, config: Path, stop: int | None = None, **settings: Any
) -> dict[str, Any]:
    """A training from scratch, low-rank if `settings` do not say otherwise."""
    new = {"source": str(config), "tokenizer": str(config), "keep_ratio": 0.6, "rank_multiple": 4}
    job = {"name": name, "stop": stop, "out": str(folder / name)}
    return job | {"settings": SETTINGS | new | settings}


def _flags(settings: dict[str, Any]) -> list[str]:
    pairs = (
        (key, value[0] if isinstance(value, list) else value) for key, value in settings.items()
    )
    return [word for key, value in pairs for word in (f"--{key.replace('_', '-')}", str(value))]


def _finetune(source: Path, out: Path, *flags: str) -> subprocess.Popen[str]:
    return start_torchrun("-m", "lrcompress", "finetune", str(source), "--out", str(out), *flags)


def _reached(work: Path) -> int:
    """The step of the newest complete checkpoint under `work`; 0 if there is none."""
    checkpoints = [last_checkpoint(folder) for folder in work.glob("*")]
    return max((int(path.rpartition("-")[2]) for path in checkpoints if path), default=0)


def _kill_a_run(source: Path, out: Path) -> None:
    """Starts the run `out` and ends torchrun when there is a checkpoint, written to its end."""
    process = _finetune(source, out, *_flags(LONG))
    work = out.with_name(f".{out.name}.finetune")
    until = time.monotonic() + TIMEOUT
    while _reached(work) < 20:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert wait_for(process)[0] != 0
    assert not out.exists()


@pytest.mark.parametrize("name", ["plain", "passes", "epochs", "shard", "shard_passes", "new"])
def test_two_processes_give_what_one_gives(runs: Runs, name: str) -> None:
    alone = runs.run_alone(name)["passes"]
    runs.check_same(name, f"{name}.alone", ROUNDING)
    by_rank = [runs.outcome(name, rank)["passes"] for rank in (0, 1)]
    passes = runs.jobs[name]["settings"].get("gradient_accumulation", 1)
    assert len(by_rank[0]) == len(by_rank[1]) == 12 * passes
    for start in range(0, 12 * passes, passes):
        step = slice(start, start + passes)
        shared = [sequence for ran in by_rank for batch in ran[step] for sequence in batch]
        expected = [sequence for batch in alone[step] for sequence in batch]
        assert sorted(shared) == sorted(expected)
        assert len(expected) == 4


@pytest.mark.parametrize("name", ["timed", "timed_shard"])
def test_processes_agree_on_the_end_of_the_time(runs: Runs, name: str) -> None:
    outcomes = [runs.outcome(name, rank) for rank in (0, 1)]
    assert [outcome["error"] for outcome in outcomes] == [None, None]
    steps = [len(outcome["passes"]) for outcome in outcomes]
    assert steps[0] == steps[1] == runs.losses(name)[-1, 0]
    assert runs.losses(name)[-1, 1] < runs.losses(name)[0, 1]


@pytest.mark.parametrize(
    ("name", "like"),
    [("stopped", "plain"), ("shard_stopped", "shard"), ("new_stopped", "new_shard")],
)
def test_an_interrupted_run_ends_with_the_same_weights(runs: Runs, name: str, like: str) -> None:
    assert [len(runs.outcome(name, rank)["passes"]) for rank in (0, 1)] == [12 - 4] * 2
    runs.check_same(name, like, EXACT)


def test_an_interrupted_run_goes_on_in_one_process(runs: Runs) -> None:
    assert runs.outcome("moved", 0)["error"][0] == "KeyboardInterrupt"
    assert len(worker.run(runs.jobs["moved"] | {"stop": None})["passes"]) == 12 - 4
    runs.check_same("moved", "plain", ROUNDING)


def test_a_killed_run_goes_on_from_its_checkpoint(runs: Runs) -> None:
    assert len(runs.outcome("killed", 0)["passes"]) <= 100
    runs.check_same("killed", "undisturbed", EXACT)


def test_a_sharded_run_leaves_an_ordinary_checkpoint(runs: Runs) -> None:
    source, sharded = Path(runs.jobs["shard"]["source"]), runs.folder / "shard"
    assert {f.name for f in sharded.iterdir()} == {f.name for f in source.iterdir()}
    assert (sharded / "config.json").read_text() == (source / "config.json").read_text()
    again = runs.jobs["shard"] | {"source": str(sharded), "out": str(runs.folder / "again")}
    again["settings"] = again["settings"] | {"shard": False}
    assert worker.run(again)["error"] is None
    best = runs.losses("shard")[:, 1].min()
    _check_close(runs.losses("again")[0, 1], best, ROUNDING)


@pytest.mark.parametrize("name", ["new_shard", "new_dense"])
def test_a_new_model_that_was_sharded_is_like_one_that_was_not(runs: Runs, name: str) -> None:
    runs.run_alone(name)
    runs.check_same(name, f"{name}.alone", ROUNDING)
    sharded, alone = runs.folder / name, runs.folder / f"{name}.alone"
    assert {f.name for f in sharded.iterdir()} == {f.name for f in alone.iterdir()}
    assert (sharded / "config.json").read_text() == (alone / "config.json").read_text()
    records = [json.loads((out / "lrcompress.json").read_text()) for out in (sharded, alone)]
    assert records[0].keys() == records[1].keys()
    assert not list(runs.folder.glob(".new*"))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nowhere", "does not exist"),
        ("no_text", "nowhere.txt"),
        ("diverges", "training diverged"),
        ("uneven", "--train norms"),
        ("new_uneven", "--vocab-size"),
    ],
)
def test_every_process_ends_and_the_main_one_says_why(runs: Runs, name: str, words: str) -> None:
    main, other = (runs.outcome(name, rank)["error"] for rank in (0, 1))
    assert main[0] == "InputError"
    assert words in main[1]
    assert other[0] == "MainProcessFailedError"
    assert not (runs.folder / name).exists()


def test_the_command_fails_with_one_sentence(factorized: Path, tmp_path: Path) -> None:
    code, output, errors = wait_for(_finetune(factorized, tmp_path, "--data", "pydoc"))
    assert code != 0
    assert errors.count("Error: output") == 1
    assert errors.count("exitcode  : 2") == 2  # what torchrun says of each process
    assert not output
    assert not list(tmp_path.iterdir())


Told = Callable[[int, int], None]


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Told:
    """Sets what torchrun tells: processes, and those on this machine."""

    def tell(count: int, here: int) -> None:
        for name, value in (
            ("WORLD_SIZE", count),
            ("LOCAL_WORLD_SIZE", here),
            ("RANK", 1),
            ("LOCAL_RANK", 1),
        ):
            monkeypatch.setenv(name, str(value))

    return tell


def test_a_step_is_shared(told: Told) -> None:
    assert distributed.sequences_per_pass(8, 2) == 4
    with pytest.raises(InputError, match="multiple of 3, such as --batch-size 9"):
        distributed.sequences_per_pass(8, 3)
    told(4, 2)
    assert distributed.sequences_per_pass(8, 2) == 1
    with pytest.raises(InputError, match=r"4 processes.*--batch-size 12"):
        distributed.sequences_per_pass(9, 1)


def test_a_process_has_its_own_device(told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    assert distributed.local_device("cuda:1") == "cuda:1"
    told(4, 2)
    assert distributed.local_device("cpu") == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert distributed.local_device("auto") == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert distributed.local_device("auto") == "cuda:1"
    with pytest.raises(InputError, match="--device auto"):
        distributed.local_device("cuda:1")
    told(4, 4)
    with pytest.raises(InputError, match="4 processes on a machine with 2 GPUs"):
        distributed.local_device("auto")


def test_what_cannot_be_shared_is_said(factorized: Path, tmp_path: Path, told: Told) -> None:
    flags = ("--out", tmp_path / "out", "--data", "pydoc")
    result = invoke("finetune", factorized, *flags, "--shard")
    assert result.exit_code == 2
    assert "torchrun --nproc-per-node" in result.output
    result = invoke("finetune", factorized, *flags, "--batch-size", 3, "--gradient-accumulation", 2)
    assert result.exit_code == 2
    assert "--batch-size 4" in result.output
    told(2, 2)
    result = invoke("inspect", factorized)
    assert result.exit_code == 2
    assert "without torchrun" in result.output
