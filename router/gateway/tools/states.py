"""Takes text that comes in pieces, state by state."""

from __future__ import annotations

from collections.abc import Callable

from router.gateway.tools.parts import Parsed

State = Callable[[str, int, Parsed], int]
"""Takes of a text from a place on what it can, and returns the place after it; it may change the
state. One that takes nothing, and changes none, needs more text."""


class States:
    """The present state of a parser, and the text that no state has taken yet."""

    def __init__(self, first: State) -> None:
        self.now = first
        self._held = ""

    def push(self, text: str) -> Parsed:
        """Let states take of more text what they can; returns the parts that they have found."""
        parsed = Parsed()
        text = self._held + text
        self._held = text[self.run(text, 0, parsed) :]
        return parsed

    def run(self, text: str, place: int, parsed: Parsed) -> int:
        """Let states take of a text from a place on what they can; returns the place after it."""
        while place < len(text):
            state = self.now
            after = state(text, place, parsed)
            if after == place and state == self.now:
                break
            place = after
        return place

    def take(self) -> str:
        """Return the text that no state has taken, and keep none."""
        held, self._held = self._held, ""
        return held
