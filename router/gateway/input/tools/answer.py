"""How the choices of one request are parsed, each by a parser of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from router.gateway.input.tools.calls import Calls
from router.gateway.input.tools.definitions import ToolUse
from router.gateway.input.tools.formats import ChatFormat
from router.gateway.input.tools.harmony import HarmonyParser
from router.gateway.input.tools.parser import FamilyParser
from router.gateway.input.tools.reader import ChoiceParser
from router.gateway.input.tools.response_template import TemplateParser


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
        names = () if self.use is None else tuple(tool.name for tool in self.use.callable)
        calls = Calls(names, self.is_held, 1 if self.may_end_early else None)
        tools = None if self.use is None else self.use.given
        if self.format.response_template is not None:
            return TemplateParser(self.format, self.prompt, calls, tools)
        kind = HarmonyParser if self.format.calls == "harmony" else FamilyParser
        return kind(self.format, self.prompt, calls, tools)
