"""The processes of one run under torchrun: devices, shares of the work, results and errors.

torchrun gives each process its rank in environment variables. Nothing here imports torch until a
process group is needed, so the command line can find the main process without importing torch.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar, copy_context
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TypeVar

from lrcompress.runtime.errors import InputError, MachineError
from lrcompress.runtime.progress import Progress

if TYPE_CHECKING:
    from torch import Tensor

S = TypeVar("S")
T = TypeVar("T")

# long, for slow processes: torchrun itself detects dead ones
COLLECTIVE_TIMEOUT = timedelta(hours=2)
# commands that share their work between processes
SHARED_COMMANDS = ("factorize", "finetune", "pretrain")
# true in the main process while `run_on_main` runs a function that no other process runs
MAIN_RUNS_ALONE = ContextVar("main_runs_alone", default=False)


class MainProcessFailedError(Exception):
    """The run failed, and the main process reports the error; this process exits with `code`."""

    def __init__(self, code: int) -> None:
        super().__init__(f"the main process reports what failed (exit code {code})")
        self.code = code


def world_size() -> int:
    """The number of processes that share the work; 1 inside `run_on_main`."""
    return 1 if MAIN_RUNS_ALONE.get() else int(os.environ.get("WORLD_SIZE", "1"))


def processes_here() -> int:
    """The number of processes that share the memory of this machine."""
    return 1 if world_size() == 1 else int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def rank() -> int:
    """The number of this process, from 0."""
    return int(os.environ.get("RANK", "0"))


def is_main() -> bool:
    """Whether this process writes files and messages for all processes."""
    return rank() == 0


def check_command(name: str | None) -> None:
    """Raises InputError where every process would run the whole command."""
    if world_size() > 1 and name not in SHARED_COMMANDS:
        raise InputError(f"{name} runs in one process: start it without torchrun")


def sequences_per_pass(batch_size: int, passes: int) -> int:
    """Sequences in one forward pass of one process.

    An optimizer step has `batch_size` sequences in all processes together, and each process makes
    `passes` forward passes in a step. Raises InputError where they do not divide `batch_size`.
    """
    total_passes = world_size() * passes
    if batch_size % total_passes:
        raise InputError(
            f"a batch size of {batch_size} cannot be shared by {world_size()} processes with "
            f"{passes} forward passes each: use a multiple of {total_passes}, such as "
            f"--batch-size {-(-batch_size // total_passes) * total_passes}"
        )
    return batch_size // total_passes


def shard_of(items: Sequence[T]) -> Sequence[T]:
    """The items that this process works on; every item belongs to exactly one process."""
    return items[rank() :: world_size()]


def map_sharded(
    items: Sequence[S], work: Callable[[S], T], progress: Progress, description: str
) -> list[T]:
    """`work` of every item, in the order of `items`, in every process.

    Each item is computed by one process and its result is sent to the others: tensors have to be
    on the CPU. Raises what `run_on_all` raises.
    """
    shard = shard_of(items)
    results = run_on_all(lambda: [work(item) for item in progress(shard, description, len(shard))])
    by_rank = all_gather(results)
    return [by_rank[index % world_size()][index // world_size()] for index in range(len(items))]


def all_gather(value: T) -> list[T]:
    """The `value` of every process, in the order of their ranks; tensors have to be on the CPU."""
    if world_size() == 1:
        return [value]
    import torch.distributed as dist

    values: list[T] = [value] * world_size()
    dist.all_gather_object(values, value)
    return values


def all_reduce_sums(sums: dict[str, Tensor], zeros: Callable[[str], Tensor]) -> None:
    """Adds up `sums` over all processes, in place.

    `zeros` makes the tensor for a name that this process lacks and another process has.
    """
    if world_size() == 1:
        return
    import torch.distributed as dist

    for name in sorted({name for names in all_gather(list(sums)) for name in names}):
        if name not in sums:
            sums[name] = zeros(name)
        dist.all_reduce(sums[name])


def local_device(device: str) -> str:
    """The device of this process if there are several processes; otherwise `device` unchanged.

    Raises InputError where `device` names one GPU, or there are more processes than GPUs.
    """
    if world_size() == 1 or device == "cpu":
        return device
    import torch

    if device != "auto":
        raise InputError(
            f"device {device!r} cannot serve {world_size()} processes: use --device auto"
        )
    if not torch.cuda.is_available():
        return "cpu"
    gpus, processes = torch.cuda.device_count(), processes_here()
    if processes > gpus:
        raise InputError(
            f"{processes} processes on a machine with {gpus} GPUs: use --nproc-per-node {gpus}"
        )
    return f"cuda:{os.environ['LOCAL_RANK']}"


@contextmanager
def process_group(device: str) -> Iterator[None]:
    """Connects the processes inside the block.

    An error leaves them connected, because `exit_after_main` needs the connection.
    """
    connected = world_size() == 1 or _is_connected()
    if not connected:
        _connect(device)
    yield
    if not connected:
        import torch.distributed as dist

        dist.destroy_process_group()


def _is_connected() -> bool:
    import torch.distributed as dist

    return dist.is_initialized()


def _connect(device: str) -> None:
    import torch
    import torch.distributed as dist

    uses_cuda = device != "cpu" and torch.cuda.is_available()
    backend = "cpu:gloo,cuda:nccl" if uses_cuda else "gloo"
    dist.init_process_group(backend, timeout=COLLECTIVE_TIMEOUT)
    process_device = run_on_all(lambda: local_device(device))
    if process_device.startswith("cuda"):
        torch.cuda.set_device(process_device)


def run_on_all(function: Callable[[], T]) -> T:
    """The result of `function` in this process, after it succeeded in every process.

    If it raises InputError or MachineError in any process, the main process raises this error and
    the others raise MainProcessFailedError. Any other error ends its own process, and torchrun
    then ends the others.
    """
    if world_size() == 1:
        return function()
    value, error = _attempt(function)
    import torch.distributed as dist

    errors: list[Exception | None] = [None] * world_size()
    dist.all_gather_object(errors, error)
    _raise_first(errors)
    return value  # type: ignore[return-value]


def run_on_main(function: Callable[[], T]) -> T:
    """The result of `function` in the main process, sent to all; no other process runs it.

    Inside `function` the world size is 1, so that nothing waits for the other processes. Raises
    what `run_on_all` raises.
    """
    if world_size() == 1:
        return function()
    import torch.distributed as dist

    outcome = [copy_context().run(_attempt_alone, function) if is_main() else (None, None)]
    dist.broadcast_object_list(outcome, src=0)
    value, error = outcome[0]
    _raise_first([error])
    return value  # type: ignore[return-value]


def _attempt(function: Callable[[], T]) -> tuple[T | None, Exception | None]:
    """The result of `function`, or the error that is sent to the other processes."""
    try:
        return function(), None
    except MainProcessFailedError as error:
        return None, error
    except (InputError, MachineError) as error:
        return None, type(error)(str(error))  # without its cause, which may not unpickle elsewhere


def _attempt_alone(function: Callable[[], T]) -> tuple[T | None, Exception | None]:
    MAIN_RUNS_ALONE.set(True)
    return _attempt(function)


def _raise_first(errors: list[Exception | None]) -> None:
    reported = [error for error in errors if isinstance(error, InputError | MachineError)]
    if not reported:
        return
    if is_main():
        raise reported[0]
    raise MainProcessFailedError(2 if isinstance(reported[0], InputError) else 1)


def exit_after_main(code: int) -> NoReturn:
    """Exits after the main process has exited.

    An earlier exit would make torchrun end the main process before it has reported the error.
    """
    import torch
    import torch.distributed as dist

    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # from torchrun, when the main process exits
    with suppress(RuntimeError, ValueError):
        dist.recv(torch.zeros(1), src=0)  # nothing is sent: it fails when the main process exits
    exit_process(code)


def exit_process(code: int) -> NoReturn:
    """Exits with `code`; at once if connected to other processes.

    During an ordinary exit of Python, gloo may abort the process for a lost connection.
    """
    if world_size() == 1 or not _is_connected():
        raise SystemExit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def make_shared_folder(folder: Path) -> None:
    """Creates `folder`. Raises InputError where a process on another machine does not see it."""

    def check() -> None:
        if not folder.is_dir():
            raise InputError(
                f"{str(folder.parent)!r} is not one folder on all machines: use a shared folder"
            )

    run_on_main(lambda: folder.mkdir(parents=True, exist_ok=True))
    run_on_all(check)


def barrier() -> None:
    """Waits until every process has called it."""
    run_on_all(lambda: None)
