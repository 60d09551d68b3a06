"""Turns a stream of token ids into a stream of text: whole characters, up to a stop string.

:class:`Detokenizer` and :class:`StopMatcher` each keep back text that the next token may change;
:class:`ChoiceText` joins them for one choice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from router.gateway.input.tokenizer import Tokenizer

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_CONTEXT_TOKENS = 4
"""The tokens of the prompt before the text, for decoders that treat the first token differently."""
_MAX_WINDOW_TOKENS = 16
"""A window is decoded for each piece; beyond so many tokens it begins anew, which decodes twice."""


class Detokenizer:
    """Turns ids into text as they come; the pieces together are the decoding of all ids.

    ``context_ids`` are the prompt. Some decoders strip the space before the first token, which is
    wrong for text that continues a prompt. Text that ends in the middle of a UTF-8 character is
    kept back until the character is whole, or until :meth:`flush`.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        context_ids: Sequence[int] = (),
        shown: Mapping[int, str] | None = None,
    ) -> None:
        """``shown`` are the special tokens that are in the text, with what they are there."""
        self._tokenizer = tokenizer
        self._shown = shown or {}
        # Tokens whose text has gone out, followed by tokens whose text has not.
        kept = [i for i in context_ids[-_CONTEXT_TOKENS:] if i not in tokenizer.skipped_ids]
        text = tokenizer.decode_kept(kept)
        self._window = [] if text.endswith(_REPLACEMENT) else kept
        self._emitted_chars = len(text) if self._window else 0
        self._window_ids_emitted = len(self._window)

    def push(self, *token_ids: int) -> str:
        """Take more tokens and return the new text, which may be empty."""
        if self._shown.keys().isdisjoint(token_ids):
            return self._push(token_ids)
        pieces: list[str] = []
        for token_id in token_ids:
            if token_id in self._shown:
                pieces += [self.flush(), self._shown[token_id]]
                if len(self._window) > self._window_ids_emitted:  # else there would be no context
                    self._advance()
            else:
                pieces.append(self._push((token_id,)))
        return "".join(pieces)

    def _push(self, token_ids: Sequence[int]) -> str:
        kept = [i for i in token_ids if i not in self._tokenizer.skipped_ids]
        if not kept:
            return ""
        self._window += kept
        text = self._tokenizer.decode_kept(self._window)
        whole = text.rstrip(_REPLACEMENT)
        new = whole[self._emitted_chars :]
        self._emitted_chars += len(new)
        if new and len(whole) == len(text):
            if len(self._window) > _MAX_WINDOW_TOKENS:
                self._advance()
            else:
                self._window_ids_emitted = len(self._window)
        return new

    def flush(self) -> str:
        """Return the text that is kept back; the stream has ended."""
        return self._tokenizer.decode_kept(self._window)[self._emitted_chars :]

    def _advance(self) -> None:
        # The newest tokens stay as context of the next ones; the tokens before them go.
        self._window = self._window[self._window_ids_emitted :]
        self._window_ids_emitted = len(self._window)
        self._emitted_chars = len(self._tokenizer.decode_kept(self._window))


class StopMatcher:
    """Passes text up to the first stop string, however the text is cut into pieces.

    The first stop string is the first to be complete; of several, the first to begin.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def is_idle(self) -> bool:
        """Return whether there are no stop strings."""
        return not self._stops

    def push(self, text: str) -> tuple[str, bool]:
        """Take more text; return the text that may go out, and whether a stop string was found."""
        text = self._held + text
        found = [(text.find(stop), len(stop)) for stop in self._stops]
        ends = [(start + length, start) for start, length in found if start >= 0]
        if ends:
            self._held = ""
            return text[: min(ends)[1]], True
        keep = self._possible_beginning(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def flush(self) -> str:
        """Return the text that was kept back as a possible beginning of a stop string."""
        held, self._held = self._held, ""
        return held

    def _possible_beginning(self, text: str) -> int:
        """Return the length of the longest end of ``text`` that begins a stop string."""
        longest = max(map(len, self._stops), default=1) - 1
        lengths = range(min(longest, len(text)), 0, -1)
        return next((n for n in lengths if any(s.startswith(text[-n:]) for s in self._stops)), 0)


class ChoiceText:
    """The text of one choice, token by token, up to a stop string."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        stops: Sequence[str],
        context_ids: Sequence[int] = (),
        min_tokens: int = 0,
        shown: Mapping[int, str] | None = None,
    ) -> None:
        """No stop string is looked for in the text of the first ``min_tokens`` tokens."""
        self._detokenizer = Detokenizer(tokenizer, context_ids, shown)
        self._matcher = StopMatcher(stops)
        self._num_free = min_tokens

    def push(self, token_ids: Sequence[int]) -> tuple[str, int, bool]:
        """Take new tokens; returns the new text, the number of tokens that count, and whether a
        stop string was found.

        The token that completes a stop string counts, later tokens do not.
        """
        if self._matcher.is_idle():
            # All tokens count and nothing is kept back, so one decoding is enough.
            return self._detokenizer.push(*token_ids), len(token_ids), False
        pieces: list[str] = []
        for used, token_id in enumerate(token_ids, start=1):
            text = self._detokenizer.push(token_id)
            if self._num_free > 0:
                self._num_free -= 1
                pieces.append(text)
                continue
            text, found = self._matcher.push(text)
            pieces.append(text)
            if found:
                return "".join(pieces), used, True
        return "".join(pieces), len(token_ids), False

    def flush(self) -> tuple[str, bool]:
        """Return the text that was kept back, and whether a stop string is in it."""
        text, found = self._matcher.push(self._detokenizer.flush())
        return (text, True) if found else (text + self._matcher.flush(), False)
