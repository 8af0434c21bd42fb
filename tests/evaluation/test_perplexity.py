"""Windows score every token once, and perplexity equals a direct computation."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch

from lrcompress.data.corpora import Corpus
from lrcompress.data.packing import encode
from lrcompress.data.text import Conversation
from lrcompress.data.windows import Windowing, windows
from lrcompress.evaluation.perplexity import perplexity
from lrcompress.runtime.errors import InputError
from tests.tiny import byte_tokenizer, tiny_model

TEXT = "It was the best of times, it was the worst of times. " * 6


@pytest.mark.parametrize("bos", [None, 0])
@pytest.mark.parametrize(("count", "length", "stride"), [(100, 16, 16), (97, 16, 5), (10, 16, 16)])
def test_every_token_is_scored_once(count: int, length: int, stride: int, bos: int | None) -> None:
    tokens = list(range(1, count + 1))
    scored = [
        t for w in windows(tokens, length, stride, bos) for t in w.tokens[-w.scored :].tolist()
    ]
    if bos is not None:
        assert scored == tokens
    elif stride < length:
        assert scored == tokens[1:]
    else:
        assert scored == [t for i, t in enumerate(tokens) if i % length]
    assert all(len(w.tokens) <= length for w in windows(tokens, length, stride, bos))


def test_no_token_is_left_out_whatever_the_lengths() -> None:
    """Without BOS, and without an overlap, the first token of a window has nothing before it."""
    for count, length, bos in product(range(1, 40), range(2, 12), (None, 0)):
        for stride in range(1, length + 1):
            tokens = list(range(1, count + 1))
            all_windows = list(windows(tokens, length, stride, bos))
            scored = [t for w in all_windows for t in w.tokens[-w.scored :].tolist()]
            first = length if bos is None and stride == length else count
            expected = tokens if bos is not None else [t for t in tokens if (t - 1) % first]
            assert scored == expected, (count, length, stride, bos)


def test_the_count_of_scored_tokens_is_that_of_the_samples() -> None:
    for letters in (33, 64, 65, 95):
        metric = perplexity(
            "m", (tiny_model(), byte_tokenizer()), Corpus("x", ["a" * letters]), Windowing(32)
        )
        assert metric.conditions["tokens"] == sum(weight for _, weight in metric.samples)
        # the first token of each window is not scored
        assert metric.conditions["tokens"] == letters + -letters // 32


def test_equals_a_direct_computation() -> None:
    model, tokenizer = tiny_model(), byte_tokenizer()
    metric = perplexity("dense", (model, tokenizer), Corpus("x", [TEXT]), Windowing(32))
    ids = torch.tensor(encode(tokenizer, TEXT))
    losses = []
    with torch.no_grad():
        for begin in range(0, len(ids), 32):
            piece = ids[begin : begin + 32]
            if len(piece) > 1:
                logits = model(input_ids=piece[None]).logits[0].double().log_softmax(-1)
                losses += [-logits[i, piece[i + 1]] for i in range(len(piece) - 1)]
    assert metric.conditions["tokens"] == len(losses)
    assert metric.value == pytest.approx(float(torch.stack(losses).mean().exp()), rel=1e-6)
    assert metric.conditions["bos"] == "none"


def test_windows_stay_inside_documents() -> None:
    model, tokenizer = tiny_model(), byte_tokenizer()
    whole = perplexity(
        "m", (model, tokenizer), Corpus("x", [TEXT, "another document"]), Windowing(32)
    )
    by_document = [
        perplexity("m", (model, tokenizer), Corpus("x", [d]), Windowing(32))
        for d in (TEXT, "another document")
    ]
    counts = [int(str(metric.conditions["tokens"])) for metric in by_document]
    losses = (math.log(metric.value) * n for metric, n in zip(by_document, counts, strict=True))
    mean = sum(losses) / sum(counts)
    assert whole.value == pytest.approx(math.exp(mean))


def test_limit_takes_the_first_windows() -> None:
    metric = perplexity(
        "m", (tiny_model(), byte_tokenizer()), Corpus("x", [TEXT]), Windowing(32, limit=2)
    )
    assert metric.conditions["windows"] == 2
    assert metric.conditions["tokens"] == 62


def test_non_finite_loss_raises() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(
        InputError, match=r"'x' is nan, because model.layers.1.mlp.down_proj.weight is not"
    ):
        perplexity("dense", (model, byte_tokenizer()), Corpus("x", [TEXT]), Windowing(32))


def test_nothing_to_score_raises() -> None:
    with pytest.raises(InputError, match="too little text"):
        perplexity("dense", (tiny_model(), byte_tokenizer()), Corpus("x", ["a"]), Windowing(32))


def test_documents_of_one_token_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    loaded = (tiny_model(), byte_tokenizer())
    metric = perplexity("m", loaded, Corpus("few", ["a", TEXT, "b"]), Windowing(32))
    assert metric.value == perplexity("m", loaded, Corpus("few", [TEXT]), Windowing(32)).value
    assert caplog.messages == ["Not scored: 2 of 3 documents of 'few', each of one token."]


@pytest.mark.parametrize("bos", [False, True])
def test_of_answers_it_is_the_mean_over_their_tokens(bos: bool) -> None:
    """The text has a window without an answer, which is left out."""
    model, tokenizer = tiny_model(), byte_tokenizer(bos)
    answers = ((10, 20), (25, 33), (120, 150))
    corpus = Corpus("x", [Conversation(TEXT[:200], answers)])
    metric = perplexity("m", (model, tokenizer), corpus, Windowing(32, loss_on="answers"))
    losses: list[float] = []
    capacity = 31 if bos else 32
    for begin in range(0, 200, capacity):
        end = min(begin + capacity, 200)
        ids = [0] * bos + encode(tokenizer, TEXT[begin:end])
        log_p = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        for place in range(begin + (not bos), end):
            if any(first <= place < last for first, last in answers):
                position = place - begin + bos
                losses.append(-float(log_p[position - 1, ids[position]].detach()))
    assert metric.value == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
    assert metric.conditions["tokens"] == len(losses)
    assert metric.conditions["loss_on"] == "answers"
    assert sum(count for _, count in metric.samples) == len(losses)
    assert len(metric.samples) == metric.conditions["windows"]
    assert len(metric.samples) < 7
    everything = perplexity("m", (model, tokenizer), corpus, Windowing(32))
    assert "loss_on" not in everything.conditions


def test_texts_without_answers_are_refused() -> None:
    loaded, windowing = (tiny_model(), byte_tokenizer()), Windowing(32, loss_on="answers")
    with pytest.raises(InputError, match=r"'x' are not known \(it holds text that is no conv"):
        perplexity("m", loaded, Corpus("x", [TEXT]), windowing)
    with pytest.raises(InputError, match="none of its 1 documents has an answer"):
        perplexity("m", loaded, Corpus("x", [Conversation(TEXT, ())]), windowing)
