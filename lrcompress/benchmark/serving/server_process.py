"""Starts a server as a process of its own, and stops it whatever happens."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from lrcompress.benchmark.serving.engines import LOOPBACK
from lrcompress.runtime.errors import InputError
from lrcompress.runtime.paths import user_path

# a server that has not stopped so long after it was asked to is killed
SECONDS_TO_STOP = 20.0
# from its last connection to the end of a server that fails
SECONDS_TO_END = 3.0
LINES_SHOWN = 12
LAST_BYTES = 200_000  # of a log that are searched for the reason
# colours and cursor movements of terminals
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@dataclass(frozen=True)
class ServerProcess:
    """A server that was started here; its output goes to the file `log`."""

    process: subprocess.Popen[bytes]
    log: Path

    @property
    def exit_code(self) -> int | None:
        """None while it runs."""
        return self.process.poll()

    def ends_soon(self) -> bool:
        """Whether it ends within SECONDS_TO_END: connections break before the process has ended."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(SECONDS_TO_END)
        return self.exit_code is not None

    def last_lines(self) -> list[str]:
        """The end of its log, without empty lines."""
        with self.log.open("rb") as file:
            file.seek(max(0, self.log.stat().st_size - LAST_BYTES))
            text = ESCAPES.sub("", file.read().decode("utf-8", "replace"))
        return list(deque((line for line in text.splitlines() if line.strip()), 2000))

    def reason(self, pattern: re.Pattern[str]) -> str:
        """What the log says last that `pattern` finds, else its last line."""
        lines = self.last_lines()
        reasons = [match[1] for line in lines if (match := pattern.search(line))]
        return (reasons or lines or ["its log is empty"])[-1].strip()


def find_program(name: str, setting: str) -> str:
    """The path of a program. Raises InputError, which names the `setting`, where there is none."""
    path = shutil.which(user_path(name))
    if path is None:
        raise InputError(f"{setting} {name!r} is not a program that can be run: correct its path")
    return path


def free_ports(count: int) -> list[int]:
    """Ports of the loopback address that nothing listens on."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind((LOOPBACK, 0))
        return [int(each.getsockname()[1]) for each in sockets]


@contextmanager
def running(
    command: Sequence[str], environment: dict[str, str], log: Path
) -> Iterator[ServerProcess]:
    """Runs `command` inside the block, with `environment` over the variables of this process.

    It is a session of its own, so that Ctrl-C reaches it through this process alone, and all its
    children are stopped with it. Raises InputError where the program cannot be run.
    """
    with log.open("wb") as output:
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | environment,
                start_new_session=True,
            )
        except OSError as error:
            raise InputError(f"{command[0]!r} cannot be run: {error.strerror}") from None
    try:
        yield ServerProcess(process, log)
    finally:
        _stop(process)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Asks the server and its children to end, and kills what is left of them."""
    _signal_group(process.pid, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(SECONDS_TO_STOP)
    _signal_group(process.pid, signal.SIGKILL)
    process.wait()


def _signal_group(group: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError, PermissionError):  # all of it has ended
        os.killpg(group, number)


@contextmanager
def interrupted_by_signals() -> Iterator[None]:
    """Inside, ending this process by SIGTERM or SIGHUP is an interruption, as Ctrl-C is, so that
    servers are stopped."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, signal.default_int_handler) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def deadline(seconds: float) -> Iterator[None]:
    """Yields, with a pause in between, until `seconds` have passed."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        yield
        time.sleep(0.2)
