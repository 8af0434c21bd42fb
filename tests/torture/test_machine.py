"""Faults of the machine give one sentence, leave the input as it is, and nothing half-written."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.torture import forked
from tests.torture.cases import CASES, Command, file_states
from tests.torture.conftest import Tally, Times, Workspace
from tests.torture.forked import Forked, Outcome

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks and limits of Linux")

PATIENCE = 60  # seconds that a process may take to start


def _command(workspace: Workspace, name: str) -> Command:
    return CASES[name].command(workspace)


def _refused(outcome: Outcome, workspace: Workspace, *expected: str) -> bool:
    """Whether the command failed: then it must give the reason in one sentence and leave no model.

    Otherwise the limit was wide enough.
    """
    assert "Traceback" not in outcome.output
    if outcome.code == 0:
        return False
    last = outcome.output.strip().splitlines()[-1]
    assert outcome.code == 1, outcome.output
    assert last.startswith("Error: ")
    assert any(words in last for words in expected), outcome.output
    assert outcome.output.count("Error: ") == 1
    assert not (workspace.out / "config.json").exists()
    assert not list(workspace.work.rglob("*.partial"))
    return True


@pytest.fixture
def disk(workspace: Workspace) -> Iterator[Path]:
    """The work folder on a file system of its own, of 64 KiB."""
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(workspace.work)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if mount.returncode:
        pytest.skip(f"no file system can be mounted here: {mount.stderr.strip()}")
    yield workspace.work
    subprocess.run(["umount", str(workspace.work)], check=True)


@pytest.mark.parametrize("name", ["factorize", "finetune", "factorize --streaming"])
def test_a_full_disk(workspace: Workspace, disk: Path, name: str, tally: Tally) -> None:
    inputs = file_states(workspace.inputs)
    outcome = forked.run(_command(workspace, name))
    assert _refused(outcome, workspace, "the disk is full")
    assert file_states(workspace.inputs) == inputs
    if name == "finetune":  # with more room, the same command resumes
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        assert forked.run(_command(workspace, name)).code == 0
    tally("machine faults told in one sentence", 1)


def test_a_folder_that_is_read_only(workspace: Workspace, disk: Path, tally: Tally) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    for name in ("factorize", "finetune", "sweep"):
        outcome = forked.run(_command(workspace, name))
        assert outcome.code in (1, 2), outcome.output
        assert outcome.output.startswith("Error: ")
        assert "not a folder to write to" in outcome.output or "read-only" in outcome.output
        assert outcome.output.count("\n") == 1
        tally("machine faults told in one sentence", 1)


@pytest.mark.parametrize("name", ["factorize", "finetune", "sweep"])
def test_files_that_may_not_grow(
    workspace: Workspace, name: str, times: Times, tally: Tally
) -> None:
    """As on a full disk, also where none can be mounted: writes fail at increasing sizes."""
    command = _command(workspace, name)
    inputs, faults = file_states(workspace.inputs), 0
    for size in (2, 600, 9_000, 50_000)[: times(4, 1)]:
        outcome = forked.run(command, limits={"FSIZE": size})
        faults += _refused(outcome, workspace, "ulimit -f")
        _clear(workspace)
    assert faults
    assert file_states(workspace.inputs) == inputs
    tally("machine faults told in one sentence", faults)


@pytest.mark.parametrize("name", ["factorize", "finetune"])
def test_too_many_open_files(workspace: Workspace, name: str, times: Times, tally: Tally) -> None:
    command = _command(workspace, name)
    inputs, faults = file_states(workspace.inputs), 0
    for more in (0, 1, 2, 3, 4, 6)[: times(6, 2)]:
        outcome = forked.run(command, limits={"NOFILE": more})
        faults += _refused(outcome, workspace, "too many files are open")
        _clear(workspace)
    assert faults
    assert file_states(workspace.inputs) == inputs
    tally("machine faults told in one sentence", faults)


@pytest.mark.parametrize("name", ["factorize", "finetune"])
def test_out_of_memory(workspace: Workspace, name: str, times: Times, tally: Tally) -> None:
    """With little more address space than the imports take.

    Libraries in C++ and Rust may abort the process, which then leaves no output, as a killed one.
    """
    command = _command(workspace, name)
    inputs, faults, aborted = file_states(workspace.inputs), 0, 0
    for megabytes in (32, 8, 64, 16, 128, 1)[: times(6, 2)]:
        outcome = forked.run(command, limits={"AS": megabytes << 20})
        if outcome.code in (-signal.SIGABRT, -signal.SIGSEGV):
            aborted += 1
            assert not workspace.out.exists()
        else:
            faults += _refused(outcome, workspace, "out of memory", "no thread can be started")
        _clear(workspace)
    assert faults
    assert file_states(workspace.inputs) == inputs
    tally("machine faults told in one sentence", faults)
    tally("processes that a library ended for want of memory", aborted)


def _holds_a_lock(pid: int) -> bool:
    lines = Path("/proc/locks").read_text().splitlines()
    return any("FLOCK" in line and str(pid) in line.split() for line in lines)


def _clear(workspace: Workspace) -> None:
    shutil.rmtree(workspace.work)
    workspace.work.mkdir()


@pytest.mark.parametrize(("name", "lock"), [("factorize", ".out.lock"), ("sweep", "out/.lock")])
def test_two_processes_on_one_output(
    workspace: Workspace, name: str, lock: str, tally: Tally
) -> None:
    first = Forked(_command(workspace, name), forked.NEVER, {})
    pid = first.process.pid
    assert pid is not None
    started = time.monotonic()
    while not _holds_a_lock(pid):
        assert time.monotonic() < started + PATIENCE
        time.sleep(forked.POLL)
    os.kill(pid, signal.SIGSTOP)  # so that the second starts while the first is running
    assert (workspace.work / lock).exists()
    second = forked.run(_command(workspace, name))
    os.kill(pid, signal.SIGCONT)
    assert second.code == 2, second.output
    expected = (
        f"Error: another process is writing {str(workspace.out)!r}: wait for it, or choose another"
    )
    assert second.output == f"{expected} folder\n"
    assert first.wait().code == 0
    assert not (workspace.work / lock).exists()
    tally("second writers refused", 1)
