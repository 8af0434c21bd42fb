"""The servers of a measurement: started together and stopped together, or those at a URL."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from lrcompress.benchmark.serving.api_client import Endpoint
from lrcompress.benchmark.serving.engines import LOOPBACK, Engine, ServerRequest
from lrcompress.benchmark.serving.served_model import ServedModel
from lrcompress.benchmark.serving.server_process import (
    LINES_SHOWN,
    find_program,
    free_ports,
    interrupted_by_signals,
    running,
)
from lrcompress.config import ServeBenchSettings
from lrcompress.models.loading import locate
from lrcompress.runtime.errors import InputError
from lrcompress.runtime.paths import unique_file_names
from lrcompress.runtime.progress import ShowMessage

# prints the distribution that has the module argv[1], and its version
VERSION_SCRIPT = """
import sys
from importlib.metadata import packages_distributions, version
name = packages_distributions()[sys.argv[1]][0]
print(name, version(name))
"""


@dataclass(frozen=True)
class ModelToServe:
    """A model by its label in the report; `url` is None where its server has to be started."""

    label: str
    source: str
    url: str | None


@contextmanager
def serving(
    models: Sequence[ModelToServe],
    engine: Engine,
    settings: ServeBenchSettings,
    logs: Path,
    say: ShowMessage,
) -> Iterator[list[ServedModel]]:
    """The models, ready to be asked inside the block.

    Servers that are started here write to files in `logs`. They are stopped at the end of the
    block, whatever ends it. Raises InputError where a server cannot be started or asked, and says
    the end of its log before.
    """
    with interrupted_by_signals(), ExitStack() as stack:
        if settings.url is None:
            served = _started(models, engine, settings, logs, stack)
            say(f"Starting {engine.name} for {' and '.join(m.label for m in models)}.")
        else:
            served = [_attached(model, engine, settings) for model in models]
        for model in served:
            try:
                model.wait_until_ready()
            except InputError:
                if model.process is not None:
                    for line in model.process.last_lines()[-LINES_SHOWN:]:
                        say(line)
                raise
        yield served


def _attached(model: ModelToServe, engine: Engine, settings: ServeBenchSettings) -> ServedModel:
    url = str(model.url).rstrip("/").removesuffix("/v1")
    if not url.startswith(("http://", "https://")):
        raise InputError(f"{url!r} is not the URL of a server: write http://HOST:PORT")
    return ServedModel(model.label, model.source, engine, Endpoint(url, settings.timeout))


def _started(
    models: Sequence[ModelToServe],
    engine: Engine,
    settings: ServeBenchSettings,
    logs: Path,
    stack: ExitStack,
) -> list[ServedModel]:
    """Starts a server for each of `models`, to be stopped with `stack`."""
    paths = [engine.served_path(model.source, locate(model.source)) for model in models]
    program, version = _program(engine, settings)
    file_names = unique_file_names(model.label for model in models)
    served = []
    for model, path, port in zip(models, paths, free_ports(len(models)), strict=True):
        request = ServerRequest(
            model=path,
            port=port,
            length=settings.prompt_length + settings.new_tokens,
            parallel=max(settings.batch_sizes),
            servers=len(models),
            threads=settings.threads,
            arguments=settings.arguments,
        )
        make_command = engine.python_command if settings.python else engine.program_command
        log = logs / f"{file_names[model.label]}.log"
        process = stack.enter_context(
            running(make_command(program, request), engine.environment(request), log)
        )
        endpoint = Endpoint(f"http://{LOOPBACK}:{port}", settings.timeout)
        served.append(ServedModel(model.label, model.source, engine, endpoint, process, version))
    return served


def _program(engine: Engine, settings: ServeBenchSettings) -> tuple[str, str | None]:
    """What to run, and the version of the engine where Python's environment tells it."""
    if settings.python is not None:
        python = find_program(settings.python, "--python")
        return python, _installed_version(python, engine.package)
    if settings.server is not None:
        return find_program(settings.server, "--server"), None
    if path := shutil.which(engine.program):
        return path, None
    raise InputError(
        f"{engine.program} is not on the PATH: say where it is by --server, or by --python of the "
        f"environment that has {engine.package}, or give the --url of a server that runs"
    )


def _installed_version(python: str, package: str) -> str:
    command = [python, "-c", VERSION_SCRIPT, package]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)
    if result.returncode != 0:
        raise InputError(
            f"--python {python!r} has no {package}: install it there, or give the Python of the "
            "environment that has it"
        )
    return result.stdout.strip()
