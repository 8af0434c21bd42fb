"""The losses of training count the tokens that have labels."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div

import lrcompress
from lrcompress.config import FinetuneSettings
from lrcompress.data.packing import IGNORED
from lrcompress.data.training_text import training_text
from lrcompress.training.trainer import counted
from tests.tiny import QUICK_FINETUNE, finetuned

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_rows_of_predicted_tokens_that_count() -> None:
    rows = torch.arange(2 * 3 * 5).view(2, 3, 5)
    labels = torch.tensor([[7, IGNORED, 7, 7], [IGNORED, 7, IGNORED, IGNORED]])
    assert torch.equal(counted(rows, labels), rows.flatten(0, 1)[[1, 2, 3]])
    assert torch.equal(counted(rows, torch.full((2, 4), 7)), rows.flatten(0, 1))


def chats(folder: Path) -> dict[str, object]:
    """Settings of a finetuning on answers of conversations."""
    turns = [
        [{"role": "user", "content": f"Count {i}"}, {"role": "assistant", "content": "one " * 4}]
        for i in range(60)
    ]
    (folder / "chats.jsonl").write_text("".join(json.dumps({"messages": t}) + "\n" for t in turns))
    (folder / "chat.jinja").write_text(TEMPLATE)
    return {
        "data": [str(folder / "chats.jsonl")], "chat_template": str(folder / "chat.jinja"),
        "loss_on": "answers", "cross_entropy": 0.5,
    }  # fmt: skip


@pytest.mark.parametrize("cached", [False, True])
def test_finetuning_learns_answers_alone(
    cached: bool, dense: Path, factorized: Path, tmp_path: Path
) -> None:
    more = {"teacher_cache": str(tmp_path / "cache"), "teacher_top_k": 256} if cached else {}
    options = chats(tmp_path) | more
    record = finetuned(factorized, tmp_path / "out", **options)["finetuned"]
    (student, tokenizer), (teacher, _) = lrcompress.load(factorized), lrcompress.load(dense)
    settings = FinetuneSettings(**(QUICK_FINETUNE | options))
    text = training_text(student, tokenizer, settings, "finetune")
    losses = []
    for tokens, labels in zip(text.tokens[:4], text.labels[:4], strict=True):
        counts = labels[1:] != IGNORED
        assert 0 < int(counts.sum()) < len(counts)
        with torch.no_grad():
            log_q, log_p = (
                model(input_ids=tokens[None]).logits[0, :-1][counts].log_softmax(-1)
                for model in (student, teacher)
            )
        divergence = kl_div(log_q, log_p, log_target=True, reduction="batchmean")
        losses.append(float(divergence + 0.5 * cross_entropy(log_q, labels[1:][counts])))
    assert record["before"] == pytest.approx(sum(losses) / 4, rel=1e-4)
    assert record["after"] < record["before"]
    assert record["settings"]["loss_on"] == "answers"
