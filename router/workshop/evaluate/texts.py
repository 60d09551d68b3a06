"""Held-out texts as sequences of token ids, read as a stream.

A text is read in blocks that end at line ends, so that a long one is never there as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

from cluster.errors import ConfigError
from router.gateway.tokenizer import Tokenizer
from router.workshop.evaluate.scores import Ids, check_ids

BLOCK_CHARS = 1 << 16
OnBytes = Callable[[int], None]
"""Takes the number of bytes that were read since the last call."""


class TextReader:
    """Cuts texts into sequences of ``length`` tokens, each begun as a served prompt is."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, length: int) -> None:
        """``vocab_size`` is the model's."""
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._length = length
        self._start = beginning(tokenizer)

    def sequences(self, path: Path, on_bytes: OnBytes) -> Iterator[Ids]:
        """Yield a text's sequences, one after the other; what is left at the end is not enough.

        Raises ``ConfigError`` for a text that cannot be read, is empty, or has fewer tokens than a
        sequence, and :class:`TokenizerMisfitError`.
        """
        window = self._length - len(self._start)
        num_tokens = 0
        ids: list[int] = []
        for block in _blocks(path, on_bytes):
            found = self._tokenizer.encode(block, add_special_tokens=False)
            check_ids(found, self._vocab_size, str(path))
            num_tokens += len(found)
            ids += found
            for begin in range(0, len(ids) - window + 1, window):
                yield [*self._start, *ids[begin : begin + window]]
            ids = ids[len(ids) // window * window :]
        if not num_tokens:
            raise ConfigError("the text is empty", str(path))
        if num_tokens < window:
            raise ConfigError(
                f"has {num_tokens} tokens, fewer than a sequence of {window}; give more text or a "
                "smaller --sequence-length",
                str(path),
            )


def head(path: Path) -> str:
    """Return the first block of a text; raises as :meth:`TextReader.sequences` does."""
    return next(_blocks(path, lambda num_bytes: None), "")


def beginning(tokenizer: Tokenizer) -> list[int]:
    """Return the ids that the tokenizer puts before a text, such as that of a beginning."""
    plain = tokenizer.encode("a", add_special_tokens=False)
    whole = tokenizer.encode("a")
    count = len(whole) - len(plain)
    return whole[:count] if whole[count:] == plain else []


def _blocks(path: Path, on_bytes: OnBytes) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            yield from _blocks_of(file, on_bytes)
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", str(path)) from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"cannot be read as UTF-8 text: {error.reason}", str(path)) from None


def _blocks_of(file: TextIO, on_bytes: OnBytes) -> Iterator[str]:
    while text := file.read(BLOCK_CHARS):
        text += file.readline()
        yield text
        on_bytes(len(text.encode()))
