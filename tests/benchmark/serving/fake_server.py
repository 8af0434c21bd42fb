"""A server that answers like vLLM's and llama.cpp's, with delays and mistakes to order.

As a program it reads its behaviour from behaviour.json beside or in the model that it is to serve.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

BEHAVIOUR = "behaviour.json"


@dataclass
class Behaviour:
    """Seconds to the first token and between tokens; the rest are mistakes.

    `journal` is a file that gets a line for each request.
    """

    first: float = 0.02
    step: float = 0.002
    journal: str = ""
    tells_usage: bool = True
    cached: int = 0
    stops_after: int | None = None
    pieces: int | None = None
    refusal: str = ""
    error_in_stream: str = ""
    text_shift: int = 0
    dies_on_request: bool = False
    dies_at_start: str = ""
    never_ready: bool = False
    signals_parent: int = 0


def write_line(text: str) -> None:
    """Into the log."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


class Handler(BaseHTTPRequestHandler):
    behaviour: Behaviour
    name: str

    def log_message(self, format: str, *args: Any) -> None:
        write_line(format % args)

    def do_GET(self) -> None:
        if self.behaviour.never_ready:
            self._send({"error": {"message": "Loading model"}}, 503)
        elif self.path == "/v1/models":
            self._send({"data": [{"id": self.name}]})
        else:
            self._send({"version": "fake 1.2", "build_info": "b42-fake"})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/tokenize":
            text = body.get("prompt") or body["content"]
            self._send({"tokens": [ord(c) + self.behaviour.text_shift for c in text[:5000]]})
        else:
            self._complete(body)

    def _complete(self, body: dict[str, Any]) -> None:
        behaviour = self.behaviour
        if behaviour.journal:
            line = json.dumps({"name": self.name, **body}) + "\n"
            descriptor = os.open(behaviour.journal, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.write(descriptor, line.encode())
            os.close(descriptor)
        if behaviour.signals_parent:
            os.kill(os.getppid(), behaviour.signals_parent)
            time.sleep(60)
        if behaviour.dies_on_request:
            write_line("RuntimeError: the device is lost")
            os._exit(7)
        if behaviour.refusal:
            self._send({"error": {"message": behaviour.refusal}}, 400)
        elif body.get("stream"):
            self._stream(body)
        else:
            usage = {"completion_tokens": body["max_tokens"]}
            self._send({"choices": [{"text": "a"}], "usage": usage})

    def _stream(self, body: dict[str, Any]) -> None:
        behaviour = self.behaviour
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        count = behaviour.stops_after or body["max_tokens"]
        pieces = behaviour.pieces or count
        for number in range(pieces):
            time.sleep(behaviour.step if number else behaviour.first)
            reason = "length" if number == pieces - 1 else None
            self._event({"choices": [{"text": "a", "finish_reason": reason}]})
            if behaviour.error_in_stream:
                self._event({"error": {"message": behaviour.error_in_stream}})
        if behaviour.tells_usage:
            details = {"cached_tokens": behaviour.cached}
            usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": count}
            self._event({"choices": [], "usage": usage | {"prompt_tokens_details": details}})
        self.wfile.write(b"data: [DONE]\n\n")

    def _event(self, content: dict[str, Any]) -> None:
        self.wfile.write(b"data: " + json.dumps(content).encode() + b"\n\n")
        self.wfile.flush()

    def _send(self, content: dict[str, Any], status: int = 200) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients may leave in the middle of an answer."""


def make_server(behaviour: Behaviour, name: str, port: int = 0) -> Server:
    handler = type("BoundHandler", (Handler,), {"behaviour": behaviour, "name": name})
    return Server(("127.0.0.1", port), handler)


@contextmanager
def serve(name: str = "model", **behaviour: Any) -> Iterator[str]:
    """The URL of a server in a thread of this process."""
    server = make_server(Behaviour(**behaviour), name)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def order(place: Path, **behaviour: Any) -> None:
    """Writes the behaviour of the program that is to serve a model in `place`."""
    (place / BEHAVIOUR).write_text(json.dumps(asdict(Behaviour(**behaviour))))


def program(file: Path) -> Path:
    """An executable `file` that is this server, as `vllm` and `llama-server` are called."""
    file.write_text(f'#!/bin/sh\nexec {sys.executable} {__file__} "$@"\n')
    file.chmod(0o755)
    return file


def main(arguments: list[str]) -> None:
    write_line(" ".join(("starting", *arguments)))
    model = Path(arguments[1])  # serve MODEL, or --model MODEL
    place = model if model.is_dir() else model.parent
    behaviour = Behaviour(**json.loads((place / BEHAVIOUR).read_text()))
    child = subprocess.Popen(["sleep", "600"])
    with (place / "pids").open("a") as file:
        file.write(f"{os.getpid()} {child.pid} ")
    if behaviour.dies_at_start:
        write_line(behaviour.dies_at_start)
        sys.exit(3)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    port = int(arguments[arguments.index("--port") + 1])
    make_server(behaviour, str(model), port).serve_forever()


if __name__ == "__main__":
    main(sys.argv[1:])
