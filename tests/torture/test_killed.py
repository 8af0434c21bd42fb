"""Commands killed at any moment leave nothing half-written, lose nothing, and can be run again.

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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import lrcompress
from lrcompress.checkpoint.verify import verify
from lrcompress.runtime.errors import InputError
from tests.torture import forked
from tests.torture.cases import CASES, Case, file_states
from tests.torture.conftest import Tally, Times, Workspace
from tests.torture.forked import NEVER, Moment, Outcome

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks and /proc of Linux")

SEED = 8
# bytes after which a write is cut: from the first one to the size of the tiny model's weights
TEAR_RANGE = (1, 100_000)
GOLDEN = (5**0.5 - 1) / 2
# keys in JSON that differ between two equal runs
VOLATILE_KEYS = {"seconds", "stages", "tokens_per_second", "memory", "inputs"}


@pytest.mark.parametrize("name", CASES)
def test_killed_at_any_moment(workspace: Workspace, name: str, times: Times, tally: Tally) -> None:
    case = CASES[name]
    trial = _Trial(workspace, case)
    inputs, kills, resume = file_states(workspace.inputs), times(case.kills, case.sample), False
    moments, hits, missed, whole = _moments(name, trial.undisturbed, str(workspace.work)), 0, 0, 0
    while hits < kills:
        moment = next(moments)
        with _with_note(f"{name}, after {hits} kills of seed {SEED}: {moment}"):
            if not resume:
                trial.begin()
            killed = forked.run(trial.command, moment)
            assert killed.was_killed or killed.code == 0, killed.output
            hits, missed = hits + killed.was_killed, missed + (not killed.was_killed)
            assert missed <= kills + 2, "moments are not within the time of the command"
            finished = trial.check_models()
            whole += finished and killed.was_killed
            # every third command is killed once more while it resumes
            resume = killed.was_killed and hits % 3 == 2 and hits < kills and not finished
            if not resume:
                trial.check_same_command_again(finished)
    assert file_states(workspace.inputs) == inputs
    tally("kills that hit a running process, and were survived", hits)
    tally("kills that left a whole output", whole)
    tally("moments at which the process had ended", missed)


def _moments(name: str, undisturbed: Outcome, folder: str) -> Iterator[Moment]:
    """Half of the moments by time, a quarter before a change of a file, a quarter inside a file.

    Multiples of the golden ratio modulo 1 are evenly spread, whatever their number.
    """
    draw = random.Random(f"{SEED} {name}")
    start = draw.random()
    for number in itertools.count():
        share = (start + number * GOLDEN) % 1
        operation = 1 + int(share * undisturbed.operations)
        torn = round(math.exp(draw.uniform(*map(math.log, TEAR_RANGE))))
        moment = (
            Moment(seconds=share * undisturbed.seconds),
            Moment(operation=operation),
            Moment(seconds=share * undisturbed.seconds),
            Moment(operation=operation, torn=torn),
        )[number % 4]
        yield replace(moment, folder=folder)


@contextmanager
def _with_note(attempt: str) -> Iterator[None]:
    """Adds to an error what was tried, so that it can be repeated."""
    try:
        yield
    except BaseException as error:
        error.add_note(attempt)
        raise


class _Trial:
    """A case with its command, the work folder before it, and the result of an undisturbed run."""

    def __init__(self, workspace: Workspace, case: Case) -> None:
        self.workspace = workspace
        case.prepare(workspace)
        self.older = workspace.work.with_name("older")
        shutil.copytree(workspace.work, self.older)  # also the times of files, which a run compares
        self.command = case.command(workspace)
        self.undisturbed = forked.run(self.command, replace(NEVER, folder=str(workspace.work)))
        assert self.undisturbed.code == 0, self.undisturbed.output
        self.content = _content(workspace.out)
        self.names = {path.name for path in workspace.work.iterdir()}
        self.models = {model: _weights(model) for model in _models(workspace.work)}
        self.old = {
            workspace.work / m.relative_to(self.older): _weights(m) for m in _models(self.older)
        }

    def begin(self) -> None:
        shutil.rmtree(self.workspace.work)
        shutil.copytree(self.older, self.workspace.work)

    def check_models(self) -> bool:
        """Whether the output folder holds a model.

        Every model must be complete, either the new one or the older; in hidden folders it may also
        be refused.
        """
        complete = {*self.models.values(), *self.old.values()}
        for folder in _models(self.workspace.work):
            parts = folder.relative_to(self.workspace.work).parts
            hidden = any(part.startswith(".") for part in parts)
            with _with_note(str(folder)):
                if hidden:
                    assert _weights(folder) in {None, *complete}
                    continue
                assert _weights(folder) in {self.models[folder], self.old.get(folder)}
                assert [result.faults for result in verify(folder)] == [()]
        for folder in self.old:
            assert folder.is_dir(), "an older model is gone"
        return self.workspace.out in _models(self.workspace.work)

    def check_same_command_again(self, finished: bool) -> None:
        again = forked.run(self.command)
        assert "Traceback" not in again.output
        if finished:
            assert again.code == 2
            assert "exists: choose another name" in again.output
        else:
            assert again.code == 0, again.output
            assert {path.name for path in self.workspace.work.iterdir()} == self.names
        assert _content(self.workspace.out) == self.content


def _models(folder: Path) -> list[Path]:
    """Folders with weights or a config, without the checkpoints of a training."""
    folders = {p.parent for name in ("config.json", "*.safetensors") for p in folder.rglob(name)}
    return sorted(path for path in folders if not path.name.startswith("checkpoint-"))


def _weights(folder: Path) -> str | None:
    """The SHA-256 of all tensors of the model in `folder`; None where it is refused."""
    try:
        model, _ = lrcompress.load(folder)
    except InputError as error:
        return None if "\n" not in str(error) else f"several lines: {error}"
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _content(folder: Path) -> dict[str, Any]:
    """What two equal runs have in common, by file: the hash of tensors and YAML, JSON without
    VOLATILE_KEYS, None for other files."""
    return {
        str(file.relative_to(folder)): _file_content(file)
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def _file_content(file: Path) -> Any:
    if file.suffix == ".json":
        content = json.loads(file.read_text("utf-8"))
        if file.parent.name == "stages":
            content.pop("model", None)  # when its files were written
        return _timeless(content)
    if file.suffix in (".safetensors", ".yaml"):
        return hashlib.sha256(file.read_bytes()).hexdigest()
    return None


def _timeless(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _timeless(item) for key, item in value.items() if key not in VOLATILE_KEYS}
    return [*map(_timeless, value)] if isinstance(value, list) else value
