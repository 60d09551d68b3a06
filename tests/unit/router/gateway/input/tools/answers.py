"""Answers of the families in their published formats, and how tests take them apart."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from router.gateway.input.chat_request import AnswerFormat
from router.gateway.input.request.parts import Function
from router.gateway.input.tools.definitions import ToolUse
from router.gateway.input.tools.formats import ChatFormat
from router.gateway.input.tools.reader import ChoiceParser

WEATHER: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city"],
    "additionalProperties": False,
}
NOW: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
DEEPSEEK = (
    "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>",
    "<｜tool▁call▁end｜>", "<｜tool▁sep｜>",
)  # fmt: skip
HARMONY = (
    "<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|call|>", "<|return|>", "<|constrain|>"
)  # fmt: skip
LATER = ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]")


def tool(name: str, parameters: dict[str, Any], is_strict: bool = False) -> Function:
    return Function(name=name, parameters=parameters, strict=is_strict)


TOOLS = (tool("get_weather", WEATHER), tool("now", NOW))
USE = ToolUse(TOOLS, TOOLS)


@dataclass
class Whole:
    content: str = ""
    reasoning: str = ""
    calls: list[tuple[str, str]] = field(default_factory=list)
    finish_reason: str | None = None

    def take(self, parser: ChoiceParser, text: str, is_last: bool) -> None:
        parsed = parser.push(text, is_last)
        self.content += parsed.content
        self.reasoning += parsed.reasoning
        for part in parsed.calls:
            if part.index == len(self.calls):
                assert part.name
                self.calls.append((part.name, ""))
            name, arguments = self.calls[part.index]
            self.calls[part.index] = (name, arguments + part.arguments)


def parsed(
    format_: ChatFormat,
    pieces: list[str],
    is_held: bool = False,
    use: ToolUse | None = USE,
    prompt: str = "",
    reason: str = "stop",
) -> Whole:
    """What the parser of a format makes of pieces of text."""
    parser = AnswerFormat(format_, prompt, use, is_held).begin()
    whole = Whole()
    for piece in pieces:
        whole.take(parser, piece, False)
        if parser.is_full:
            break
    else:
        whole.take(parser, "", True)
    whole.finish_reason = parser.finish_reason(reason)
    return whole
