"""Parses answers: reasoning, then content and calls between marks, as the table of families has."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

import regex

from router.gateway.input.tools.formats import (
    CHANNEL,
    CONSTRAIN,
    HARMONY,
    MESSAGE,
    THINK_ENDS,
    ChatFormat,
)
from router.gateway.input.tools.reader import (
    Blanks,
    CallPart,
    Calls,
    ChoiceParser,
    JsonSpan,
    Steps,
    any_of,
    read_call,
)
from router.gateway.input.tools.xml_values import TEXT, as_text, json_of, kinds_of

NO_BLANK = regex.compile(r"(?=\S)")
_THOUGHT, _THOUGHT_ENDS = regex.compile(r"\s{0,63}<think>"), any_of(THINK_ENDS)
_HEAD = regex.compile(
    r'\{\s*"name"\s*:\s*(?P<name>"(?:[^"\\\x00-\x1f]|\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4}))*")'
    r'\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)'
)
_IN_LIST = regex.compile(r"[\s,]*+(?:(?=\{)|\])")
_PARAMETER = regex.compile(r"\s{0,512}(?:<parameter=(?P<key>[^<>\n]{1,256})>|</function>)")
_VALUE_BEGINS = regex.compile(r"\n|(?=.)")
_VALUE_ENDS, _TEXT_ENDS = regex.compile("</parameter>"), regex.compile("\n?</parameter>")
_BRACKETS = frozenset({"array", "object"})


class FamilyParser(ChoiceParser):
    """Parses one choice's text; what is no valid call stays content.

    Without ``tools`` none is called. Special tokens are not shown as content. A call that breaks
    off after it was passed on ends there, and what follows is content.
    """

    def __init__(
        self, format_: ChatFormat, prompt: str, calls: Calls, tools: Sequence[dict[str, Any]] | None
    ) -> None:
        super().__init__(calls)
        self._format, self._is_opened = format_, format_.is_opened(prompt)
        self._family = None if tools is None else format_.family
        self._hidden = any_of(*(format_.special if self._family else ()))
        self._schemas = {
            tool["function"]["name"]: tool["function"]["parameters"] for tool in tools or ()
        }
        self._kinds: dict[tuple[str, str], frozenset[str]] = {}
        """Those of parameters, found once for each: a schema may be large."""
        self._blanks = Blanks(is_begun=True)
        self._follows_call = False
        self._index: int | None = None
        """The index of the present call, once its name was passed on."""
        self._written: list[str] = []
        """The present call's JSON, in pieces."""

    def read(self) -> Steps[None]:
        """See :class:`router.gateway.input.tools.reader.ChoiceParser`."""
        if self._format.thinks:
            yield from self._thought()
        yield from self._text()
        self.show(self.take())
        if not self._follows_call:
            self.parsed.content += self._blanks.take()

    def show(self, text: str) -> None:
        """Pass on content, without hidden marks."""
        self.kept.clear()
        shown = self._hidden.sub("", text)
        if self._family is not None:
            shown = "" if self.is_full else self._blanks.push(shown)
        if shown:
            self._follows_call = False
            self.parsed.content += shown

    def _thought(self) -> Steps[None]:
        """Read the reasoning that a text may begin with, without white space around it."""
        if not self._is_opened and not (yield from self.match(_THOUGHT)):
            self.show("".join(self.kept))
            return
        blanks = Blanks()

        def reason(text: str) -> None:
            self.parsed.reasoning += blanks.push(text)

        if (yield from self.until(_THOUGHT_ENDS, reason)):
            yield from self.until(NO_BLANK, lambda _: None)
        else:
            reason(self.take())

    def _text(self) -> Steps[None]:
        family = self._family
        if family is None:
            yield from self.until(any_of(), self.show)
            return
        marks = any_of(*dict.fromkeys((family.opens, *family.around, *self._format.special)))
        head = regex.compile(family.head)
        tail = regex.compile(family.tail + regex.escape(family.closes))
        self.kept.clear()
        while mark := (yield from self.until(marks, self.show)):
            if mark == family.opens and (yield from self._call_or_list(head)):
                yield from self.match(tail)
            self.kept.clear()

    def _call_or_list(self, pattern: Any) -> Steps[bool]:
        """Read what stands after a mark of calls; returns whether it is valid."""
        head = yield from self.match(pattern)
        if head is None:
            self.show("".join(self.kept))
            return False
        if not head[0].endswith("["):
            return (yield from self._call(head.groupdict().get("name", "")))
        while found := (yield from self.match(_IN_LIST)):
            if found[0].endswith("]"):
                return True
            if not (yield from self._call("")):
                return False
        return False

    def _call(self, name: str) -> Steps[bool]:
        """Read a call, of which a head may have told the name; returns whether it is valid."""
        self._index, self._written = None, []
        is_xml = self._family is not None and self._family.is_xml
        call = yield from (self._xml_call if is_xml else self._json_call)(name)
        is_valid = call is not None and self.calls.knows(call[0])
        if call is not None and is_valid:
            self.calls.add(self._index, call[0], call[1], self.parsed)
            self._after_call()
        elif self._index is None:
            self.show("".join(self.kept))
        self.kept.clear()
        return is_valid

    def _begin(self, name: str) -> None:
        self._index = self.calls.begin(name, self.parsed)
        if self._index is not None:
            self._after_call()

    def _after_call(self) -> None:
        self._blanks.take()
        self._follows_call = True

    def _pass_on(self, piece: str) -> None:
        self._written.append(piece)
        if self._index is not None:
            self.parsed.calls.append(CallPart(self._index, "", piece))

    def _json_call(self, name: str) -> Steps[tuple[Any, str] | None]:
        """Read ``{"name": …, "arguments": {…}}``, or of a given name only the arguments."""
        span, called = JsonSpan(), name
        if not name and (head := (yield from self.match(_HEAD))):
            called = json.loads(head["name"])
            self._written.append(head[0])
            span.push(head[0], 0)
        self._begin(called)
        yield from self._brackets(span, span.depth, self._pass_on)
        yield from self._brackets(span, 0, self._written.append)
        try:
            return read_call("".join(self._written), name) if span.is_done else None
        except (ValueError, RecursionError):
            return None

    def _brackets(
        self, span: JsonSpan, floor: int, hand_over: Callable[[str], None]
    ) -> Steps[None]:
        """Read JSON to where only ``floor`` brackets are open."""
        while not span.is_broken:
            end = span.push(self.text, self.place, floor)
            if end > self.place:
                hand_over(self.take(end))
            if span.depth == floor or span.is_broken or self.is_last:
                return
            yield

    def _xml_call(self, name: str) -> Steps[tuple[str, str] | None]:
        """Read ``<parameter=KEY>VALUE</parameter>`` each, and ``</function>``.

        Arguments become JSON, of the kinds that the tool allows. One new line at each end of a
        value is left out. A value that can only be a text is passed on as it comes, any other when
        it is whole.
        """
        self._begin(name)
        self._pass_on("{")
        separator = ""
        while found := (yield from self.match(_PARAMETER)):
            if found["key"] is None:
                self._pass_on("}")
                return name, "".join(self._written)
            self._pass_on(f"{separator}{as_text(found['key'])}: ")
            separator = ", "
            kinds = self._kinds_of(name, found["key"])
            if (yield from self.match(_VALUE_BEGINS)) is not None:
                yield from (self._text_value() if kinds == TEXT else self._json_value(kinds))
        return None

    def _text_value(self) -> Steps[None]:
        self._pass_on('"')
        if (yield from self.until(_TEXT_ENDS, lambda text: self._pass_on(as_text(text)[1:-1]))):
            self._pass_on('"')
        else:
            self.take()

    def _json_value(self, kinds: frozenset[str]) -> Steps[None]:
        """Read a value up to the first mark that is not within a string of its JSON."""
        pieces: list[str] = []
        span = JsonSpan()
        yield from self.until(NO_BLANK, pieces.append)
        has_brackets = self.text.startswith(("{", "["), self.place) and bool(kinds & _BRACKETS)

        def take(piece: str) -> None:
            pieces.append(piece)
            if has_brackets:
                span.push(piece, 0)

        while mark := (yield from self.until(_VALUE_ENDS, take)):
            if not span.is_in_string:
                self._pass_on(json_of("".join(pieces).removesuffix("\n"), kinds))
                return
            take(mark)
        self.take()

    def _kinds_of(self, tool: str, key: str) -> frozenset[str]:
        """Return the kinds of a parameter, those of a text where it is unknown."""
        schema = self._schemas.get(tool, {})
        properties = schema.get("properties", {})
        if key in properties and (tool, key) not in self._kinds:
            self._kinds[tool, key] = kinds_of(properties[key], schema)
        return self._kinds.get((tool, key), TEXT)


_HEADER = regex.compile(r"(.*?)<\|message\|>", regex.DOTALL)
_NO_HEADER = regex.compile(r"(?:<\|(?:start|channel)\|>)?")
_ENDS = regex.compile(r"(?=<\|(?:start|channel)\|>)|<\|(?:message|constrain|end|call|return)\|>")
_MARKS = any_of(*HARMONY)
_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)")
_RECIPIENT = re.compile(r"\bto=functions\.([^\s<]+)")
_LEAD = re.compile(r"\s*(?:<\|start\|>)?(?:assistant)?\s*(?:to=\S+)?\s*")


class HarmonyParser(FamilyParser):
    """Parses the messages of one answer: ``<|channel|>NAME<|message|>TEXT<|end|>`` each.

    ``analysis`` is reasoning, a message ``to=functions.NAME`` is a call, all else is content. Where
    there are several of a kind, a new line is between them. A text without a header, and a call
    that is not valid, are content.
    """

    _is_reasoning = False
    _is_begun = False
    _shown: frozenset[bool] = frozenset()
    """Whether messages of reasoning, and others, were shown."""

    def read(self) -> Steps[None]:
        """See :class:`router.gateway.input.tools.reader.ChoiceParser`."""
        while True:
            self.kept.clear()
            header = yield from self.match(_HEADER)
            if header is None and self.place == len(self.text):
                self.show("".join(self.kept))
                return
            name = ""
            self._begin_message(False)
            if header is None:
                yield from self.match(_NO_HEADER)
            else:
                name = self._header(header[1])
            if name:
                yield from self.until(NO_BLANK, lambda _: None)
                self.kept.clear()
                if self.text.startswith("{", self.place):
                    yield from self._call(name)
            while (yield from self.until(_ENDS, self.show)) in (MESSAGE, CONSTRAIN):
                pass

    def show(self, text: str) -> None:
        """Pass on content or reasoning, without marks; a message of white space shows none."""
        self.kept.clear()
        text = _MARKS.sub("", text)
        if not text or self.is_full:
            return
        if not self._is_begun:
            if text.isspace():
                self._blanks.push(text)
                return
            self._is_begun = True
            text = "\n" * (self._is_reasoning in self._shown) + self._blanks.take() + text
            self._shown |= {self._is_reasoning}
        if self._is_reasoning:
            self.parsed.reasoning += text
        else:
            self.parsed.content += text

    def _begin_message(self, is_reasoning: bool) -> None:
        self._is_reasoning, self._is_begun = is_reasoning, False
        self._blanks.take()

    def _header(self, header: str) -> str:
        """Begin the message of a header; returns the name of the tool that it calls, or none."""
        self.show(_LEAD.sub("", header.partition(CHANNEL)[0], count=1))
        recipient, channel = _RECIPIENT.search(header), _CHANNEL.search(header)
        name = "" if recipient is None else recipient[1]
        is_call = self.calls.knows(name)
        self._begin_message(not is_call and channel is not None and channel[1] == "analysis")
        return name if is_call else ""
