"""Later models against the first, beyond single numbers: tokens, blocks, continuations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div

import lrcompress
from lrcompress.data.corpora import read_corpus
from lrcompress.data.windows import corpus_windows
from lrcompress.evaluation import evaluate
from lrcompress.evaluation.block_divergence import block_changes
from lrcompress.evaluation.continuations import continuations
from lrcompress.evaluation.token_divergence import token_changes
from lrcompress.reporting.differences import PositionLoss
from lrcompress.runtime.errors import InputError
from tests.conftest import invoke
from tests.tiny import FAMILIES, byte_tokenizer, tiny_model

LENGTH = 64


@pytest.fixture(scope="module")
def trained(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny llama after it has learned the sentence of the fixture `text`."""
    model, tokenizer = lrcompress.load(dense)
    words = tokenizer("The quick brown fox jumps over the lazy dog. " * 3)["input_ids"]
    tokens = torch.tensor([words[:100]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        loss = cross_entropy(model(input_ids=tokens).logits[0, :-1], tokens[0, 1:])
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    out = tmp_path_factory.mktemp("trained") / "model"
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


def broken(folder: Path, out: Path, block: int) -> Path:
    """The model with every weight of one block set to zero."""
    model, tokenizer = lrcompress.load(folder)
    for parameter in model.model.layers[block].parameters():
        parameter.data.zero_()
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


def loaded(*folders: Path) -> dict[str, Any]:
    models = {str(index): lrcompress.load(folder) for index, folder in enumerate(folders)}
    for model, _ in models.values():
        model.eval()
    return models


@torch.no_grad()
def test_divergence_and_agreement_equal_a_direct_computation(
    dense: Path, factorized: Path, text: Path
) -> None:
    models, corpus = loaded(dense, factorized), read_corpus(str(text), "test")
    (found,) = token_changes(models, corpus, LENGTH, limit=3)
    divergences, agreed, losses = [], [], []
    for window in corpus_windows(corpus, models["0"][1], LENGTH, None, 3):
        p, q = (
            model(input_ids=window.tokens[None]).logits[0, -window.scored - 1 : -1].log_softmax(-1)
            for model, _ in models.values()
        )
        divergences.append(kl_div(q, p, reduction="none", log_target=True).sum(-1))
        agreed.append(p.argmax(-1) == q.argmax(-1))
        losses.append(cross_entropy(q, window.tokens[-window.scored :], reduction="none"))
    direct = torch.cat(divergences).double()
    assert found.divergence == pytest.approx(float(direct.mean()), rel=1e-4)
    assert found.percentiles["99"] == pytest.approx(np.percentile(direct, 99), rel=1e-4)
    assert found.agreement == pytest.approx(float(torch.cat(agreed).double().mean()))
    assert found.tokens == len(direct) == sum(bin_.tokens for bin_ in found.positions)
    total = sum(bin_.tokens * bin_.model for bin_ in found.positions)
    assert total == pytest.approx(float(torch.cat(losses).double().sum()), rel=1e-5)
    assert found.worst[0].divergence == pytest.approx(float(direct.max()), rel=1e-4)


def test_a_model_does_not_differ_from_itself(dense: Path, text: Path) -> None:
    models, corpus = loaded(dense, dense), read_corpus(str(text), "test")
    (tokens,) = token_changes(models, corpus, LENGTH, limit=2)
    (blocks,) = block_changes(models, corpus, LENGTH, limit=2)
    assert tokens.divergence == pytest.approx(0, abs=1e-6)
    assert tokens.agreement == 1
    assert blocks.errors == (0.0,) * len(blocks.errors)


def test_worst_tokens_stand_in_their_context(dense: Path, factorized: Path, text: Path) -> None:
    (found,) = token_changes(
        loaded(dense, factorized), read_corpus(str(text), "test"), LENGTH, limit=2
    )
    for token in found.worst:
        assert len(token.context) == min(16, token.position)
        assert token.context + token.actual in text.read_text()
    order = [token.divergence for token in found.worst]
    assert order == sorted(order, reverse=True)


def test_models_of_other_tokenizers_are_left_out(dense: Path, text: Path, tmp_path: Path) -> None:
    model, tokenizer = lrcompress.load(dense)
    other = tiny_model(vocab_size=300)
    models = {"first": (model, tokenizer), "other": (other, tokenizer)}
    assert token_changes(models, read_corpus(str(text), "test"), LENGTH, limit=1) == []


@pytest.mark.parametrize("block", [0, 1])
def test_a_zeroed_block_is_named_and_the_model_is_worse(
    trained: Path, text: Path, tmp_path: Path, block: int
) -> None:
    out = tmp_path / "report"
    result = invoke(
        "eval", broken(trained, tmp_path / "broken", block), "--baseline", trained, "--no-speed",
        "--perplexity", text, "--context-length", str(LENGTH), "--limit", "8", "--out", out,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert f"changed most in block {block}, by 1 of what it computes" in result.output
    content = json.loads((out / "metrics.json").read_text())
    assert [one["verdict"] for one in content["comparisons"]] == ["worse"]
    errors = content["details"]["blocks"][0]["errors"]
    assert errors[block] == pytest.approx(1)
    assert errors[1 - block] == 0
    for page in ("report.md", "report.html"):
        assert f"changed most in block {block}" in (out / page).read_text()


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_of_every_family_can_be_compared(family: str, text: Path) -> None:
    model, other = tiny_model(family), tiny_model(family)
    with torch.no_grad():
        last = list(other.parameters())[-3:]
        for parameter in last:
            parameter.mul_(1.5)
    models = {"0": (model, byte_tokenizer()), "1": (other, byte_tokenizer())}
    for one, _ in models.values():
        one.eval()
    (found,) = block_changes(models, read_corpus(str(text), "test"), 32, limit=1)
    assert len(found.errors) == 2
    assert all(error >= 0 for error in found.errors)


def test_continuations_are_the_likeliest_tokens(trained: Path, dense: Path) -> None:
    models = loaded(trained, dense)
    (found,) = continuations(models, ["The quick brown "], 12)
    assert found.texts["0"].startswith("fox jumps")
    assert found.texts["1"] != found.texts["0"]
    with pytest.raises(InputError, match="positions of the model"):
        continuations(models, ["word " * 200], 12)
    with pytest.raises(InputError, match="at least one"):
        continuations(models, [""], 12)


def test_prompts_reach_terminal_and_report(trained: Path, dense: Path, tmp_path: Path) -> None:
    out = tmp_path / "report"
    result = invoke(
        "eval", dense, "--baseline", trained, "--perplexity", "", "--no-speed", "--out", out,
        "--prompt", "The quick, brown ", "--continuation-tokens", "4",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "'The quick, brown '" in result.output
    for page in ("report.md", "report.html"):
        assert "Continuations" in (out / page).read_text()


def test_json_alone_is_printed_and_csv_has_every_metric(
    dense: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "report"
    result = invoke(
        "eval", dense, "--perplexity", text, "--context-length", "64", "--limit", "2", "--out", out,
        "--prompt-length", "8", "--new-tokens", "2", "--repeats", "2", "--json",
    )  # fmt: skip
    content = json.loads(result.stdout)
    assert content == json.loads((out / "metrics.json").read_text())
    rows = (out / "metrics.csv").read_text().splitlines()
    assert len(rows) == 1 + len(content["metrics"])
    assert rows[0].startswith("model,metric,value")


def test_json_stays_json_beside_a_verdict(dense: Path, factorized: Path, text: Path) -> None:
    result = invoke(
        "eval", factorized, "--baseline", dense, "--perplexity", text, "--context-length", "64",
        "--limit", "8", "--no-speed", "--json", "--max-loss", "0.0001%",
    )  # fmt: skip
    assert result.exit_code == 3
    assert json.loads(result.stdout)["comparisons"]
    assert "FAIL" in result.stderr


def test_an_unfit_prompt_is_refused_before_anything_is_measured(
    dense: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "quality", lambda *_: pytest.fail("measured"))
    result = invoke("eval", dense, "--perplexity", text, "--prompt", "word " * 200)
    assert result.exit_code == 2
    assert "positions of the model" in result.stderr


def test_a_loss_beyond_all_perplexities_is_still_reported() -> None:
    hopeless = PositionLoss(1, 15, 15, 2.0, 5000.0)
    assert hopeless.perplexity == hopeless.ratio == pytest.approx(np.exp(700.0))
