"""Runs commands in forked processes, which can be killed or limited at any moment.

A server process imports what the commands need, and forks for each command, so that it starts at
once. Linux only.
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
    """When to kill a process.

    Either by SIGKILL once it has used `seconds` of CPU time; or by SIGKILL just before it changes a
    file or folder below `folder` for the time number `operation`; or, with `torn` in addition, from
    that change on in the write that makes a file larger than `torn` bytes.
    """

    seconds: float | None = None
    operation: int | None = None
    torn: int | None = None
    folder: str = "/"


NEVER = Moment()


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int
    """Its exit code, or minus the signal that ended it."""
    output: str
    """What it wrote to stdout and stderr."""
    seconds: float = 0.0
    """Of CPU time; 0 where it was killed."""
    operations: int = 0
    """Changes of files; 0 where it was killed."""

    @property
    def was_killed(self) -> bool:
        return self.code in (-signal.SIGKILL, -signal.SIGXFSZ)


class Forked:
    """A running command."""

    def __init__(
        self, command: Sequence[object], moment: Moment, limits: Mapping[str, int]
    ) -> None:
        self.moment = moment
        self.output, output_writer = CONTEXT.Pipe(duplex=False)
        self.usage, usage_writer = CONTEXT.Pipe(duplex=False)
        arguments = [str(argument) for argument in command]
        self.process = CONTEXT.Process(
            target=_command, args=(arguments, moment, dict(limits), output_writer, usage_writer)
        )
        self.process.start()
        output_writer.close()
        usage_writer.close()

    def wait(self) -> Outcome:
        """Waits until the command ends by itself, or kills it when its moment has come."""
        if self.moment.seconds is not None:
            while self.process.exitcode is None and self._cpu_seconds() < self.moment.seconds:
                time.sleep(POLL)
            self.process.kill()
        output = b""
        while chunk := os.read(self.output.fileno(), 65536):
            output += chunk
        self.process.join()
        assert self.process.exitcode is not None
        try:
            seconds, operations = self.usage.recv()
        except EOFError:
            seconds, operations = 0.0, 0
        return Outcome(self.process.exitcode, output.decode(), seconds, operations)

    def _cpu_seconds(self) -> float:
        """CPU time, because a busy machine does not change it, unlike wall-clock time."""
        try:
            text = Path(f"/proc/{self.process.pid}/schedstat").read_text()
        except OSError:  # it has ended
            return float("inf")
        return int(text.split()[0]) / 1e9


def run(
    command: Sequence[object], moment: Moment = NEVER, limits: Mapping[str, int] | None = None
) -> Outcome:
    """Runs a command line of lrcompress in its own process.

    `limits` maps the end of a name RLIMIT_... of `resource` to its value: FSIZE in bytes, NOFILE
    and AS as the amount above what the process uses at its start.
    """
    return Forked(command, moment, limits or {}).wait()


def _command(
    arguments: list[str],
    moment: Moment,
    limits: Mapping[str, int],
    output_writer: Connection,
    usage_writer: Connection,
) -> None:
    torch.set_num_threads(1)
    for stream in (1, 2):
        os.dup2(output_writer.fileno(), stream)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    changes = _watch(moment)
    for name, value in limits.items():
        _limit(name, value + {"AS": _address_space(), "NOFILE": _open_files()}.get(name, 0))
    try:
        main(arguments)
    finally:
        sys.stdout.flush()
        usage_writer.send((time.thread_time(), len(changes)))


def _limit(name: str, value: int) -> None:
    kind = getattr(resource, f"RLIMIT_{name}")
    resource.setrlimit(kind, (value, resource.getrlimit(kind)[1]))


def _address_space() -> int:
    match = re.search(r"VmSize:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None
    return int(match[1]) * 1024


def _open_files() -> int:
    """The lowest free file descriptor: as a limit, it lets no further file be opened."""
    free = os.dup(0)
    os.close(free)
    return free


def _watch(moment: Moment) -> list[str]:
    """A list that grows with each change that Python makes below the folder of `moment`."""
    changes: list[str] = []

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if _is_change(event, arguments, moment.folder):
            changes.append(event)
            if len(changes) == moment.operation:
                _die(moment.torn)

    sys.addaudithook(audit)
    return changes


def _is_change(event: str, arguments: tuple[Any, ...], folder: str) -> bool:
    if event == "open":
        return bool((arguments[2] or 0) & OPENS_TO_WRITE) and str(arguments[0]).startswith(folder)
    if event not in CHANGES:
        return False
    path = str(arguments[0])
    # rmtree names files relative to their folder
    return path.startswith(folder) or not Path(path).is_absolute()


def _die(torn: int | None) -> None:
    if torn is None:
        os.kill(os.getpid(), signal.SIGKILL)
    else:  # the kernel kills the process in the write that reaches the limit
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        _limit("FSIZE", torn)
