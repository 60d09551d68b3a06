"""Parses the channels of gpt-oss (OpenAI's harmony format): reasoning, calls, and content."""

from __future__ import annotations

import re

from router.gateway.tools.calls import MAX_HEAD_CHARS, Call, Calls
from router.gateway.tools.marks import Blanks, MarkFinder
from router.gateway.tools.parts import Parsed
from router.gateway.tools.states import States

START, CHANNEL, MESSAGE = "<|start|>", "<|channel|>", "<|message|>"
END, CALL, RETURN, CONSTRAIN = "<|end|>", "<|call|>", "<|return|>", "<|constrain|>"
MARKS = (START, CHANNEL, MESSAGE, END, CALL, RETURN, CONSTRAIN)
_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)")
_RECIPIENT = re.compile(r"\bto=functions\.([^\s<]+)")
_LEAD = re.compile(r"\s*(?:<\|start\|>)?(?:assistant)?\s*(?:to=\S+)?\s*")


class HarmonyParser:
    """Parses the messages of one answer: ``<|channel|>NAME<|message|>TEXT<|end|>`` each.

    ``analysis`` is reasoning, a message ``to=functions.NAME`` is a call, all else is content. Where
    there are several of a kind, a new line is between them. A text without a header, and a call
    that is not valid, are content.
    """

    def __init__(self, calls: Calls) -> None:
        self._calls = calls
        self._marks = MarkFinder(MARKS)
        self._states = States(self._in_header)
        self._is_reasoning = False
        self._call: Call | None = None
        self._num_shown = {False: 0, True: 0}
        """The messages of content, and of reasoning, of which something was passed on."""
        self._is_begun = False
        self._blanks = Blanks()
        """The white space at the beginning of a message; one without other text shows none."""

    def push(self, text: str) -> Parsed:
        """See :class:`router.gateway.tools.parts.TextParser`."""
        return self._states.push(text)

    def flush(self) -> Parsed:
        """See :class:`router.gateway.tools.parts.TextParser`."""
        parsed = Parsed()
        held = self._states.take()
        if self._call is not None and not self._call.is_passed_on:
            held = self._call.text + held
        if self._call is None or not self._call.is_passed_on:
            self._show(held, parsed)
        return parsed

    def _in_header(self, text: str, place: int, parsed: Parsed) -> int:
        begin = text.find(MESSAGE, place, place + MAX_HEAD_CHARS)
        if begin < 0 and len(text) - place < MAX_HEAD_CHARS:
            return place
        self._is_begun, self._is_reasoning = False, False
        self._blanks.take()
        self._states.now = self._in_message
        if begin < 0:
            # A mark that begins no header is left out, like every other.
            return next(
                (place + len(m) for m in (START, CHANNEL) if text.startswith(m, place)), place
            )
        header = text[place:begin]
        before = header.partition(CHANNEL)[0]
        self._show(before[_lead_end(before) :], parsed)
        self._is_begun = False
        self._blanks.take()
        channel, recipient = _CHANNEL.search(header), _RECIPIENT.search(header)
        if recipient is not None and self._calls.knows(recipient[1]):
            self._call = Call(self._calls, recipient[1])
            self._states.now = self._in_call
        elif channel is not None:
            self._is_reasoning = channel[1] == "analysis"
        return begin + len(MESSAGE)

    def _in_message(self, text: str, place: int, parsed: Parsed) -> int:
        begin, end = self._marks.find(text, place)
        self._show(text[place:begin], parsed)
        if end == begin or text[begin:end] in (MESSAGE, CONSTRAIN):
            return end
        self._states.now = self._in_header
        return begin if text[begin:end] in (START, CHANNEL) else end

    def _in_call(self, text: str, place: int, parsed: Parsed) -> int:
        call = self._call
        if call is None:
            return place
        if not call.is_begun and text[place].isspace():
            return place + 1
        if call.is_begun or text[place] == "{":
            place = call.push(text, place, parsed)
        if call.is_done or call.is_broken or not call.is_begun:
            self._call, self._is_begun = None, False
            self._blanks.take()
            is_valid = call.is_done and call.close(parsed)
            if not is_valid and not call.is_passed_on:
                self._show(call.text, parsed)
            self._states.now = self._in_message
        return place

    def _show(self, text: str, parsed: Parsed) -> None:
        """Pass on content or reasoning, without marks."""
        place = 0
        kept: list[str] = []
        while place < len(text):
            begin, end = self._marks.find(text, place)
            kept.append(text[place : begin if end > begin else len(text)])
            place = end if end > begin else len(text)
        shown = "".join(kept)
        if not shown or self._calls.is_full:
            return
        if not self._is_begun:
            if not shown.strip():
                self._blanks.push(shown)
                return
            shown = self._blanks.take() + shown
            self._is_begun = True
            self._num_shown[self._is_reasoning] += 1
            shown = "\n" + shown if self._num_shown[self._is_reasoning] > 1 else shown
        if self._is_reasoning:
            parsed.reasoning += shown
        else:
            parsed.content += shown


def _lead_end(before: str) -> int:
    """Return how much of the text before a channel is of the header's form."""
    found = _LEAD.match(before)
    return 0 if found is None else found.end()
