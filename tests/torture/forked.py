"""Commands in forked processes: they start at once, and can be killed or starved at any moment.

A server process imports what the commands need; each command is a fork of it. Linux only.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import resource
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from lrcompress.cli.app import main

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_name] = "1"  # of the server: a fork has no other threads

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.torture.imported", __name__])
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.chmod", "os.truncate"}
OPENS_TO_WRITE = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
POLL = 0.002  # seconds


@dataclass(frozen=True)
class Moment:
    """When a process is to die: by SIGKILL once it has used `seconds` of CPU time, or just before
    its change number `operation` of a file or folder below `folder`; with `torn` not there, but in
    the middle of the next file that grows beyond so many bytes."""

    seconds: float | None = None
    operation: int | None = None
    torn: int | None = None
    folder: str = "/"


NEVER = Moment()


@dataclass(frozen=True)
class Done:
    """How a command ended: its exit code, or minus the signal that ended it; what it said; and, if
    it came to an end, its seconds of CPU time and its changes of files."""

    code: int
    said: str
    seconds: float = 0.0
    operations: int = 0

    @property
    def was_killed(self) -> bool:
        return self.code in (-signal.SIGKILL, -signal.SIGXFSZ)


class Forked:
    """A command that runs."""

    def __init__(
        self, command: Sequence[object], moment: Moment, limits: Mapping[str, int]
    ) -> None:
        self.moment = moment
        self.said, speaks = CONTEXT.Pipe(duplex=False)
        self.found, finds = CONTEXT.Pipe(duplex=False)
        arguments = [str(argument) for argument in command]
        given = (arguments, moment, dict(limits), speaks, finds)
        self.process = CONTEXT.Process(target=_command, args=given)
        self.process.start()
        speaks.close()
        finds.close()

    def wait(self) -> Done:
        """Until it has ended, by itself or by SIGKILL when its moment has come."""
        if self.moment.seconds is not None:
            while self.process.exitcode is None and self._used() < self.moment.seconds:
                time.sleep(POLL)
            self.process.kill()
        said = b""
        while part := os.read(self.said.fileno(), 65536):
            said += part
        self.process.join()
        assert self.process.exitcode is not None
        try:
            seconds, operations = self.found.recv()
        except EOFError:
            seconds, operations = 0.0, 0
        return Done(self.process.exitcode, said.decode(), seconds, operations)

    def _used(self) -> float:
        """Seconds of CPU time: unlike the clock's they are the same on a busy machine."""
        try:
            text = Path(f"/proc/{self.process.pid}/schedstat").read_text()
        except OSError:  # it has ended
            return float("inf")
        return int(text.split()[0]) / 1e9


def run(
    command: Sequence[object], moment: Moment = NEVER, limits: Mapping[str, int] | None = None
) -> Done:
    """A command line of lrcompress, in a process of its own.

    `limits` are those of `resource` by the ends of their names: FSIZE, or how much more than now of
    NOFILE and AS.
    """
    return Forked(command, moment, limits or {}).wait()


def _command(
    arguments: list[str],
    moment: Moment,
    limits: Mapping[str, int],
    speaks: Connection,
    finds: Connection,
) -> None:
    torch.set_num_threads(1)
    for stream in (1, 2):
        os.dup2(speaks.fileno(), stream)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    changes = _watch(moment)
    for name, value in limits.items():
        _limit(name, value + {"AS": _address_space(), "NOFILE": _open_files()}.get(name, 0))
    try:
        main(arguments)
    finally:
        sys.stdout.flush()
        finds.send((time.thread_time(), len(changes)))


def _limit(name: str, value: int) -> None:
    kind = getattr(resource, f"RLIMIT_{name}")
    resource.setrlimit(kind, (value, resource.getrlimit(kind)[1]))


def _address_space() -> int:
    found = re.search(r"VmSize:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def _open_files() -> int:
    """The limit under which no more can be opened than is open: the lowest number that is free."""
    free = os.dup(0)
    os.close(free)
    return free


def _watch(moment: Moment) -> list[str]:
    """A list of the changes that Python makes below the moment's folder, as it makes them."""
    changes: list[str] = []

    def audit(event: str, found: tuple[Any, ...]) -> None:
        if _changes(event, found, moment.folder):
            changes.append(event)
            if len(changes) == moment.operation:
                _die(moment.torn)

    sys.addaudithook(audit)
    return changes


def _changes(event: str, found: tuple[Any, ...], folder: str) -> bool:
    if event == "open":
        return bool((found[2] or 0) & OPENS_TO_WRITE) and str(found[0]).startswith(folder)
    if event not in CHANGES:
        return False
    inside = str(found[0]).startswith(folder)
    return inside or not Path(str(found[0])).is_absolute()  # rmtree names files by their folder


def _die(torn: int | None) -> None:
    if torn is None:
        os.kill(os.getpid(), signal.SIGKILL)
    else:  # as abrupt: the kernel ends the process in the write that reaches the limit
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        _limit("FSIZE", torn)
