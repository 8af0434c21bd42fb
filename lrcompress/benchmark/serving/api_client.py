"""Requests to an OpenAI-compatible server, and when their tokens arrived."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from statistics import median
from typing import Any

import aiohttp

from lrcompress.runtime.errors import InputError

MAX_REASON = 300  # characters of a server's answer in an error


class NoAnswerError(Exception):
    """The server cannot be reached, is not ready, or does not go on."""


@dataclass(frozen=True)
class Endpoint:
    """A server's address, without /v1, and the seconds to wait for each piece of an answer."""

    url: str
    timeout: float

    def get(self, path: str) -> Any:
        """The JSON at `path`. Raises NoAnswerError, or InputError where the server refuses."""
        return asyncio.run(self._single("GET", path, None))

    def post(self, path: str, body: Mapping[str, object]) -> Any:
        """The JSON of the answer. Raises as `get` does."""
        return asyncio.run(self._single("POST", path, body))

    async def _single(self, method: str, path: str, body: Mapping[str, object] | None) -> Any:
        async with self._session() as session:
            try:
                async with session.request(method, self.url + path, json=body) as response:
                    text = await response.text()
            except (aiohttp.ClientError, TimeoutError) as error:
                raise NoAnswerError(_reason(error)) from None
        return _json(self.url + path, response.status, text)

    def stream_all(self, bodies: Sequence[Mapping[str, object]]) -> list[Completion]:
        """Sends completion requests at the same time, and waits for the end of all."""
        return asyncio.run(self._stream_all(bodies))

    async def _stream_all(self, bodies: Sequence[Mapping[str, object]]) -> list[Completion]:
        async with self._session() as session:
            return await asyncio.gather(*(self._stream(session, body) for body in bodies))

    def _session(self) -> aiohttp.ClientSession:
        timeout = aiohttp.ClientTimeout(sock_connect=self.timeout, sock_read=self.timeout)
        # no limit of connections: a batch is as many as are asked for
        return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout)

    async def _stream(
        self, session: aiohttp.ClientSession, body: Mapping[str, object]
    ) -> Completion:
        url = f"{self.url}/v1/completions"
        start, lines = time.perf_counter(), list[tuple[float, bytes]]()
        try:
            async with session.post(url, json=body) as response:
                if response.status != HTTPStatus.OK:
                    _json(url, response.status, await response.text())
                async for line in response.content:  # read here, parsed after the clock has stopped
                    lines.append((time.perf_counter(), line))
        except (aiohttp.ClientError, TimeoutError) as error:
            raise NoAnswerError(_reason(error)) from None
        return _completion(url, start, lines)


@dataclass(frozen=True)
class Completion:
    """One streamed answer; times are seconds of one clock.

    `arrivals` has the time of each piece of the answer, which is a token, or a few of them.
    """

    start: float
    arrivals: tuple[float, ...]
    prompt_tokens: int
    new_tokens: int
    cached_tokens: int


@dataclass(frozen=True)
class BatchSpeed:
    """Speed of requests that were sent at the same time.

    first_token: seconds from the request to the first token, the median of the requests.
    decode: tokens per second of all together, after each has its first token.
    total: tokens of prompts and answers per second, from the first request to the last token.
    """

    first_token: float
    decode: float
    total: float


def batch_speed(completions: Sequence[Completion]) -> BatchSpeed:
    """What the answers say about the speed; tokens are those of the server's usage."""
    start = min(each.start for each in completions)
    end = max(each.arrivals[-1] for each in completions)
    all_decode = max(each.arrivals[0] for each in completions)
    decoded = sum(_tokens_after(each, all_decode) for each in completions)
    tokens = sum(each.prompt_tokens + each.new_tokens for each in completions)
    return BatchSpeed(
        first_token=median(each.arrivals[0] - each.start for each in completions),
        decode=decoded / (end - all_decode),
        total=tokens / (end - start),
    )


def _tokens_after(completion: Completion, moment: float) -> float:
    """Tokens that came after `moment`; those after the first are spread evenly over the pieces."""
    _, *later = completion.arrivals
    return (completion.new_tokens - 1) * sum(time > moment for time in later) / len(later)


def _completion(url: str, start: float, lines: Sequence[tuple[float, bytes]]) -> Completion:
    arrivals, usage = list[float](), dict[str, Any]()
    for arrival, event in _events(url, lines):
        usage = event.get("usage") or usage
        if event.get("choices"):  # without text where a token is part of a character
            arrivals.append(arrival)
    if not {"prompt_tokens", "completion_tokens"} <= usage.keys():
        raise InputError(
            f"the server at {url} does not tell its usage of tokens: use one that knows "
            "stream_options.include_usage"
        )
    if len(arrivals) < 2:
        raise InputError(
            f"the server at {url} sent its answer in {len(arrivals)} piece, so that no speed can "
            "be seen: use one that streams each token"
        )
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    counts = (usage["prompt_tokens"], usage["completion_tokens"], cached)
    return Completion(start, tuple(arrivals), *counts)


def _events(
    url: str, lines: Sequence[tuple[float, bytes]]
) -> Iterator[tuple[float, dict[str, Any]]]:
    """The server-sent events with JSON, and when each came."""
    for arrival, line in lines:
        field, _, data = line.partition(b":")
        if field == b"data" and data.strip() != b"[DONE]":
            event = _json(url, HTTPStatus.OK, data.decode("utf-8", "replace"))
            if "error" in event:
                raise InputError(f"the server at {url} failed: {_message(event)}")
            yield arrival, event


def _json(url: str, status: int, text: str) -> Any:
    """The JSON of an answer.

    Raises NoAnswerError where the server is not ready, and InputError with its own words where it
    refuses.
    """
    if status == HTTPStatus.SERVICE_UNAVAILABLE:
        raise NoAnswerError("it is not ready")
    try:
        content = json.loads(text)
    except ValueError:
        content = text
    if status != HTTPStatus.OK:
        raise InputError(f"the server at {url} refused (HTTP {status}): {_message(content)}")
    if not isinstance(content, dict):
        raise InputError(f"the server at {url} did not answer with JSON: {_message(content)}")
    return content


def _message(content: Any) -> str:
    """The words in an error of OpenAI's form, or the whole content."""
    error = content.get("error", content) if isinstance(content, dict) else content
    text = error.get("message", error) if isinstance(error, dict) else error
    return " ".join(str(text).split())[:MAX_REASON] or "no reason given"


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split())[:MAX_REASON] or type(error).__name__
