"""What a document is: text with line ends of Unix, of which a conversation knows its answers."""

from __future__ import annotations

# begin and end of characters in a text
Span = tuple[int, int]


class Conversation(str):
    """The text of a conversation.

    `answers` are the spans that the assistant wrote, in order; None where they are not known.
    """

    __slots__ = ("answers",)
    answers: tuple[Span, ...] | None

    def __new__(cls, text: str, answers: tuple[Span, ...] | None) -> Conversation:
        conversation = super().__new__(cls, text)
        conversation.answers = answers
        return conversation

    def without_start(self, start: str) -> Conversation:
        """The conversation without the text `start` at its begin, if it is there."""
        if not start or not self.startswith(start):
            return self
        cut, answers = len(start), self.answers
        moved = answers and tuple((max(begin - cut, 0), end - cut) for begin, end in answers)
        return Conversation(self[cut:], moved)


def with_unix_lines(text: str) -> str:
    """`text` without a byte order mark, and with a line feed at the end of each line."""
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
