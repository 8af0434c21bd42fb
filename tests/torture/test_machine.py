"""Faults of the machine: one clear sentence, an untouched input, nothing half-written."""

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
from tests.torture.conftest import Tally, Times
from tests.torture.forked import Done, Forked
from tests.torture.test_killed import CASES, Command, Place, _bytes, place

__all__ = ["place"]
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks and limits of Linux")

PATIENCE = 60  # seconds that a process may take to start


def _command(place: Place, name: str) -> Command:
    return CASES[name].command(place)


def _refused(done: Done, place: Place, *expected: str) -> bool:
    """Whether the command could not go on; then it has said why, in one sentence, and left no
    model. Otherwise the limit was wide enough."""
    assert "Traceback" not in done.said
    if done.code == 0:
        return False
    last = done.said.strip().splitlines()[-1]
    assert done.code == 1, done.said
    assert last.startswith("Error: ")
    assert any(words in last for words in expected), done.said
    assert done.said.count("Error: ") == 1
    assert not (place.out / "config.json").exists()
    assert not list(place.work.rglob("*.partial"))
    return True


@pytest.fixture
def disk(place: Place) -> Iterator[Path]:
    """The work folder on a file system of its own, of 64 KiB."""
    size = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(place.work)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if size.returncode:
        pytest.skip(f"no file system can be mounted here: {size.stderr.strip()}")
    yield place.work
    subprocess.run(["umount", str(place.work)], check=True)


@pytest.mark.parametrize("name", ["factorize", "finetune", "factorize --streaming"])
def test_a_full_disk(place: Place, disk: Path, name: str, tally: Tally) -> None:
    source = _bytes(place.inputs)
    done = forked.run(_command(place, name))
    assert _refused(done, place, "the disk is full")
    assert _bytes(place.inputs) == source
    if name == "finetune":  # with room, the same command goes on
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        assert forked.run(_command(place, name)).code == 0
    tally("machine faults told in one sentence", 1)


def test_a_folder_that_is_read_only(place: Place, disk: Path, tally: Tally) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    for name in ("factorize", "finetune", "sweep"):
        done = forked.run(_command(place, name))
        assert done.code in (1, 2), done.said
        assert done.said.startswith("Error: ")
        assert "not a folder to write to" in done.said or "read-only" in done.said
        assert done.said.count("\n") == 1
        tally("machine faults told in one sentence", 1)


@pytest.mark.parametrize("name", ["factorize", "finetune", "sweep"])
def test_files_that_may_not_grow(place: Place, name: str, times: Times, tally: Tally) -> None:
    """As on a full disk, where none can be mounted: writes fail at one size after another."""
    command = _command(place, name)
    source, faults = _bytes(place.inputs), 0
    for size in (2, 600, 9_000, 50_000)[: times(4, 1)]:
        done = forked.run(command, limits={"FSIZE": size})
        faults += _refused(done, place, "ulimit -f")
        _clear(place)
    assert faults
    assert _bytes(place.inputs) == source
    tally("machine faults told in one sentence", faults)


@pytest.mark.parametrize("name", ["factorize", "finetune"])
def test_too_many_open_files(place: Place, name: str, times: Times, tally: Tally) -> None:
    command = _command(place, name)
    source, faults = _bytes(place.inputs), 0
    for more in (0, 1, 2, 3, 4, 6)[: times(6, 2)]:
        done = forked.run(command, limits={"NOFILE": more})
        faults += _refused(done, place, "too many files are open")
        _clear(place)
    assert faults
    assert _bytes(place.inputs) == source
    tally("machine faults told in one sentence", faults)


@pytest.mark.parametrize("name", ["factorize", "finetune"])
def test_out_of_memory(place: Place, name: str, times: Times, tally: Tally) -> None:
    """With a little more address space than the imports took. Libraries in C++ and Rust may end the
    process themselves: that is as a kill, and leaves no output."""
    command = _command(place, name)
    source, faults, ended = _bytes(place.inputs), 0, 0
    for megabytes in (32, 8, 64, 16, 128, 1)[: times(6, 2)]:
        done = forked.run(command, limits={"AS": megabytes << 20})
        if done.code in (-signal.SIGABRT, -signal.SIGSEGV):
            ended += 1
            assert not place.out.exists()
        else:
            faults += _refused(done, place, "out of memory", "no thread can be started")
        _clear(place)
    assert faults
    assert _bytes(place.inputs) == source
    tally("machine faults told in one sentence", faults)
    tally("processes that a library ended for want of memory", ended)


def _holds_a_lock(pid: int) -> bool:
    lines = Path("/proc/locks").read_text().splitlines()
    return any("FLOCK" in line and str(pid) in line.split() for line in lines)


def _clear(place: Place) -> None:
    shutil.rmtree(place.work)
    place.work.mkdir()


@pytest.mark.parametrize(("name", "lock"), [("factorize", ".out.lock"), ("sweep", "out/.lock")])
def test_two_processes_on_one_output(place: Place, name: str, lock: str, tally: Tally) -> None:
    first = Forked(_command(place, name), forked.NEVER, {})
    pid = first.process.pid
    assert pid is not None
    started = time.monotonic()
    while not _holds_a_lock(pid):
        assert time.monotonic() < started + PATIENCE
        time.sleep(forked.POLL)
    os.kill(pid, signal.SIGSTOP)  # so that the second one comes in its midst
    assert (place.work / lock).exists()
    second = forked.run(_command(place, name))
    os.kill(pid, signal.SIGCONT)
    assert second.code == 2, second.said
    expected = (
        f"Error: another process is writing {str(place.out)!r}: wait for it, or choose another"
    )
    assert second.said == f"{expected} folder\n"
    assert first.wait().code == 0
    assert not (place.work / lock).exists()
    tally("second writers refused", 1)
