"""Serves a GGUF file on the loopback address by llama.cpp's server in the package xllamacpp.

Run by the Python of the user's environment, which has xllamacpp and not lrcompress. It goes on
until Ctrl-C.
"""

from __future__ import annotations

import argparse
import signal
import socket
import sys
from pathlib import Path

LOOPBACK = "127.0.0.1"


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def read_options(parser: argparse.ArgumentParser) -> argparse.Namespace:
    parser.add_argument("model", metavar="MODEL.gguf", type=Path)
    parser.add_argument("--port", type=positive, default=8080, help="default: %(default)s")
    parser.add_argument(
        "--context",
        type=positive,
        default=4096,
        metavar="TOKENS",
        help="of prompts and answers, divided between the requests at a time; default: %(default)s",
    )
    parser.add_argument(
        "--parallel",
        type=positive,
        default=1,
        metavar="REQUESTS",
        help="answered at a time; default: %(default)s",
    )
    parser.add_argument("--threads", type=positive, help="default: what llama.cpp chooses")
    return parser.parse_args()


def fault(options: argparse.Namespace) -> str | None:
    """Why these options cannot be served, as far as it shows before the start."""
    if not options.model.is_file():
        return f"{str(options.model)!r} is not a file: give a GGUF file"
    with options.model.open("rb") as file:
        if file.read(4) != b"GGUF":
            return f"{str(options.model)!r} is not a GGUF file"
    with socket.socket() as probe:
        # without it a port counts as taken for a minute after its last server
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, options.port))
        except (OSError, OverflowError) as error:
            return f"port {options.port} cannot be used ({error}): give another --port"
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    options = read_options(parser)
    try:
        import xllamacpp
    except ImportError:
        parser.error(f"{sys.executable} has no xllamacpp: install it there")
    if message := fault(options):
        parser.error(message)
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(options.model)
    parameters.hostnames, parameters.port = [LOOPBACK], options.port
    parameters.n_ctx, parameters.n_parallel = options.context, options.parallel
    if options.threads:
        parameters.cpuparams.n_threads = options.threads
        parameters.cpuparams_batch.n_threads = options.threads
    try:
        server = xllamacpp.Server(parameters)  # serves for as long as it lives
    except RuntimeError:
        model = str(options.model)
        parser.exit(2, f"{parser.prog}: error: {model!r} is not served: the log above says why\n")
    sys.stderr.write(f"{options.model} is served at {server.listening_address}\n")
    signal.pause()


if __name__ == "__main__":
    # Python's own handler would wait for the end of loading, and of every call into llama.cpp
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    main()
