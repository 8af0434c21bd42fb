"""Conversations become the text that the chat template of the model makes of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lrcompress.config import CalibrationSettings, FinetuneSettings
from lrcompress.data.calibration_text import calibration_tokens
from lrcompress.data.conversations import ChatFormat, with_template
from lrcompress.data.packing import encode
from lrcompress.data.training_text import training_text
from lrcompress.runtime.errors import InputError
from tests.tiny import byte_tokenizer, tiny_model

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role not in ('system', 'user', 'assistant') %}"
    "{{ raise_exception('no role ' ~ m.role) }}{% endif %}"
    "[{{ m.role }}]{{ m.content }}\n{% endfor %}"
)
MESSAGES = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Yo."}]
SHAREGPT = [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Yo."}]
RENDERED = "[user]Hi?\n[assistant]Yo.\n"


def tokenizer(bos: bool = False, template: str | None = TEMPLATE) -> Any:
    made = byte_tokenizer(bos)
    made.chat_template = template
    return made


@pytest.mark.parametrize("turns", [MESSAGES, SHAREGPT])
def test_both_forms_give_the_text_of_the_template(turns: list[dict[str, str]]) -> None:
    filled = [{**turn, "tool_calls": None} for turn in turns]  # as tables fill rows
    assert ChatFormat(tokenizer()).render("line 1", filled) == "<s>" + RENDERED
    assert ChatFormat(tokenizer(), is_plain=True).render("line 1", filled) == "Hi?\n\nYo."


def test_bos_is_there_once_where_the_tokenizer_adds_it() -> None:
    assert ChatFormat(tokenizer(bos=True)).render("line 1", MESSAGES) == RENDERED


def test_a_template_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text("{% for m in messages %}<{{ m.content }}>{% endfor %}")
    chat = ChatFormat.from_setting(tokenizer(template=None), str(file))
    assert chat.render("line 1", MESSAGES) == "<Hi?><Yo.>"
    original = tokenizer()
    assert with_template(original, str(file)).chat_template == file.read_text()
    assert original.chat_template == TEMPLATE
    assert with_template(original, "auto") is original
    with pytest.raises(InputError, match=r"chat template '.*none.jinja' cannot be read"):
        ChatFormat.from_setting(None, str(tmp_path / "none.jinja"))


@pytest.mark.parametrize(
    ("template", "turns", "sentence"),
    [
        (None, MESSAGES, "line 1 is a conversation, and the model has no chat template: give"),
        (TEMPLATE, [{"role": "bard", "content": "x"}], "line 1 does not go with .*no role bard"),
        (TEMPLATE, ["words"], "line 1 holds a list, but not of messages"),
        (TEMPLATE, [{"who": "x"}], r"without role and content, or from and value \(fields: who\)"),
    ],
)
def test_refused(template: str | None, turns: list[Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        ChatFormat(tokenizer(template=template)).render("line 1", turns)


def test_calibration_and_finetuning_read_conversations(tmp_path: Path) -> None:
    file = tmp_path / "chats.jsonl"
    file.write_text("".join(json.dumps({"messages": MESSAGES}) + "\n" for _ in range(40)))
    expected = ("<s>" + RENDERED) + "<s>"  # and EOS, which is <s> too
    stream = encode(tokenizer(), expected)
    settings = CalibrationSettings(data=(str(file),), num_samples=2, seq_len=len(stream))
    blocks, _ = calibration_tokens(tiny_model(), tokenizer(), settings)
    assert blocks.tolist() == [stream, stream]
    plain = settings.model_copy(update={"chat_template": "none"})
    blocks, _ = calibration_tokens(tiny_model(), tokenizer(template=None), plain)
    assert "Hi?\n\nYo." in byte_tokenizer().decode(blocks[0])
    training = FinetuneSettings(
        data=(str(file),), max_steps=1, held_out=1, train_length=len(stream), batch_size=1
    )
    tokens = training_text(tiny_model(), tokenizer(), training, "finetune").tokens
    assert tokens.tolist() == [stream, stream]
