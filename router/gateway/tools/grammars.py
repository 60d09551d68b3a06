"""Grammars of tool calls in a model's own format, as llguidance reads them (its Lark notation)."""

from __future__ import annotations

import json

from router.gateway.tools import harmony, thinking
from router.gateway.tools.definitions import Tool, ToolUse
from router.gateway.tools.formats import ARGS, CALL_ID, MARKS, SEPARATOR, ChatFormat
from router.gateway.tools.marked import CallMarks
from router.gateway.tools.rules import Rules, json_rule, quoted
from router.gateway.tools.xml_grammar import xml_body


def grammar_of(format_: ChatFormat, use: ToolUse, prompt: str, form: str) -> str:
    """Return the grammar of an answer that may call tools, or must.

    ``form`` is the grammar of an answer without calls, or empty for any text. Reasoning may come
    before all else, and does where the prompt opens it. Raises :class:`InvalidRequestError` for a
    schema that the model's format of calls cannot be held to.
    """
    rules = Rules(format_.tokens)
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


def _thought(rules: Rules, is_opened: bool) -> str:
    rest = rules.up_to("thought_rest", thinking.CLOSES)
    opens = "" if is_opened else rules.mark(thinking.OPENS)
    return rules.add("thought", f"{opens} {rest} BLANKS") + ("" if is_opened else "?")


def _between_marks(rules: Rules, kind: str, use: ToolUse, has_form: bool, thought: str) -> str:
    marks = MARKS[kind]
    first = marks.around[0] if marks.around else marks.opens
    if kind == "mistral_v11":
        rules.add("CALL_ID", "/[a-zA-Z0-9]{9}/")
    bodies = [
        _body(rules, kind, number, tool, f"tools[{use.tools.index(tool)}].function.parameters")
        for number, tool in enumerate(use.callable)
    ]
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


def _after_first(rules: Rules, marks: CallMarks, is_repeated: bool) -> str:
    """Return what follows the first mark of calls."""
    if marks.has_named_head and not marks.closes:
        return f"call {_repeated(f'{rules.mark(marks.opens)} call', is_repeated)}"
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


def _body(rules: Rules, kind: str, number: int, tool: Tool, where: str) -> str:
    """Add a rule for a call of one tool, without marks around it; returns its name.

    ``where`` is the client's name of the tool's schema.
    """
    rule = f"call_{number}"
    if kind == "qwen3_coder":
        return rules.add(rule, xml_body(rules, number, tool, where))
    arguments, name = _arguments(tool), json.dumps(tool.name)
    if kind in ("mistral_v11", "mistral_v13"):
        call_id = f"{rules.mark(CALL_ID)} CALL_ID" if kind == "mistral_v11" else ""
        body = f"{name} {call_id} {rules.mark(ARGS)} {arguments}"
    elif kind == "deepseek_v3":
        fenced = quoted(f"{tool.name}\n```json\n")
        body = f'"function" {rules.mark(SEPARATOR)} {fenced} {arguments} "\\n```"'
    elif kind == "deepseek_v3_1":
        body = f"{name} {rules.mark(SEPARATOR)} {arguments}"
    else:
        blank = "\n" if MARKS[kind].closes else ""
        opening = quoted(f'{blank}{{"name": {name}, "arguments": ')
        body = f"{opening} {arguments} {quoted('}' + blank)}"
    return rules.add(rule, body)


def _arguments(tool: Tool) -> str:
    return json_rule({"type": "object", **tool.parameters})


def _channels(rules: Rules, use: ToolUse, has_form: bool) -> str:
    """Return the messages of gpt-oss: reasoning, and then one call or the answer."""
    channel, message = rules.mark(harmony.CHANNEL), rules.mark(harmony.MESSAGE)
    text = rules.text_without("TEXT", *harmony.MARKS)
    rest = f"{text}? {rules.mark(harmony.END)}"
    opens = f'{channel} "analysis" {message}'
    analysis = rules.add("analysis", f'{opens} {rest} {rules.mark(harmony.START)} "assistant"')
    calls = [
        rules.add(
            f"call_{number}",
            f"{channel} {quoted(f'commentary to=functions.{tool.name} ')} "
            f'{rules.mark(harmony.CONSTRAIN)} "json" {message} {_arguments(tool)}',
        )
        for number, tool in enumerate(use.callable)
    ]
    if not use.is_required:
        answer = "@form" if has_form else f"{text}?"
        calls.append(rules.add("final", f'{channel} "final" {message} {answer}'))
    return f"{analysis}? ({' | '.join(calls)})"
