"""What a parser finds in a choice's text: content, reasoning, and tool calls, in pieces."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True, slots=True)
class CallPart:
    """A piece of one tool call; the first has the ``name``, later ones more ``arguments``."""

    index: int
    name: str
    arguments: str


@dataclass(slots=True)
class Parsed:
    """The parts of a piece of text."""

    content: str = ""
    reasoning: str = ""
    calls: list[CallPart] = field(default_factory=list)

    def add(self, other: Parsed) -> None:
        """Append the parts of the text that follows."""
        self.content += other.content
        self.reasoning += other.reasoning
        self.calls += other.calls


class TextParser(Protocol):
    """Parses the text of one choice as it comes, in time linear in the text.

    The parts of all pieces together do not depend on how the text is cut.
    """

    def push(self, text: str) -> Parsed:
        """Take more text; returns what is certain by now."""
        ...

    def flush(self) -> Parsed:
        """Return the rest; the text has ended."""
        ...


class PlainText:
    """Takes all text for content."""

    def push(self, text: str) -> Parsed:
        """See :class:`TextParser`."""
        return Parsed(text)

    def flush(self) -> Parsed:
        """See :class:`TextParser`."""
        return Parsed()
