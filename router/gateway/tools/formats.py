"""How a model writes reasoning and tool calls, told by its chat template and its vocabulary."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from router.gateway.tools import harmony, thinking
from router.gateway.tools.calls import Calls
from router.gateway.tools.harmony import HarmonyParser
from router.gateway.tools.marked import CallMarks, MarkedParser
from router.gateway.tools.parts import PlainText, TextParser
from router.gateway.tools.response_template import ResponseTemplateParser
from router.gateway.tools.thinking import ThinkingParser
from router.gateway.tools.xml_call import FUNCTION

CallKind = Literal[
    "", "tool_call", "qwen3_coder", "mistral", "mistral_v11", "mistral_v13", "deepseek_v3",
    "deepseek_v3_1", "harmony",
]  # fmt: skip
_DEEPSEEK = ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>")
_DEEPSEEK_CALL = ("<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>")
SEPARATOR = "<｜tool▁sep｜>"
CALL_ID, ARGS = "[CALL_ID]", "[ARGS]"
_NAME = r"(?P<name>[^\s<｜]{1,64})"
_MISTRAL_NAME = r"(?P<name>[^\s\[\]]{1,64})"
_MISTRAL_ID = r"(?:\[CALL_ID\]\s*[^\s\[\]]{1,64}\s*)?"
_MISTRAL_V11 = CallMarks(
    "[TOOL_CALLS]",
    head=rf"\s*{_MISTRAL_NAME}\s*{_MISTRAL_ID}\[ARGS\]\s*",
    tail="",
    within=(CALL_ID, ARGS),
)
_WITH_ID = re.compile(r"\[CALL_ID\](?:(?!\[(?:CALL_ID|TOOL_\w+)\]).){0,256}\[ARGS\]", re.DOTALL)
"""In a template that writes the id of a call before its arguments: Mistral's version 11."""
MARKS: Mapping[str, CallMarks] = {
    "tool_call": CallMarks("<tool_call>", "</tool_call>"),
    "qwen3_coder": CallMarks("<tool_call>", "</tool_call>", is_xml=True),
    "mistral": CallMarks("[TOOL_CALLS]", tail=""),
    "mistral_v11": _MISTRAL_V11,
    "mistral_v13": _MISTRAL_V11,
    "deepseek_v3": CallMarks(
        *_DEEPSEEK_CALL,
        around=_DEEPSEEK,
        head=rf"\s*function\s*{SEPARATOR}\s*{_NAME}\s*(?:```json)?\s*",
        tail=r"\s{0,16}(?:```)?\s{0,16}",
        within=(SEPARATOR,),
    ),
    "deepseek_v3_1": CallMarks(
        *_DEEPSEEK_CALL,
        around=_DEEPSEEK,
        head=rf"\s*{_NAME}\s*{SEPARATOR}\s*",
        within=(SEPARATOR,),
    ),
}
"""The formats between marks."""


@dataclass(frozen=True, slots=True)
class ChatFormat:
    """A model's format. ``calls`` is empty where it has none, and ``reason`` says why.

    ``special`` are the marks that are special tokens, by their text, and ``tokens`` all marks that
    are tokens of their own. ``response_template`` is the checkpoint's own, or ``None``; it takes
    the place of the parsers here.
    """

    calls: CallKind = ""
    thinks: bool = False
    special: Mapping[str, int] = field(default_factory=dict)
    tokens: Mapping[str, int] = field(default_factory=dict)
    response_template: Mapping[str, Any] | None = None
    reason: str = ""

    @property
    def is_plain(self) -> bool:
        """Whether a text without calls is content alone."""
        return not (self.thinks or self.calls == "harmony" or self.response_template is not None)

    @property
    def has_short_ids(self) -> bool:
        """Whether ids of calls have nine letters and digits, as Mistral's templates want."""
        return self.calls.startswith("mistral")

    def is_opened(self, prompt: str) -> bool:
        """Return whether a prompt opens the reasoning of the answer."""
        return self.thinks and prompt.rstrip().endswith(thinking.OPENS)

    def parser(
        self, prompt: str, calls: Calls, tools: Sequence[dict[str, Any]] | None
    ) -> TextParser:
        """Return the parser of one choice after ``prompt``; without ``tools`` none is called."""
        if self.response_template is not None:
            return ResponseTemplateParser(
                self.response_template, prompt, calls, tools or (), self.special
            )
        if self.calls == "harmony":
            return HarmonyParser(calls)
        marks = MARKS.get(self.calls)
        parser: TextParser = PlainText()
        if tools is not None and marks is not None:
            functions = [tool["function"] for tool in tools]
            schemas = {each["name"]: each["parameters"] for each in functions}
            parser = MarkedParser(marks, calls, self.special, schemas)
        return ThinkingParser(parser, self.is_opened(prompt)) if self.thinks else parser


def format_of(
    template: str,
    added_ids: Mapping[str, int],
    special_ids: Collection[int],
    eos_ids: Collection[int],
    response_template: Mapping[str, Any] | None = None,
) -> ChatFormat:
    """Return the format that a chat template shows.

    ``added_ids`` are the tokens that a tokenizer has beside its ordinary ones, and ``special_ids``
    those that have no text in an answer.
    """
    thinks = thinking.OPENS in template or thinking.CLOSES in template
    kind, reason = _calls_of(template, added_ids)
    if kind == "harmony":
        thinks = False
    marks = _marks_of(kind) + ((thinking.OPENS, thinking.CLOSES) if thinks else ())
    tokens = {mark: added_ids[mark] for mark in marks if mark in added_ids}
    tokens = {mark: token_id for mark, token_id in tokens.items() if token_id not in eos_ids}
    seen = tokens if response_template is None else added_ids
    special = {
        mark: token_id
        for mark, token_id in seen.items()
        if token_id in special_ids and token_id not in eos_ids
    }
    return ChatFormat(kind, thinks, special, tokens, response_template, reason)


def _marks_of(kind: CallKind) -> tuple[str, ...]:
    if kind == "harmony":
        return harmony.MARKS
    marks = MARKS.get(kind)
    if marks is None:
        return ()
    return tuple(filter(None, (marks.opens, marks.closes, *marks.around, *marks.within)))


def _calls_of(template: str, added_ids: Mapping[str, int]) -> tuple[CallKind, str]:
    """Return how a template writes calls, or why that cannot be told."""
    if harmony.CHANNEL in template and all(mark in added_ids for mark in harmony.MARKS):
        return "harmony", ""
    if _DEEPSEEK_CALL[0] in template:
        return ("deepseek_v3" if "```json" in template else "deepseek_v3_1"), ""
    if "[TOOL_CALLS]" in template:
        if ARGS in template:
            return ("mistral_v11" if _WITH_ID.search(template) else "mistral_v13"), ""
        return "mistral", ""
    if "<tool_call>" in template:
        if "<arg_key>" in template:
            return "", "its template writes calls with <arg_key>, which is not known here"
        return ("qwen3_coder" if FUNCTION in template else "tool_call"), ""
    return "", "its chat template writes no tool calls of a known format"
