"""Turns conversations into text: by the chat template of a model, by one from a file, or plainly.

A conversation is a list of messages {role, content}, or of turns {from, value} as in ShareGPT.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from lrcompress.data.packing import bos_token
from lrcompress.runtime.errors import InputError
from lrcompress.runtime.paths import user_path

# fields that hold a conversation
FIELDS = ("messages", "conversations")
# values of the setting chat_template other than a file
AUTO, PLAIN = "auto", "none"
# speaker in ShareGPT -> role in chat templates; other names stay
ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"}


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
    """

    tokenizer: Any
    is_plain: bool = False
    template: str | None = None

    @classmethod
    def from_setting(cls, tokenizer: Any, setting: str) -> ChatFormat:
        """By the setting chat_template: auto (the template of `tokenizer`), none, or a file.

        Raises InputError where the file cannot be read.
        """
        return cls(tokenizer, setting == PLAIN, template_text(setting))

    def render(self, place: str, turns: Sequence[Any]) -> str:
        """The text of a conversation, without BOS at its start if the tokenizer adds BOS itself.

        Raises InputError, which names `place`, where there is no template or it refuses.
        """
        messages = [_message(place, turn) for turn in turns]
        if self.is_plain:
            return "\n\n".join(filter(None, map(_content, messages)))
        if self.template is None and not getattr(self.tokenizer, "chat_template", None):
            raise InputError(
                f"{place} is a conversation, and the model has no chat template: give "
                "--chat-template FILE (in a recipe chat_template), or none for plain text"
            )
        text = self._apply_template(place, messages)
        has_bos = bos_token(self.tokenizer) is not None
        return text.removeprefix(self.tokenizer.bos_token) if has_bos else text

    def _apply_template(self, place: str, messages: list[dict[str, Any]]) -> str:
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    messages, tokenize=False, chat_template=self.template
                )
            )
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise InputError(
                f"{place} does not go with the chat template ({reason}): leave it out, or give "
                "another --chat-template"
            ) from error


def _message(place: str, turn: Any) -> dict[str, Any]:
    """One message {role, content, ...}, without the empty fields that table formats add."""
    if not isinstance(turn, Mapping):
        raise InputError(f"{place} holds a list, but not of messages: name a field with text")
    fields = {key: value for key, value in turn.items() if value is not None}
    if "from" in fields and "value" in fields:
        speaker = fields["from"]
        return {"role": ROLES.get(speaker, speaker), "content": fields["value"]}
    if not isinstance(fields.get("role"), str):
        names = ", ".join(map(str, turn)) or "none"
        raise InputError(
            f"{place} holds a message without role and content, or from and value (fields: {names})"
        )
    return fields


def _content(message: Mapping[str, Any]) -> str:
    """The text of a message, whose content may be a list of parts."""
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    return "\n".join(str(part["text"]) for part in content if part.get("type") == "text")
