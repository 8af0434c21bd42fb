"""Commands killed at any moment: nothing half-written, nothing lost, and the same result after it.

Moments are spread over the CPU time of the whole command, over its changes of files, and over the
bytes of the files that it writes.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import random
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import lrcompress
from lrcompress.checkpoint.verify import verify
from lrcompress.runtime.errors import InputError
from tests.conftest import SMALL, small_recipe
from tests.torture import forked
from tests.torture.conftest import Tally, Times
from tests.torture.forked import NEVER, Done, Moment

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks and /proc of Linux")

SEED = 8
# bytes at which a file is torn: from the first one to the size of the tiny model's weights
TEAR = (1, 100_000)
GOLDEN = (5**0.5 - 1) / 2
# what two equal runs differ in, in JSON
OTHERWISE = {"seconds", "tokens_per_second", "memory", "inputs"}
TRAIN = (
    "--max-steps", 6, "--train-length", 32, "--held-out", 2, "--eval-every", 2,
    "--learning-rate", "3e-3",
)  # fmt: skip


@dataclass(frozen=True)
class Place:
    """What commands read, which has to stay as it is, and where they write."""

    inputs: Path
    work: Path

    @property
    def out(self) -> Path:
        return self.work / "out"


@pytest.fixture
def place(tmp_path: Path, dense: Path, factorized: Path) -> Place:
    found = Place(tmp_path / "inputs", tmp_path / "work")
    shutil.copytree(dense, found.inputs / "dense")
    shutil.copytree(factorized, found.inputs / "low")
    text = found.inputs / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 200, "utf-8")
    found.work.mkdir()
    return found


Command = tuple[object, ...]


def _factorize(place: Place) -> Command:
    budget = ("--keep-ratio", "0.6", "--refine", "--refine-epochs", "2")
    return ("factorize", place.inputs / "dense", "--out", place.out, *budget, *SMALL)


def _streaming(place: Place) -> Command:
    text = ("--streaming", "--calibration", place.inputs / "text.txt")
    return (*_factorize(place), *text)


def _finetune(place: Place) -> Command:
    text = ("--data", place.inputs / "text.txt", *TRAIN)
    return ("finetune", place.inputs / "low", "--teacher", place.inputs / "dense", "--out",
            place.out, *text)  # fmt: skip


def _pretrain(place: Place) -> Command:
    dense, text = place.inputs / "dense", place.inputs / "text.txt"
    given = ("--tokenizer", dense, "--keep-ratio", "0.5", "--data", text, *TRAIN)
    return ("pretrain", dense / "config.json", "--out", place.out, *given)


def _recipe(place: Place, more: str = "") -> Path:
    file, text = place.inputs / "recipe.yaml", place.inputs / "text.txt"
    return small_recipe(file, place.inputs / "dense", text, more)


FEWER = ("--set", "evaluate.speed=false", "--set", "evaluate.compared_windows=1")


def _sweep(place: Place) -> Command:
    points = ("--keep-ratio", "0.8,0.6", "--method", "svd,whitened")
    return ("sweep", _recipe(place), place.out, *points, *FEWER)


def _run(place: Place) -> Command:
    training = (
        f"finetune: {{data: {place.inputs / 'train.txt'}, max_steps: 4, train_length: 32,\n"
        "  held_out: 2, eval_every: 2, learning_rate: 3e-3}\n"
    )
    (place.inputs / "train.txt").write_text("Pack my box with five dozen jugs of ink. " * 60)
    return ("run", _recipe(place, training), place.out, *FEWER)


def _overwrite(place: Place) -> Command:
    return ("run", _recipe(place), place.out, *FEWER, "--overwrite")


def _older_run(place: Place) -> None:
    """A finished run of another recipe."""
    done = forked.run((*_overwrite(place), "--set", "factorize.keep_ratio=0.8"))
    assert done.code == 0, done.said


def _nothing(place: Place) -> None:
    """The folder is new."""


@dataclass(frozen=True)
class Case:
    """A command, what is there before it, and how often it is killed."""

    command: Callable[[Place], Command]
    kills: int
    sample: int
    before: Callable[[Place], None] = _nothing


CASES = {
    "factorize": Case(_factorize, 18, 2),
    "factorize --streaming": Case(_streaming, 16, 1),
    "finetune": Case(_finetune, 20, 2),
    "pretrain": Case(_pretrain, 8, 1),
    "sweep": Case(_sweep, 14, 1),
    "run": Case(_run, 14, 1),
    "run --overwrite": Case(_overwrite, 10, 1, _older_run),
}


@pytest.mark.parametrize("name", CASES)
def test_killed_at_any_moment(place: Place, name: str, times: Times, tally: Tally) -> None:
    case = CASES[name]
    kept = _Kept(place, case)
    source, wanted, goes_on = _bytes(place.inputs), times(case.kills, case.sample), False
    moments, hits, missed, whole = _moments(name, kept.undisturbed, str(place.work)), 0, 0, 0
    while hits < wanted:
        moment = next(moments)
        with _told(f"{name}, after {hits} kills of seed {SEED}: {moment}"):
            if not goes_on:
                kept.begin()
            killed = forked.run(kept.command, moment)
            assert killed.was_killed or killed.code == 0, killed.said
            hits, missed = hits + killed.was_killed, missed + (not killed.was_killed)
            assert missed <= wanted + 2, "moments are not within the time of the command"
            finished = kept.check_what_is_there()
            whole += finished and killed.was_killed
            # every third one is killed once more while it goes on
            goes_on = killed.was_killed and hits % 3 == 2 and hits < wanted and not finished
            if not goes_on:
                kept.check_the_same_command_again(finished)
    assert _bytes(place.inputs) == source
    tally("kills that hit a running process, and were survived", hits)
    tally("kills that left a whole output", whole)
    tally("moments at which the process had ended", missed)


def _moments(name: str, done: Done, folder: str) -> Iterator[Moment]:
    """One half by time, a quarter before a change of a file, a quarter inside of a file.

    Shares of the whole follow the golden ratio: any number of them is evenly spread.
    """
    draw = random.Random(f"{SEED} {name}")
    start = draw.random()
    for number in itertools.count():
        share = (start + number * GOLDEN) % 1
        operation = 1 + int(share * done.operations)
        torn = round(math.exp(draw.uniform(*map(math.log, TEAR))))
        moment = (
            Moment(seconds=share * done.seconds),
            Moment(operation=operation),
            Moment(seconds=share * done.seconds),
            Moment(operation=operation, torn=torn),
        )[number % 4]
        yield replace(moment, folder=folder)


@contextmanager
def _told(what: str) -> Iterator[None]:
    """Says in an error what was tried, so that it can be tried again."""
    try:
        yield
    except BaseException as error:
        error.add_note(what)
        raise


class _Kept:
    """One case: its command, what was there before it, and what it gives undisturbed."""

    def __init__(self, place: Place, case: Case) -> None:
        self.place = place
        case.before(place)
        self.older = place.work.with_name("older")
        shutil.copytree(place.work, self.older)  # with times: a run looks at them
        self.command = case.command(place)
        self.undisturbed = forked.run(self.command, replace(NEVER, folder=str(place.work)))
        assert self.undisturbed.code == 0, self.undisturbed.said
        self.content = _content(place.out)
        self.names = {path.name for path in place.work.iterdir()}
        self.models = {model: _weights(model) for model in _models(place.work)}
        self.old = {
            place.work / m.relative_to(self.older): _weights(m) for m in _models(self.older)
        }

    def begin(self) -> None:
        shutil.rmtree(self.place.work)
        shutil.copytree(self.older, self.place.work)

    def check_what_is_there(self) -> bool:
        """Every model under its name is whole, the new one or the older; in hidden folders, that or
        refused. Whether the whole of a command that writes a new folder is there."""
        right = {*self.models.values(), *self.old.values()}
        for folder in _models(self.place.work):
            parts = folder.relative_to(self.place.work).parts
            hidden = any(part.startswith(".") for part in parts)
            with _told(str(folder)):
                if hidden:
                    assert _weights(folder) in {None, *right}
                    continue
                assert _weights(folder) in {self.models[folder], self.old.get(folder)}
                assert [one.faults for one in verify(folder)] == [()]
        for folder in self.old:
            assert folder.is_dir(), "an older model is gone"
        return self.place.out in _models(self.place.work)

    def check_the_same_command_again(self, finished: bool) -> None:
        again = forked.run(self.command)
        assert "Traceback" not in again.said
        if finished:
            assert again.code == 2
            assert "exists: choose another folder" in again.said
        else:
            assert again.code == 0, again.said
            assert {path.name for path in self.place.work.iterdir()} == self.names
        assert _content(self.place.out) == self.content


def _models(folder: Path) -> list[Path]:
    """Folders with weights or a config, but those that a training goes on from."""
    found = {p.parent for name in ("config.json", "*.safetensors") for p in folder.rglob(name)}
    return sorted(path for path in found if not path.name.startswith("checkpoint-"))


def _weights(folder: Path) -> str | None:
    """Of every tensor of the model in `folder`; None if it is refused, in one sentence."""
    try:
        model, _ = lrcompress.load(folder)
    except InputError as error:
        return None if "\n" not in str(error) else f"several lines: {error}"
    mark = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        mark.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        mark.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return mark.hexdigest()


def _bytes(folder: Path) -> dict[str, tuple[str, int]]:
    """Of every file, and when it was written."""
    return {
        str(file): (hashlib.sha256(file.read_bytes()).hexdigest(), file.stat().st_mtime_ns)
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def _content(folder: Path) -> dict[str, Any]:
    """Of every file what two equal runs have in common: tensors byte for byte, JSON but for times,
    of others the name."""
    return {
        str(file.relative_to(folder)): _file_content(file)
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def _file_content(file: Path) -> Any:
    if file.suffix == ".json":
        found = json.loads(file.read_text("utf-8"))
        if file.parent.name == "stages":
            found.pop("model", None)  # when its files were written
        return _timeless(found)
    if file.suffix in (".safetensors", ".yaml"):
        return hashlib.sha256(file.read_bytes()).hexdigest()
    return None


def _timeless(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _timeless(part) for key, part in value.items() if key not in OTHERWISE}
    return [*map(_timeless, value)] if isinstance(value, list) else value
