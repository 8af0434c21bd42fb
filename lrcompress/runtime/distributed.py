"""The processes of one run under torchrun: their devices, their shares, what they agree on.

torchrun tells each process its place in environment variables. Nothing here imports torch before
a process group is needed, so that the command line can ask who speaks.
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

# a dead process is torchrun's to find: this is for one that is only slow
TIMEOUT = timedelta(hours=2)
# commands that share their work between processes
SHARED_COMMANDS = ("factorize", "finetune", "pretrain")


class MainProcessFailedError(Exception):
    """The run failed, and the main process says why; this process ends with `code`."""

    def __init__(self, code: int) -> None:
        super().__init__(f"the main process says what failed (exit code {code})")
        self.code = code


# set while the main process does something by itself
ALONE = ContextVar("alone", default=False)


def world_size() -> int:
    return 1 if ALONE.get() else int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """The number of this process."""
    return int(os.environ.get("RANK", "0"))


def is_main() -> bool:
    """Whether this process writes and speaks for all."""
    return rank() == 0


def check_command(name: str | None) -> None:
    """Raises InputError where a command would run once in each process."""
    if world_size() > 1 and name not in SHARED_COMMANDS:
        raise InputError(f"{name} runs in one process: start it without torchrun")


def share(batch_size: int, passes: int) -> int:
    """Sequences in one forward pass of one process, of the `batch_size` in an optimizer step."""
    parts = world_size() * passes
    if batch_size % parts:
        raise InputError(
            f"a batch size of {batch_size} cannot be shared by {world_size()} processes with "
            f"{passes} forward passes each: use a multiple of {parts}, such as "
            f"--batch-size {-(-batch_size // parts) * parts}"
        )
    return batch_size // parts


def shard_of(items: Sequence[T]) -> Sequence[T]:
    """Those of `items` that this process does; the others do the others."""
    return items[rank() :: world_size()]


def map_sharded(
    items: Sequence[S], work: Callable[[S], T], progress: Progress, what: str
) -> list[T]:
    """`work` of each item, done by one process for all of them, which get all results in order.

    Results are sent: tensors have to be on the CPU. Errors as in `run_on_all`.
    """
    own = shard_of(items)
    found = run_on_all(lambda: [work(item) for item in progress(own, what, len(own))])
    if world_size() == 1:
        return found
    import torch.distributed as dist

    parts: list[list[T]] = [[] for _ in range(world_size())]
    dist.all_gather_object(parts, found)
    return [parts[index % world_size()][index // world_size()] for index in range(len(items))]


def add_up(sums: dict[str, Tensor], zeros: Callable[[str], Tensor]) -> None:
    """Makes `sums` those over all processes, in place; `zeros` gives one that a process lacks."""
    if world_size() == 1:
        return
    import torch.distributed as dist

    known: list[list[str]] = [[] for _ in range(world_size())]
    dist.all_gather_object(known, list(sums))
    for name in sorted({name for names in known for name in names}):
        if name not in sums:
            sums[name] = zeros(name)
        dist.all_reduce(sums[name])


def own_device(device: str) -> str:
    """The device of this process where several run; otherwise `device` as it is."""
    if world_size() == 1 or device == "cpu":
        return device
    import torch

    if device != "auto":
        raise InputError(
            f"device {device!r} is one for {world_size()} processes: use --device auto"
        )
    if not torch.cuda.is_available():
        return "cpu"
    found, here = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if here > found:
        raise InputError(
            f"{here} processes on a machine with {found} GPUs: use --nproc-per-node {found}"
        )
    return f"cuda:{os.environ['LOCAL_RANK']}"


@contextmanager
def group(device: str) -> Iterator[None]:
    """Connects the processes; what fails inside leaves them connected, for `end_after_main`."""
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

    cuda = device != "cpu" and torch.cuda.is_available()
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=TIMEOUT)
    own = run_on_all(lambda: own_device(device))
    if own.startswith("cuda"):
        torch.cuda.set_device(own)


def run_on_all(function: Callable[[], T]) -> T:
    """What `function` gives here, once it has ended well in every process.

    Where it raised InputError or MachineError in any, the main process raises it, and the others
    SaidElsewhereError. Any other error ends its own process, and torchrun then ends the rest.
    """
    if world_size() == 1:
        return function()
    value, fault = _attempt(function)
    import torch.distributed as dist

    faults: list[Exception | None] = [None] * world_size()
    dist.all_gather_object(faults, fault)
    _raise_first(faults)
    return value  # type: ignore[return-value]


def run_on_main(function: Callable[[], T]) -> T:
    """What `function` gives in the main process, for all of them; it runs in no other.

    What it calls sees one process, so that it does not wait for the others. Errors are those of
    `run_on_all`.
    """
    if world_size() == 1:
        return function()
    import torch.distributed as dist

    found = [copy_context().run(_alone, function) if is_main() else (None, None)]
    dist.broadcast_object_list(found, src=0)
    value, fault = found[0]
    _raise_first([fault])
    return value  # type: ignore[return-value]


def _attempt(function: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return function(), None
    except (InputError, MachineError, MainProcessFailedError) as error:
        # as plain text: a cause may be too large to send, or not loadable elsewhere
        return None, error if isinstance(error, MainProcessFailedError) else type(error)(str(error))


def _alone(function: Callable[[], T]) -> tuple[T | None, Exception | None]:
    ALONE.set(True)
    return _attempt(function)


def _raise_first(faults: list[Exception | None]) -> None:
    said = [fault for fault in faults if isinstance(fault, InputError | MachineError)]
    if said:
        raise (
            said[0]
            if is_main()
            else MainProcessFailedError(2 if isinstance(said[0], InputError) else 1)
        )


def end_after_main(code: int) -> NoReturn:
    """Ends this process when the main one has ended, so that torchrun does not end it too early."""
    import torch
    import torch.distributed as dist

    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, which has seen the same end
    with suppress(RuntimeError, ValueError):
        dist.recv(torch.zeros(1), src=0)  # it sends nothing: its end is what is waited for
    end(code)


def end(code: int) -> NoReturn:
    """Ends this process: at once where it is connected to others, because gloo may abort it for a
    lost connection while Python takes itself down."""
    if world_size() == 1 or not _is_connected():
        raise SystemExit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def check_shared(folder: Path) -> None:
    """Makes `folder`. Raises InputError where a process on another machine does not see it."""

    def check() -> None:
        if not folder.is_dir():
            raise InputError(f"{str(folder.parent)!r} is not one folder for all machines: share it")

    run_on_main(lambda: folder.mkdir(parents=True, exist_ok=True))
    run_on_all(check)


def barrier() -> None:
    """Returns when every process has come here."""
    run_on_all(lambda: None)
