"""How a model writes reasoning and tool calls, told by its chat template and its vocabulary."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

CallKind = Literal[
    "", "harmony", "deepseek_v3", "deepseek_v3_1", "mistral_v11", "mistral_v13", "mistral",
    "qwen3_coder", "tool_call",
]  # fmt: skip
THINK, THINK_ENDS = "<think>", "</think>"
START, CHANNEL, MESSAGE = "<|start|>", "<|channel|>", "<|message|>"
END, CALL, RETURN, CONSTRAIN = "<|end|>", "<|call|>", "<|return|>", "<|constrain|>"
HARMONY = (START, CHANNEL, MESSAGE, END, CALL, RETURN, CONSTRAIN)
_LIST, _LIST_ENDS = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
_CALL, _CALL_ENDS, _SEP = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>"
_MISTRAL = r"\[TOOL_CALLS\]"
FUNCTION, FUNCTION_ENDS = "<function=", "</function>"


@dataclass(frozen=True, slots=True)
class Family:
    """How models of a family write calls.

    Their chat templates match all ``signs``. A call stands in a text as ``opens``, ``head``, JSON,
    ``tail``, ``closes``; signs, head and tail are regular expressions. With a group ``name`` in the
    head the JSON is the arguments. Without one it is an object with ``name`` and ``arguments``, or
    a list of such objects. ``around`` stand before the first call and after the last, ``within``
    are marks of the head. Grammars allow ``written`` between ``opens`` and ``closes``, and
    ``listed`` before the first call, between two calls and after the last.
    """

    signs: tuple[str, ...]
    opens: str
    written: str
    listed: tuple[str, str, str]
    closes: str = ""
    around: tuple[str, ...] = ()
    within: tuple[str, ...] = ()
    head: str = r"\s*(?:(?=\{)|\[(?=\s*[{\]]))"
    tail: str = ""

    @property
    def marks(self) -> tuple[str, ...]:
        """All marks of the family."""
        return tuple(filter(None, (self.opens, self.closes, *self.around, *self.within)))

    @property
    def is_xml(self) -> bool:
        """Whether a call has parameters between marks in place of JSON."""
        return FUNCTION in self.head


_NAME = r"(?P<name>[^\s<｜{]{1,64})"
_TOOL_CALL = Family(
    signs=("<tool_call>",),
    opens="<tool_call>",
    written='\n{"name": "{name}", "arguments": {arguments}}\n',
    listed=("", "{blanks}<tool_call>", ""),
    closes="</tool_call>",
    tail=r"\s{0,32}",
)
_MISTRAL_V13 = Family(
    signs=(_MISTRAL, r"\[ARGS\]"),
    opens="[TOOL_CALLS]",
    written="{name}[ARGS]{arguments}",
    listed=("", "[TOOL_CALLS]", ""),
    within=("[CALL_ID]", "[ARGS]"),
    head=r"\s*(?P<name>[^\s\[\]{]{1,64})\s*(?:\[CALL_ID\]\s*[^\s\[\]{]{1,64}\s*)?"
    r"\[ARGS\]\s*(?=\{)",
)
_DEEPSEEK_V3_1 = Family(
    signs=(_CALL,),
    opens=_CALL,
    written=f"{{name}}{_SEP}{{arguments}}",
    listed=(_CALL, f"{{blanks}}{_CALL}", _LIST_ENDS),
    closes=_CALL_ENDS,
    around=(_LIST, _LIST_ENDS),
    within=(_SEP,),
    head=rf"\s*{_NAME}\s*{_SEP}\s*(?=\{{)",
    tail=r"\s{0,32}",
)
FAMILIES: Mapping[CallKind, Family] = {
    "harmony": Family(
        signs=(r"<\|channel\|>",),
        opens=CHANNEL,
        written=f"commentary to=functions.{{name}} {CONSTRAIN}json{MESSAGE}{{arguments}}",
        listed=("", "", ""),
        within=HARMONY,
    ),
    "deepseek_v3": replace(
        _DEEPSEEK_V3_1,
        signs=(_CALL, "```json"),
        written=f"function{_SEP}{{name}}\n```json\n{{arguments}}\n```",
        head=rf"\s*function\s*{_SEP}\s*{_NAME}\s*(?:```json)?\s*(?=\{{)",
        tail=r"\s{0,16}(?:```)?\s{0,16}",
    ),
    "deepseek_v3_1": _DEEPSEEK_V3_1,
    "mistral_v11": replace(  # an id stands between a name and its arguments
        _MISTRAL_V13,
        signs=(_MISTRAL, r"\[CALL_ID\](?:(?!\[(?:CALL_ID|TOOL_\w+)\]).){0,256}\[ARGS\]"),
        written="{name}[CALL_ID]{id}[ARGS]{arguments}",
    ),
    "mistral_v13": _MISTRAL_V13,
    "mistral": Family(
        signs=(_MISTRAL,),
        opens="[TOOL_CALLS]",
        written='{"name": "{name}", "arguments": {arguments}}',
        listed=("{space}[", ", ", "]"),
    ),
    "qwen3_coder": replace(
        _TOOL_CALL,
        signs=("<tool_call>", FUNCTION),
        written=f"\n{FUNCTION}{{name}}>\n{{arguments}}{FUNCTION_ENDS}\n",
        head=rf"\s*{FUNCTION}(?P<name>[^\s<>]{{1,64}})>",
    ),
    "tool_call": _TOOL_CALL,
}
"""The families; a chat template is of the first all of whose signs it has."""


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
        """Whether a text without calls is only content."""
        return not (self.thinks or self.calls == "harmony" or self.response_template is not None)

    @property
    def has_short_ids(self) -> bool:
        """Whether ids of calls have nine letters and digits, as Mistral's templates want."""
        return self.calls.startswith("mistral")

    @property
    def family(self) -> Family | None:
        """How the model writes calls, ``None`` where it is not known."""
        return FAMILIES[self.calls] if self.calls else None

    def is_opened(self, prompt: str) -> bool:
        """Return whether a prompt opens the reasoning of the answer."""
        return self.thinks and prompt.rstrip().endswith(THINK)


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
    kinds: Sequence[CallKind] = [
        kind
        for kind, family in FAMILIES.items()
        if all(re.search(sign, template, re.DOTALL) for sign in family.signs)
        and (kind != "harmony" or all(mark in added_ids for mark in family.marks))
    ]
    kind: CallKind = kinds[0] if kinds else ""
    reason = "" if kind else "its chat template writes no tool calls of a known format"
    if kind in ("qwen3_coder", "tool_call") and "<arg_key>" in template:
        kind, reason = "", "its template writes calls with <arg_key>, which is not supported"
    thinks = kind != "harmony" and (THINK in template or THINK_ENDS in template)
    marks = (*(FAMILIES[kind].marks if kind else ()), *((THINK, THINK_ENDS) if thinks else ()))
    ids = {mark: token_id for mark, token_id in added_ids.items() if token_id not in eos_ids}
    tokens = {mark: token_id for mark, token_id in ids.items() if mark in marks}
    seen = tokens if response_template is None else ids
    special = {mark: token_id for mark, token_id in seen.items() if token_id in special_ids}
    return ChatFormat(kind, thinks, special, tokens, response_template, reason)
