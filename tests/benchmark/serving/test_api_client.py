"""What the arrivals of tokens say about the speed of a batch."""

from __future__ import annotations

from typing import Any

import pytest

from lrcompress.benchmark.serving.api_client import Completion, Endpoint, batch_speed
from lrcompress.runtime.errors import InputError
from tests.benchmark.serving.fake_server import serve


def completion(start: float, *arrivals: float, tokens: int | None = None) -> Completion:
    return Completion(start, arrivals, 10, tokens or len(arrivals), 0)


def test_one_request() -> None:
    speed = batch_speed([completion(1, 1.5, 1.6, 1.7, 1.8, 1.9)])
    assert speed.first_token == pytest.approx(0.5)
    assert speed.decode == pytest.approx(4 / 0.4)
    assert speed.total == pytest.approx((10 + 5) / 0.9)


def test_decode_counts_once_all_have_their_first_token() -> None:
    """The tokens at 1.2 and 1.4 came while the other prompt was still read."""
    speed = batch_speed([completion(0, 1, 1.2, 1.4, 2.0), completion(0, 1.5, 2.5)])
    assert speed.decode == pytest.approx((1 + 1) / (2.5 - 1.5))
    assert speed.first_token == pytest.approx(1.25)
    assert speed.total == pytest.approx((20 + 4 + 2) / 2.5)


def test_requests_one_after_the_other_are_not_faster_together() -> None:
    single = batch_speed([completion(0, 1, 2, 3)])
    serial = batch_speed([completion(0, 1, 2, 3), completion(0, 4, 5, 6)])
    assert serial.decode == pytest.approx(single.decode)


def test_tokens_are_those_of_the_usage() -> None:
    """Nine tokens came in three pieces: one, then four and four."""
    speed = batch_speed([completion(0, 1, 2, 3, tokens=9)])
    assert speed.decode == pytest.approx(8 / 2)


BODY = {"prompt": [1, 2, 3], "max_tokens": 4, "stream": True}


@pytest.mark.parametrize(
    ("behaviour", "words"),
    [
        ({"tells_usage": False}, "does not tell its usage of tokens"),
        ({"pieces": 1}, "sent its answer in 1 piece"),
        ({"refusal": "the prompt is too long"}, "refused (HTTP 400): the prompt is too long"),
        ({"error_in_stream": "no memory"}, "failed: no memory"),
    ],
)
def test_an_answer_without_numbers_is_refused(behaviour: dict[str, Any], words: str) -> None:
    with serve(**behaviour) as url, pytest.raises(InputError) as error:
        Endpoint(url, timeout=5).stream_all([BODY])
    assert words in str(error.value)


def test_counts_are_read_from_the_stream() -> None:
    with serve(cached=2) as url:
        (answer,) = Endpoint(url, timeout=5).stream_all([BODY])
    assert (answer.prompt_tokens, answer.new_tokens, answer.cached_tokens) == (3, 4, 2)
    assert len(answer.arrivals) == 4
    assert answer.start < answer.arrivals[0] < answer.arrivals[-1]
