"""Turns conversations into text: by the chat template of a model, by one from a file, or plainly.

The text remembers which of it are the answers, which a loss can be restricted to.

A conversation is a list of messages {role, content}, or of turns {from, value} as in ShareGPT.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from lrcompress.config.field_types import LossOn
from lrcompress.data.packing import bos_token
from lrcompress.data.text import Conversation, Span, with_unix_lines
from lrcompress.runtime.errors import InputError
from lrcompress.runtime.paths import user_path

# fields that hold a conversation
FIELDS = ("messages", "conversations")
# values of the setting chat_template other than a file
AUTO, PLAIN = "auto", "none"
# speaker in ShareGPT -> role in chat templates; other names stay
ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"}
ANSWERING = "assistant"
# a template with this block says itself which of its text the model has to write
GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")
# what a template may raise
TEMPLATE_ERRORS = (TemplateError, TypeError, ValueError, LookupError, AttributeError)


def template_text(setting: str) -> str | None:
    """The template in the file that `setting` names; None for auto and none.

    Raises InputError where the file cannot be read.
    """
    if setting in (AUTO, PLAIN):
        return None
    try:
        return user_path(setting).read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = "is not UTF-8" if isinstance(error, UnicodeDecodeError) else error.strerror
        raise InputError(
            f"chat template {setting!r} cannot be read ({reason}): give a Jinja file, auto for "
            "the model's own, or none for plain text"
        ) from None


def with_template(tokenizer: Any, setting: str) -> Any:
    """`tokenizer`, or a copy with the template of the file that `setting` names.

    Raises InputError where the file cannot be read.
    """
    template = template_text(setting)
    if template is None:
        return tokenizer
    changed = copy(tokenizer)
    changed.chat_template = template
    return changed


@dataclass(frozen=True)
class ChatFormat:
    """How conversations become text.

    is_plain: the contents of the messages, with empty lines between them; otherwise by a template.
    template: Jinja text that replaces the template of `tokenizer`.
    marks_answers: whether texts remember where their answers are.
    """

    tokenizer: Any
    is_plain: bool = False
    template: str | None = None
    marks_answers: bool = False

    @classmethod
    def from_setting(cls, tokenizer: Any, setting: str, loss_on: LossOn = "all") -> ChatFormat:
        """By the setting chat_template: auto (the template of `tokenizer`), none, or a file.

        Raises InputError where the file cannot be read.
        """
        return cls(tokenizer, setting == PLAIN, template_text(setting), loss_on == "answers")

    def render(self, place: str, turns: Sequence[Any]) -> Conversation:
        """The text of a conversation, without BOS at its start if the tokenizer adds BOS itself.

        Raises InputError, which names `place`, where there is no template or it refuses.
        """
        messages = [_message(place, turn) for turn in turns]
        if self.is_plain:
            return _plain(messages)
        if self.template is None and not getattr(self.tokenizer, "chat_template", None):
            raise InputError(
                f"{place} is a conversation, and the model has no chat template: give "
                "--chat-template FILE (in a recipe chat_template), or none for plain text"
            )
        try:
            text = self._apply_template(messages)
        except TEMPLATE_ERRORS as error:
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise InputError(
                f"{place} does not go with the chat template ({reason}): leave it out, or give "
                "another --chat-template"
            ) from error
        answers = self._answers(text, messages) if self.marks_answers else None
        bos = "" if bos_token(self.tokenizer) is None else self.tokenizer.bos_token
        return Conversation(text, answers).without_start(bos)

    def _apply_template(self, messages: list[dict[str, Any]], **options: Any) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                messages, tokenize=False, chat_template=self.template, **options
            )
        )

    def _answers(self, text: str, messages: list[dict[str, Any]]) -> tuple[Span, ...] | None:
        """The begin and end of every answer in `text`; None where the template does not tell.

        A template with a generation block tells it. Otherwise an answer is what a message of the
        assistant adds to the text of the messages before it, with which the template asks for an
        answer. What a conversation opens with is no answer.
        """
        template = self.template or self.tokenizer.chat_template
        if isinstance(template, str) and GENERATION_BLOCK.search(template):
            return self._generated(template, messages)
        spans = [
            self._added(text, messages[: index + 1])
            for index, message in enumerate(messages)
            if index and message["role"] == ANSWERING
        ]
        return None if None in spans else tuple(filter(None, spans))

    def _added(self, text: str, messages: list[dict[str, Any]]) -> Span | None:
        """What the last of `messages` adds to the text of those before it; `text` goes on."""
        try:
            before = self._apply_template(messages[:-1], add_generation_prompt=True)
            whole = self._apply_template(messages)
        except TEMPLATE_ERRORS:
            return None
        is_added = whole.startswith(before) and text.startswith(whole)
        return (len(before), len(whole)) if is_added else None

    def _generated(self, template: str, messages: list[dict[str, Any]]) -> tuple[Span, ...]:
        """The begin and end of every generation block."""
        from transformers.utils.chat_template_utils import render_jinja_template

        _, spans = render_jinja_template(
            conversations=[messages],
            chat_template=template,
            return_assistant_tokens_mask=True,
            **self.tokenizer.special_tokens_map,
        )
        return tuple((begin, end) for begin, end in spans[0])


def _plain(messages: Sequence[Mapping[str, Any]]) -> Conversation:
    """The contents of `messages`, with empty lines between them."""
    text, answers = "", list[Span]()
    for message in messages:
        if content := _content(message):
            text += "\n\n" * bool(text)
            if text and message["role"] == ANSWERING:
                answers.append((len(text), len(text) + len(content)))
            text += content
    return Conversation(text, tuple(answers))


def _message(place: str, turn: Any) -> dict[str, Any]:
    """One message {role, content, ...}, without the empty fields that table formats add."""
    if not isinstance(turn, Mapping):
        raise InputError(f"{place} holds a list, but not of messages: name a field with text")
    fields = {key: _with_unix_lines(value) for key, value in turn.items() if value is not None}
    if "from" in fields and "value" in fields:
        speaker = fields["from"]
        return {"role": ROLES.get(speaker, speaker), "content": fields["value"]}
    if not isinstance(fields.get("role"), str):
        names = ", ".join(map(str, turn)) or "none"
        raise InputError(
            f"{place} holds a message without role and content, or from and value (fields: {names})"
        )
    return fields


def _with_unix_lines(value: Any) -> Any:
    return with_unix_lines(value) if isinstance(value, str) else value


def _content(message: Mapping[str, Any]) -> str:
    """The text of a message, whose content may be a list of parts."""
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    return "\n".join(str(part["text"]) for part in content if part.get("type") == "text")
