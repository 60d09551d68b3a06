"""Grammars of tool calls in a model's own format, as llguidance reads them (its Lark notation)."""

from __future__ import annotations

import json

from router.gateway.input.tools import formats
from router.gateway.input.tools.definitions import ToolUse
from router.gateway.input.tools.formats import FAMILIES, ChatFormat, Family
from router.gateway.input.tools.rules import Rules, json_rule
from router.gateway.input.tools.xml_grammar import parameters_rule


def grammar_of(format_: ChatFormat, use: ToolUse, prompt: str, form: str) -> str:
    """Return the grammar of an answer that may call tools, or must.

    ``form`` is the grammar of an answer without calls, or empty for any text. Reasoning may come
    before all else, and does where the prompt opens it. Raises :class:`InvalidRequestError` for a
    schema that the model's format of calls cannot be held to.
    """
    rules, family = Rules(format_.tokens), FAMILIES[format_.calls]
    if "{id}" in family.written:
        rules.add("ID", "/[a-zA-Z0-9]{9}/")
    calls = [_call(rules, family, use, number) for number in range(len(use.callable))]
    if format_.calls == "harmony":
        start = _channels(rules, use, calls, bool(form))
    else:
        rules.add("call", " | ".join(calls))
        thought = _thought(rules, format_.is_opened(prompt)) if format_.thinks else ""
        start = _between_marks(rules, family, use, bool(form), thought)
    lark = "\n".join([f"start: {start}", *rules.lines])
    if not form or use.is_required:
        return lark
    [own] = json.loads(form)["grammars"]
    return json.dumps({"grammars": [{"lark_grammar": lark}, {**own, "name": "form"}]})


def _call(rules: Rules, family: Family, use: ToolUse, number: int) -> str:
    """Add a rule for a call of a tool, without the marks around it; returns its name."""
    tool = use.callable[number]
    if family.is_xml:
        where = f"tools[{use.tools.index(tool)}].function.parameters"
        arguments = parameters_rule(rules, number, tool, where)
    else:
        arguments = json_rule({"type": "object", **tool.parameters})
    written = family.written.replace("{name}", tool.name)
    return rules.add(f"call_{number}", rules.text(written, arguments))


def _thought(rules: Rules, is_opened: bool) -> str:
    rest = rules.up_to("thought_rest", formats.THINK_ENDS)
    opens = "" if is_opened else rules.text(formats.THINK)
    return rules.add("thought", f"{opens} {rest} BLANKS") + ("" if is_opened else "?")


def _between_marks(rules: Rules, family: Family, use: ToolUse, has_form: bool, thought: str) -> str:
    first = family.around[0] if family.around else family.opens
    before, between, after = (rules.text(part) for part in family.listed)
    call = f"call {rules.text(family.closes)}"
    is_repeated = use.is_parallel and (use.is_required or has_form or rules.has(first))
    more = f"({between} {call})*" if is_repeated else ""
    rest = rules.add("calls_rest", " ".join(filter(None, (before, call, more, after))))
    calls = f"{rules.text(first)} {rest}"
    if use.is_required:
        return f"{thought} {calls}"
    if has_form:
        return f"{thought} ({calls} | @form)"
    if rules.has(first):
        text = rules.text_without("TEXT", first, family.opens)
        return f"{thought} {text}? ({calls} {text}?)?"
    # The text before a call is that of reasoning too.
    lead = rules.up_to("lead", first)
    rules.add("TEXT", r"/(.|\n)+/")
    return f"({lead} {rest}){'*' if use.is_parallel else '?'} TEXT?"


def _channels(rules: Rules, use: ToolUse, calls: list[str], has_form: bool) -> str:
    """Return the messages of gpt-oss: reasoning, and then one call or the answer."""
    text = rules.text_without("TEXT", *formats.HARMONY)
    opens = rules.text(f"{formats.CHANNEL}analysis{formats.MESSAGE}")
    ends = rules.text(f"{formats.END}{formats.START}assistant")
    analysis = rules.add("analysis", f"{opens} {text}? {ends}")
    choices = [f"{rules.text(formats.CHANNEL)} {call}" for call in calls]
    if not use.is_required:
        final, answer = f"{formats.CHANNEL}final{formats.MESSAGE}", f"{text}?"
        choices.append(f"{rules.text(final)} {'@form' if has_form else answer}")
    return f"{analysis}? ({' | '.join(choices)})"
