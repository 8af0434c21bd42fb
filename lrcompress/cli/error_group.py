"""Errors of all commands as one sentence with an exit code, and quiet libraries."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any, TextIO

import click

from lrcompress.cli.stdout import escape_unknown_characters
from lrcompress.runtime import distributed
from lrcompress.runtime.errors import OUT_OF_MEMORY, InputError, MachineError, machine_fault_reason
from lrcompress.runtime.sanitize import printable, shortened

# exit codes besides 0
MACHINE_FAULT = 1
WRONG_INPUT = 2
MAX_LOSS_EXCEEDED = 3  # not an error, but the answer to --max-loss
INTERRUPTED = 130

# warnings that concern numbers and are not RuntimeWarnings, as those of NumPy and SciPy are
NUMERIC_WARNINGS = ("UndefinedMetricWarning",)

RESUMABLE = "lrcompress.resumable"  # key in click's context
RESUME_HINT = ", and the same command goes on from what was finished"


class ErrorReportingGroup(click.Group):
    """Turns the package's errors into one sentence on stderr and an exit code."""

    def invoke(self, context: click.Context) -> Any:
        _quiet_libraries()
        escape_unknown_characters()
        try:
            return super().invoke(context)
        except distributed.MainProcessFailedError as error:
            distributed.exit_after_main(error.code)
        except InputError as error:
            _fail(str(error), WRONG_INPUT)
        except BrokenPipeError:
            raise  # the reader of stdout has gone: click ends quietly
        except Exception as error:
            if not _is_machine_fault(error):
                raise
            _fail(_machine_fault_text(error), MACHINE_FAULT)
        except KeyboardInterrupt:
            if not distributed.is_main():
                raise SystemExit(INTERRUPTED) from None
            hint = RESUME_HINT if context.meta.get(RESUMABLE) else ""
            _fail(f"interrupted; nothing half-written was left{hint}", INTERRUPTED)

    def resolve_command(
        self, context: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name, command, rest = super().resolve_command(context, args)
        distributed.check_command(name)
        return name, command, rest


def mark_resumable(is_resumable: bool = True) -> None:
    """Notes that the running command can be resumed, for the message after an interruption."""
    click.get_current_context().meta[RESUMABLE] = is_resumable


def _fail(message: str, code: int) -> None:
    click.echo(f"Error: {shortened(printable(message))}", err=True)
    distributed.exit_process(code)


def _is_machine_fault(error: Exception) -> bool:
    is_error_of_machine = isinstance(error, MachineError | OSError)
    return is_error_of_machine or machine_fault_reason(error) is not None


def _machine_fault_text(error: Exception) -> str:
    reason = None if isinstance(error, MachineError) else machine_fault_reason(error)
    if reason is None:
        return " ".join(str(error).split())
    if reason == OUT_OF_MEMORY:
        return f"{reason}: try --dtype bfloat16, and a shorter --seq-len or --context-length"
    file = getattr(error, "filename", None)
    return f"{reason}: {str(file)!r}" if file else reason


def _show_numeric_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Passes on what concerns numbers, such as NumPy's overflows; other warnings are hidden.

    The parameters are those of `warnings.showwarning`.
    """
    if issubclass(category, RuntimeWarning) or category.__name__ in NUMERIC_WARNINGS:
        click.echo(f"Warning: {printable(str(message))} ({Path(filename).name})", err=True)


def _quiet_libraries() -> None:
    """Limits libraries to errors and numeric warnings: other output would break progress bars."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_MININTERVAL", "10")
    warnings.showwarning = _show_numeric_warning
    for name in ("accelerate", "torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
