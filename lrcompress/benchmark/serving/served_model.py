"""A model behind an HTTP API: waiting for it, asking for tokens, timing its answers."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property

from lrcompress.benchmark.serving.api_client import (
    BatchSpeed,
    Endpoint,
    NoAnswerError,
    batch_speed,
)
from lrcompress.benchmark.serving.engines import Engine
from lrcompress.benchmark.serving.server_process import ServerProcess, deadline
from lrcompress.runtime.errors import InputError

Tokens = list[int]


@dataclass
class ServedModel:
    """A model at `endpoint`.

    `process` is None where the command did not start the server, `installed` where it is not known
    what package serves.
    """

    label: str
    source: str
    engine: Engine
    endpoint: Endpoint
    process: ServerProcess | None = None
    installed: str | None = None
    salt: str = field(default_factory=lambda: uuid.uuid4().hex)

    def wait_until_ready(self) -> None:
        """Raises InputError where the server ends, or does not answer in time."""
        for _ in deadline(self.endpoint.timeout):
            self._check_running()
            try:
                self.endpoint.get("/v1/models")
            except NoAnswerError as error:
                if self.process is None:
                    raise self._failure(str(error)) from None
            else:
                self._check_running()  # else another program answered on its port
                return
        raise self._failure(f"not ready after {self.endpoint.timeout:g} s, give more by --timeout")

    def _check_running(self) -> None:
        if self.process is not None and self.process.exit_code is not None:
            raise self._failure(self.process.reason(self.engine.own_reason))

    def _failure(self, reason: str) -> InputError:
        if self.process is None:
            return InputError(
                f"{self.label}: no server answers at {self.endpoint.url} ({reason}): start it, or "
                "correct the URL"
            )
        code = self.process.exit_code
        ended = "does not go on" if code is None else f"ended with exit code {code}"
        return InputError(
            f"{self.engine.name} with {self.source!r} {ended}: {reason}; its log is "
            f"{str(self.process.log)!r}"
        )

    @contextmanager
    def _answers(self) -> Iterator[None]:
        """Turns a server that no longer answers into an InputError."""
        try:
            yield
        except NoAnswerError as error:
            if self.process is not None and self.process.ends_soon():
                self._check_running()
            raise self._failure(str(error)) from None

    @cached_property
    def name(self) -> str:
        """What the server calls the model."""
        with self._answers():
            models = self.endpoint.get("/v1/models").get("data") or [{}]
        return str(models[0].get("id", ""))

    @cached_property
    def version(self) -> str:
        """The package that serves and its version, else what the server says of its version."""
        if self.installed:
            return self.installed
        path, key = self.engine.version_at
        with self._answers():
            return str(self.endpoint.get(path).get(key, "unknown"))

    def tokenize(self, text: str) -> Tokens:
        """The token ids of `text`, by the server's tokenizer, without special tokens."""
        body = {"model": self.name, self.engine.tokenize_key: text, "add_special_tokens": False}
        with self._answers():
            return list(self.endpoint.post("/tokenize", body).get("tokens") or ())

    def batch_speed(self, prompts: Sequence[Tokens], new_tokens: int) -> BatchSpeed:
        """Answers all `prompts` at the same time, with `new_tokens` each, greedily.

        Raises InputError where the server stops earlier, or where a prompt came from a cache.
        """
        bodies = [self._request(prompt, new_tokens) for prompt in prompts]
        with self._answers():
            completions = self.endpoint.stream_all(bodies)
        for completion in completions:
            if completion.new_tokens != new_tokens:
                raise InputError(
                    f"{self.label}: {self.endpoint.url} gave {completion.new_tokens} of "
                    f"{new_tokens} tokens, so its speed cannot be compared: serve it with an "
                    "engine that knows ignore_eos, and with room for prompt and answer"
                )
            if completion.cached_tokens:
                raise InputError(
                    f"{self.label}: {self.endpoint.url} took {completion.cached_tokens} tokens of "
                    "a new prompt from its cache, which hides their time: serve it without prefix "
                    "caching"
                )
        return batch_speed(completions)

    def _request(self, prompt: Tokens, new_tokens: int) -> dict[str, object]:
        return {
            "model": self.name,
            "prompt": prompt,
            "max_tokens": new_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        } | self.engine.without_cache(self.salt)
