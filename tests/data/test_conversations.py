"""Conversations become the text that the chat template of the model makes of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from lrcompress.config import CalibrationSettings, FinetuneSettings
from lrcompress.data.calibration_text import calibration_text
from lrcompress.data.conversations import ChatFormat, with_template
from lrcompress.data.corpora import read_corpus
from lrcompress.data.packing import IGNORED, encode, encode_with_labels
from lrcompress.data.training_text import training_text
from lrcompress.data.windows import Windowing
from lrcompress.evaluation.perplexity import perplexity
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


MULTITURN = [
    {"role": "assistant", "content": "Ask."},
    {"role": "user", "content": "Hi?"},
    {"role": "assistant", "content": "Yo."},
    {"role": "user", "content": "And\r\nnow?"},
    {"role": "assistant", "content": "Bye."},
]
CHATML = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
GENERATION = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}</>{% endgeneration %}\n"
    "{% else %}{{ m.content }}</>\n{% endif %}{% endfor %}"
)


def answers_of(template: str | None, turns: list[dict[str, str]], bos: bool = False) -> list[str]:
    """The texts of the answers, which `tokenizer` gives tokens of their own."""
    chat = ChatFormat(tokenizer(bos, template), template is None, None, marks_answers=True)
    text = chat.render("line 1", turns)
    assert text.answers is not None
    return [text[begin:end] for begin, end in text.answers]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHATML, ["Yo.</>\n", "Bye.</>\n"]),
        ("{{ bos_token }}" + CHATML, ["Yo.</>\n", "Bye.</>\n"]),
        (GENERATION, ["Ask.</>", "Yo.</>", "Bye.</>"]),  # the template itself says that it counts
        ("{{ bos_token }}" + GENERATION, ["Ask.</>", "Yo.</>", "Bye.</>"]),
        (TEMPLATE, ["[assistant]Yo.\n", "[assistant]Bye.\n"]),  # it has no prompt for an answer
        (None, ["Yo.", "Bye."]),
    ],
)
@pytest.mark.parametrize("bos", [False, True])
def test_answers_are_found(template: str | None, expected: list[str], bos: bool) -> None:
    assert answers_of(template, MULTITURN, bos) == expected


def test_answers_that_the_template_does_not_tell_are_refused(tmp_path: Path) -> None:
    """Qwen3 drops what an earlier answer thought once another turn follows."""
    forgetful = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content if loop.last else '' }}</>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    chat = ChatFormat(tokenizer(template=forgetful), marks_answers=True)
    text = chat.render("line 1", MULTITURN)
    assert text.answers is None
    with pytest.raises(InputError, match=r"answers in 'x' are not known \(the chat template does"):
        encode_with_labels("x", tokenizer(), text, "answers")
    assert ChatFormat(tokenizer()).render("line 1", MULTITURN).answers is None  # nobody asked
    with pytest.raises(InputError, match="it holds text that is no conversation"):
        encode_with_labels("x", tokenizer(), "plain text", "answers")


def test_labels_are_the_tokens_of_answers() -> None:
    """One token for each byte, so that an answer with é has a token more than characters."""
    turns = [{"role": "user", "content": "Né?"}, {"role": "assistant", "content": "é!"}]
    text = ChatFormat(tokenizer(template=CHATML), marks_answers=True).render("line 1", turns)
    ids, labels = encode_with_labels("x", tokenizer(), text, "answers")
    assert ids == encode(tokenizer(), "<user>Né?</>\n<assistant>é!</>\n")
    answer = encode(tokenizer(), "é!</>\n")
    assert len(answer) == 3 + 4
    assert labels == [IGNORED] * (len(ids) - len(answer)) + answer
    assert encode_with_labels("x", tokenizer(), text, "all") == (ids, ids)


def test_training_labels_answers_alone(tmp_path: Path) -> None:
    """Blocks of 16 tokens of conversations of 32: every second one has no answer."""
    file = tmp_path / "chats.jsonl"
    turns = [{"role": "user", "content": "?" * 14}, {"role": "assistant", "content": "Yes"}]
    file.write_text("".join(json.dumps({"messages": turns}) + "\n" for _ in range(40)))
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% else %}"
        "{% generation %}{{ m.content }}{% endgeneration %}{% endif %}{% endfor %}"
        "{{ '.' * 14 }}"
    )
    settings = FinetuneSettings(
        data=(str(file),), max_steps=3, held_out=1, train_length=16, batch_size=1
    )
    answers = settings.model_copy(update={"loss_on": "answers"})
    text = training_text(tiny_model(), tokenizer(template=template), answers, "finetune")
    assert text.tokens.shape == text.labels.shape == (4, 16)
    for tokens, labels in zip(text.tokens, text.labels, strict=True):
        counts = labels != IGNORED
        assert bool(counts[1:].any())
        assert torch.equal(labels[counts], tokens[counts])
        assert set(byte_tokenizer().decode(labels[counts])) <= set("Yes")
        assert not {*"Yes"} & {*byte_tokenizer().decode(tokens[~counts])}
    whole = training_text(tiny_model(), tokenizer(template=template), settings, "finetune")
    assert torch.equal(whole.labels, whole.tokens)


def test_gradients_of_calibration_are_of_answers(tmp_path: Path) -> None:
    file = tmp_path / "chats.jsonl"
    file.write_text("".join(json.dumps({"messages": MESSAGES}) + "\n" for _ in range(40)))
    settings = CalibrationSettings(
        data=("self", str(file)), num_samples=4, seq_len=64, loss_on="answers"
    )
    text = calibration_text(tiny_model(), tokenizer(), settings)
    written, read = slice(0, None, 2), slice(1, None, 2)
    assert torch.equal(text.labels[written], text.tokens[written])  # the model only answers
    counts = text.labels[read] != IGNORED
    assert torch.equal(text.labels[read][counts], text.tokens[read][counts])
    answer = MESSAGES[-1]["content"]
    decoded = byte_tokenizer().decode(text.labels[read][counts])
    assert answer in decoded
    assert MESSAGES[0]["content"] not in decoded


def test_calibration_and_finetuning_read_conversations(tmp_path: Path) -> None:
    file = tmp_path / "chats.jsonl"
    file.write_text("".join(json.dumps({"messages": MESSAGES}) + "\n" for _ in range(40)))
    expected = ("<s>" + RENDERED) + "<s>"  # and EOS, which is <s> too
    stream = encode(tokenizer(), expected)
    settings = CalibrationSettings(data=(str(file),), num_samples=2, seq_len=len(stream))
    blocks = calibration_text(tiny_model(), tokenizer(), settings).tokens
    assert blocks.tolist() == [stream, stream]
    plain = settings.model_copy(update={"chat_template": "none"})
    blocks = calibration_text(tiny_model(), tokenizer(template=None), plain).tokens
    assert "Hi?\n\nYo." in byte_tokenizer().decode(blocks[0])
    training = FinetuneSettings(
        data=(str(file),), max_steps=1, held_out=1, train_length=len(stream), batch_size=1
    )
    tokens = training_text(tiny_model(), tokenizer(), training, "finetune").tokens
    assert tokens.tolist() == [stream, stream]


def test_one_conversation_in_every_form_gives_one_perplexity(tmp_path: Path) -> None:
    rows = {"messages": [{"messages": MESSAGES}], "conversations": [{"conversations": SHAREGPT}]}
    for name, content in rows.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(content[0]))
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
        Dataset.from_list(content).to_parquet(str(tmp_path / f"{name}.parquet"))
    (tmp_path / "text.txt").write_text("<s>" + RENDERED)
    loaded, chat = (tiny_model(), tokenizer()), ChatFormat(tokenizer())
    values = {
        file.name: perplexity(
            "m", loaded, read_corpus(str(file), "test", chat), Windowing(16)
        ).value
        for file in sorted(tmp_path.iterdir())
    }
    assert len(values) == 7
    assert set(values.values()) == {values["text.txt"]}
