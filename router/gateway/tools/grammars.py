"""Grammars of tool calls in a model's own format, as llguidance reads them (its Lark notation)."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

from router.gateway.grammar import WHITESPACE
from router.gateway.tools import harmony, thinking
from router.gateway.tools.definitions import Tool, ToolUse
from router.gateway.tools.formats import MARKS, SEPARATOR, ChatFormat
from router.gateway.tools.marked import CallMarks


def grammar_of(format_: ChatFormat, use: ToolUse, prompt: str, form: str) -> str:
    """Return the grammar of an answer that may call tools, or must.

    ``form`` is the grammar of an answer without calls, or empty for any text. Reasoning may come
    before all else, and does where the prompt opens it.
    """
    rules = _Rules(format_.tokens)
    if format_.calls == "harmony":
        start = _channels(rules, use, bool(form))
    else:
        thought = _thought(rules, format_.is_opened(prompt)) if format_.thinks else ""
        start = _between_marks(rules, format_.calls, use, bool(form), thought)
    lark = "\n".join([f"start: {start}", *rules.lines])
    if not form or use.is_required:
        return lark
    [own] = json.loads(form)["grammars"]
    return json.dumps({"grammars": [{"lark_grammar": lark}, {**own, "name": "form"}]})


class _Rules:
    """The rules of a grammar; those in capitals are texts.

    A mark that is a token of its own is that token, which a text cannot have. A text is not to
    spell it either, since parsers see text alone.
    """

    def __init__(self, tokens: Mapping[str, int]) -> None:
        self._tokens = tokens
        self.lines = [r"BLANKS: /[ \n]{0,4}/"]

    def has(self, mark: str) -> bool:
        """Return whether a mark is a token of its own."""
        return mark in self._tokens

    def mark(self, mark: str) -> str:
        """Return a mark: a token, or a text."""
        return f"<[{self._tokens[mark]}]>" if mark in self._tokens else _quoted(mark)

    def add(self, name: str, body: str) -> str:
        """Add a rule; returns its name without its options."""
        self.lines.append(f"{name}: {body}")
        return name.partition("[")[0]

    def text_without(self, name: str, *marks: str) -> str:
        """Add a rule for any text that does not spell a mark; returns its name."""
        spelled = "|".join(map(_escaped, marks))
        return self.add(name, rf"/(.|\n)+/ & ~/(.|\n)*({spelled})(.|\n)*/")

    def up_to(self, name: str, mark: str) -> str:
        """Add a rule for any text up to a mark, and the mark; returns its name."""
        if self.has(mark):
            return self.add(name, f"{self.text_without(name.upper(), mark)}? {self.mark(mark)}")
        return self.add(f"{name}[lazy]", rf"/(.|\n)*{_escaped(mark)}/")


def _escaped(mark: str) -> str:
    return re.escape(mark).replace("/", r"\/")


def _thought(rules: _Rules, is_opened: bool) -> str:
    rest = rules.up_to("thought_rest", thinking.CLOSES)
    opens = "" if is_opened else rules.mark(thinking.OPENS)
    return rules.add("thought", f"{opens} {rest} BLANKS") + ("" if is_opened else "?")


def _between_marks(rules: _Rules, kind: str, use: ToolUse, has_form: bool, thought: str) -> str:
    marks = MARKS[kind]
    first = marks.around[0] if marks.around else marks.opens
    bodies = (_body(rules, kind, number, tool) for number, tool in enumerate(use.callable))
    rules.add("call", " | ".join(bodies))
    is_repeated = use.is_parallel and (use.is_required or has_form or rules.has(first))
    rest = rules.add("calls_rest", _after_first(rules, marks, is_repeated))
    calls = f"{rules.mark(first)} {rest}"
    if use.is_required:
        return f"{thought} {calls}"
    if has_form:
        return f"{thought} ({calls} | @form)"
    if rules.has(first):
        text = rules.text_without("TEXT", first, marks.opens)
        return f"{thought} {text}? ({calls} {text}?)?"
    # The text before a call is that of reasoning too.
    lead = rules.up_to("lead", first)
    rules.add("TEXT", r"/(.|\n)+/")
    return f"({lead} {rest}){'*' if use.is_parallel else '?'} TEXT?"


def _after_first(rules: _Rules, marks: CallMarks, is_repeated: bool) -> str:
    """Return what follows the first mark of calls."""
    if not marks.closes:
        more = _repeated('", " call', is_repeated)
        return f'" "? "[" call {more} "]"'
    call = f"call {rules.mark(marks.closes)}"
    more = _repeated(f"BLANKS {rules.mark(marks.opens)} {call}", is_repeated)
    if not marks.around:
        return f"{call} {more}"
    return f"{rules.mark(marks.opens)} {call} {more} {rules.mark(marks.around[1])}"


def _repeated(part: str, is_repeated: bool) -> str:
    return f"({part})*" if is_repeated else ""


def _body(rules: _Rules, kind: str, number: int, tool: Tool) -> str:
    """Add a rule for a call of one tool, without marks around it; returns its name."""
    arguments, name = _json(tool), json.dumps(tool.name)
    if kind == "deepseek_v3":
        fenced = _quoted(f"{tool.name}\n```json\n")
        body = f'"function" {rules.mark(SEPARATOR)} {fenced} {arguments} "\\n```"'
    elif kind == "deepseek_v3_1":
        body = f"{name} {rules.mark(SEPARATOR)} {arguments}"
    else:
        blank = "\n" if MARKS[kind].closes else ""
        opening = _quoted(f'{blank}{{"name": {name}, "arguments": ')
        body = f"{opening} {arguments} {_quoted('}' + blank)}"
    return rules.add(f"call_{number}", body)


def _channels(rules: _Rules, use: ToolUse, has_form: bool) -> str:
    """Return the messages of gpt-oss: reasoning, and then one call or the answer."""
    channel, message = rules.mark(harmony.CHANNEL), rules.mark(harmony.MESSAGE)
    text = rules.text_without("TEXT", *harmony.MARKS)
    rest = f"{text}? {rules.mark(harmony.END)}"
    opens = f'{channel} "analysis" {message}'
    analysis = rules.add("analysis", f'{opens} {rest} {rules.mark(harmony.START)} "assistant"')
    calls = [
        rules.add(
            f"call_{number}",
            f"{channel} {_quoted(f'commentary to=functions.{tool.name} ')} "
            f'{rules.mark(harmony.CONSTRAIN)} "json" {message} {_json(tool)}',
        )
        for number, tool in enumerate(use.callable)
    ]
    if not use.is_required:
        answer = "@form" if has_form else f"{text}?"
        calls.append(rules.add("final", f'{channel} "final" {message} {answer}'))
    return f"{analysis}? ({' | '.join(calls)})"


def _json(tool: Tool) -> str:
    """Return the grammar of a tool's arguments."""
    schema = {"type": "object", **tool.parameters}
    return f"%json {json.dumps({**schema, 'x-guidance': {'whitespace_pattern': WHITESPACE}})}"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
