"""Parses the channels of gpt-oss (OpenAI's harmony format): reasoning, calls, and content."""

from __future__ import annotations

import re

import regex

from router.gateway.input.tools.formats import CHANNEL, CONSTRAIN, HARMONY, MESSAGE
from router.gateway.input.tools.parser import NO_BLANK, FamilyParser
from router.gateway.input.tools.reader import Steps, any_of

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
