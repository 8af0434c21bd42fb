"""Later models against the first one, token by token."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div

import lrcompress
from lrcompress.data.corpora import Corpus, read_corpus
from lrcompress.data.text import Conversation
from lrcompress.data.windows import Windowing, corpus_windows
from lrcompress.evaluation.block_divergence import block_changes
from lrcompress.evaluation.token_divergence import token_changes
from lrcompress.reporting.differences import PositionLoss
from tests.evaluation.conftest import LENGTH, loaded
from tests.tiny import tiny_model


@torch.no_grad()
def test_divergence_and_agreement_equal_a_direct_computation(
    dense: Path, factorized: Path, text: Path
) -> None:
    models, corpus = loaded(dense, factorized), read_corpus(str(text), "test")
    (change,) = token_changes(models, corpus, Windowing(LENGTH, limit=3))
    divergences, agreed, losses = [], [], []
    for window in corpus_windows(corpus, models["0"][1], Windowing(LENGTH, limit=3)):
        p, q = (
            model(input_ids=window.tokens[None]).logits[0, -window.scored - 1 : -1].log_softmax(-1)
            for model, _ in models.values()
        )
        divergences.append(kl_div(q, p, reduction="none", log_target=True).sum(-1))
        agreed.append(p.argmax(-1) == q.argmax(-1))
        losses.append(cross_entropy(q, window.tokens[-window.scored :], reduction="none"))
    direct = torch.cat(divergences).double()
    assert change.divergence == pytest.approx(float(direct.mean()), rel=1e-4)
    assert change.percentiles["99"] == pytest.approx(np.percentile(direct, 99), rel=1e-4)
    assert change.agreement == pytest.approx(float(torch.cat(agreed).double().mean()))
    assert change.tokens == len(direct) == sum(bin_.tokens for bin_ in change.positions)
    total = sum(bin_.tokens * bin_.model for bin_ in change.positions)
    assert total == pytest.approx(float(torch.cat(losses).double().sum()), rel=1e-5)
    assert change.worst[0].divergence == pytest.approx(float(direct.max()), rel=1e-4)


def test_a_model_does_not_differ_from_itself(dense: Path, text: Path) -> None:
    models, corpus = loaded(dense, dense), read_corpus(str(text), "test")
    (tokens,) = token_changes(models, corpus, Windowing(LENGTH, limit=2))
    (blocks,) = block_changes(models, corpus, Windowing(LENGTH, limit=2))
    assert tokens.divergence == pytest.approx(0, abs=1e-6)
    assert tokens.agreement == 1
    assert blocks.errors == (0.0,) * len(blocks.errors)


def test_worst_tokens_stand_in_their_context(dense: Path, factorized: Path, text: Path) -> None:
    (change,) = token_changes(
        loaded(dense, factorized), read_corpus(str(text), "test"), Windowing(LENGTH, limit=2)
    )
    for token in change.worst:
        assert len(token.context) == min(16, token.position)
        assert token.context + token.actual in text.read_text()
    order = [token.divergence for token in change.worst]
    assert order == sorted(order, reverse=True)


def test_models_of_other_tokenizers_are_left_out(dense: Path, text: Path, tmp_path: Path) -> None:
    model, tokenizer = lrcompress.load(dense)
    other = tiny_model(vocab_size=300)
    models = {"first": (model, tokenizer), "other": (other, tokenizer)}
    assert token_changes(models, read_corpus(str(text), "test"), Windowing(LENGTH, limit=1)) == []


def test_a_loss_beyond_all_perplexities_is_still_reported() -> None:
    hopeless = PositionLoss(1, 15, 15, 2.0, 5000.0)
    assert hopeless.perplexity == hopeless.ratio == pytest.approx(np.exp(700.0))


def test_of_answers_only_their_tokens_are_compared(dense: Path, factorized: Path) -> None:
    models, words = loaded(dense, factorized), "The quick brown fox jumps over the lazy dog. " * 3
    marked = Corpus("x", [Conversation(words, ((4, 9), (50, 60)))])
    (whole,) = token_changes(models, Corpus("x", [words]), Windowing(LENGTH))
    (change,) = token_changes(models, marked, Windowing(LENGTH, loss_on="answers"))
    assert change.tokens == 15
    assert whole.tokens > 100
    places = {(token.window, token.position) for token in change.worst}
    assert places <= {(0, place) for place in (*range(4, 9), *range(50, 60))}
    divergences = {(token.window, token.position): token.divergence for token in whole.worst}
    for token in change.worst:
        expected = divergences.get((token.window, token.position), token.divergence)
        assert token.divergence == pytest.approx(expected, rel=1e-5)
