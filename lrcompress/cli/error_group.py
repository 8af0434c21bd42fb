"""What every command does: errors in one sentence with an exit code, and quiet libraries."""

from __future__ import annotations

import logging
import os
import sys
from typing import Any

import click

from lrcompress.runtime import distributed
from lrcompress.runtime.errors import OUT_OF_MEMORY, InputError, MachineError, machine_fault_reason
from lrcompress.runtime.sanitize import printable, shortened

INTERRUPTED = 130
BEYOND_MAX_LOSS = 3
RESUMES = "lrcompress.resumes"
GOES_ON = ", and the same command goes on from what was finished"


class ErrorReportingGroup(click.Group):
    """Turns the package's errors into one sentence and an exit code: 2 for the user's input,
    1 for the machine's faults. `BEYOND_MAX_LOSS` is no error but an answer."""

    def invoke(self, context: click.Context) -> Any:
        _quiet_libraries()
        try:
            return super().invoke(context)
        except distributed.MainProcessFailedError as error:
            distributed.exit_after_main(error.code)
        except InputError as error:
            _fail(str(error), 2)
        except BrokenPipeError:
            raise  # the reader has gone: click ends quietly
        except Exception as error:
            if (
                not isinstance(error, MachineError | OSError)
                and machine_fault_reason(error) is None
            ):
                raise
            _fail(_machine_fault(error), 1)
        except KeyboardInterrupt:
            if not distributed.is_main():
                raise SystemExit(INTERRUPTED) from None
            _fail(f"interrupted; nothing half-written was left{_goes_on(context)}", INTERRUPTED)

    def resolve_command(
        self, context: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name, command, rest = super().resolve_command(context, args)
        distributed.check_command(name)
        return name, command, rest


def resumes(yes: bool = True) -> None:
    """Notes that the running command keeps what it finished for the next time."""
    click.get_current_context().meta[RESUMES] = yes


def _goes_on(context: click.Context) -> str:
    return GOES_ON if context.meta.get(RESUMES) else ""


def _fail(message: str, code: int) -> None:
    click.echo(f"Error: {shortened(printable(message))}", err=True)
    distributed.exit_process(code)


def _machine_fault(error: Exception) -> str:
    reason = None if isinstance(error, MachineError) else machine_fault_reason(error)
    if reason == OUT_OF_MEMORY:
        return f"{reason}: try --dtype bfloat16, and a shorter --seq-len or --context-length"
    file = getattr(error, "filename", None)
    where = f": {str(file)!r}" if file else ""
    return " ".join(str(error).split()) if reason is None else f"{reason}{where}"


def _quiet_libraries() -> None:
    """Errors only, from libraries that would write over the progress."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_MININTERVAL", "10")
    logging.captureWarnings(True)
    for name in ("py.warnings", "accelerate", "torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
