"""The parsing of one request's choices, each with a parser of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from router.gateway.tools.calls import Calls
from router.gateway.tools.definitions import ToolUse
from router.gateway.tools.formats import ChatFormat
from router.gateway.tools.parts import Parsed


@dataclass(frozen=True, slots=True)
class AnswerFormat:
    """How the choices of a request are parsed after its ``prompt``.

    With ``is_held`` calls come when they are whole.
    """

    format: ChatFormat
    prompt: str
    use: ToolUse | None
    is_held: bool

    @property
    def shown(self) -> Mapping[int, str]:
        """The special tokens that the parser must see, with their text."""
        return {token_id: mark for mark, token_id in self.format.special.items()}

    @property
    def may_end_early(self) -> bool:
        """Whether a call may end a choice, however the model would go on."""
        return self.use is not None and not self.use.is_parallel

    def begin(self) -> ChoiceParser:
        """Return the parser of one choice."""
        return ChoiceParser(self)


class ChoiceParser:
    """Parses the text of one choice, and tells when its calls end it."""

    def __init__(self, answer: AnswerFormat) -> None:
        use = answer.use
        names = () if use is None else tuple(tool.name for tool in use.callable)
        most = 1 if answer.may_end_early else None
        self._calls = Calls(names, answer.is_held, most)
        given = None if use is None else use.given
        self._parser = answer.format.parser(answer.prompt, self._calls, given)

    @property
    def is_full(self) -> bool:
        """Whether no more may come."""
        return self._calls.is_full

    def push(self, text: str, is_last: bool) -> Parsed:
        """Return the parts of more text."""
        parsed = self._parser.push(text)
        if is_last or self.is_full:
            parsed.add(self._parser.flush())
        return parsed

    def finish_reason(self, reason: str | None) -> str | None:
        """Return why the choice ends: by its calls, or by the given reason."""
        if reason in (None, "stop") and self.is_full:
            return "tool_calls"
        return "tool_calls" if reason == "stop" and self._calls.ends_answer else reason
