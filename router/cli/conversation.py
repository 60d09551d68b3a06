"""What ``expertmesh chat`` remembers of a conversation, and what it forgets."""

from __future__ import annotations

from router.client import Message


class Conversation:
    """A system prompt and the exchanges so far, each a question and its answer."""

    def __init__(self, system: str = "") -> None:
        self._system = [Message("system", system)] if system else []
        self._exchanges: list[tuple[str, str]] = []

    def __len__(self) -> int:
        """Return the number of exchanges."""
        return len(self._exchanges)

    def asking(self, question: str, without: int = 0) -> list[Message]:
        """Return the messages to send with a question, ``without`` so many of the oldest."""
        messages = list(self._system)
        for asked, answered in self._exchanges[without:]:
            messages += [Message("user", asked), Message("assistant", answered)]
        return [*messages, Message("user", question)]

    def forget(self, count: int) -> None:
        """Forget the ``count`` oldest exchanges; the system prompt stays."""
        del self._exchanges[:count]

    def answered(self, question: str, answer: str) -> None:
        """Remember an exchange."""
        # A template puts its own space before a text; models write theirs first, too.
        self._exchanges.append((question, answer.strip()))
