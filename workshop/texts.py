"""Texts in blocks, of which some are held out, and their tokens in sequences for a model.

A text is read as a stream of blocks that end at line ends, so that a long one need not be in memory
as a whole. Two blank lines end a document.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import ConfigError
from router.gateway.input.tokenizer import Tokenizer

BLOCK_CHARS = 4096
"""The characters of a block of which every n-th is held out."""


@dataclass(frozen=True)
class Corpus:
    """The documents of a run: for training, and held out by file name; hashes by file name too."""

    train_documents: list[str]
    heldout_documents: dict[str, list[str]]
    files: dict[str, str]


class TokenizerMisfitError(ConfigError):
    """The tokenizer is not that of the model."""


def check_ids(ids: Sequence[int], vocab_size: int, where: str) -> None:
    """Raise :class:`TokenizerMisfitError` where the tokenizer gives an id that the model lacks."""
    highest = max(ids, default=0)
    if highest >= vocab_size:
        raise TokenizerMisfitError(
            f"the tokenizer does not fit: it gives the id {highest}, and the model has "
            f"{vocab_size} ids",
            where,
        )


def read_blocks(path: Path, block_chars: int, newline: str | None = None) -> Iterator[str]:
    r"""Yield a UTF-8 text in blocks of lines, each of at least so many characters but the last.

    ``newline`` is that of :func:`open`: with ``None`` all line ends become ``\n``, and with an
    empty one they stay. Raises ``ConfigError`` for a file that cannot be read.
    """
    try:
        with path.open(encoding="utf-8", newline=newline) as file:
            yield from _blocks(file, block_chars)
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", str(path)) from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"cannot be read as UTF-8 text: {error.reason}", str(path)) from None


def _blocks(file: Iterable[str], block_chars: int) -> Iterator[str]:
    lines: list[str] = []
    size_chars = 0
    for line in itertools.chain.from_iterable(text.splitlines(keepends=True) for text in file):
        lines.append(line)
        size_chars += len(line)
        if size_chars >= block_chars:
            yield "".join(lines)
            lines, size_chars = [], 0
    if lines:
        yield "".join(lines)


def read_corpus(paths: Sequence[Path], holdout_every_blocks: int) -> Corpus:
    """Read texts and hold out every n-th block of about :data:`BLOCK_CHARS` characters.

    Raises ``ConfigError`` for an unreadable or empty file, for a file too short to hold anything
    out, and for two files of the same name.
    """
    train: list[str] = []
    heldout: dict[str, list[str]] = {}
    files: dict[str, str] = {}
    for path in paths:
        if path.name in files:
            raise ConfigError(
                f"another text is called {path.name} too; figures go by file name, so rename one "
                "of the texts",
                str(path),
            )
        sha, found = hashlib.sha256(), len(train)
        held: list[str] = []
        for index, block in enumerate(read_blocks(path, BLOCK_CHARS)):
            sha.update(block.encode())
            is_held = index % holdout_every_blocks == holdout_every_blocks - 1
            (held if is_held else train).extend(_documents(block))
        if not held and len(train) == found:
            raise ConfigError("the text is empty", str(path))
        if not held:
            raise ConfigError(
                "the text is too short to hold any of it out: with holdout_every_blocks "
                f"{holdout_every_blocks} a file needs at least "
                f"{holdout_every_blocks * BLOCK_CHARS} characters, in lines",
                str(path),
            )
        files[path.name], heldout[path.name] = sha.hexdigest(), held
    return Corpus(train, heldout, files)


def _documents(block: str) -> list[str]:
    return [part for part in re.split(r"\n{3,}", block.strip("\n")) if part.strip()]


def beginning(tokenizer: Tokenizer) -> list[int]:
    """Return the ids that the tokenizer puts before a text, such as that of a beginning."""
    plain = tokenizer.encode("a", add_special_tokens=False)
    whole = tokenizer.encode("a")
    count = len(whole) - len(plain)
    return whole[:count] if whole[count:] == plain else []


class Sequences:
    """Cuts token ids into sequences of ``length``, each begun as a served prompt is."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, length: int) -> None:
        """``vocab_size`` is the model's; raises ``ConfigError`` for a length without own tokens."""
        self._vocab_size = vocab_size
        self._start = beginning(tokenizer)
        self._window = length - len(self._start)
        if self._window < 1:
            raise ConfigError(
                f"a sequence of {length} tokens has no place beside the {len(self._start)} that "
                "every prompt begins with",
                "--sequence-length",
            )

    def cut(self, parts: Iterable[Sequence[int]], where: str) -> Iterator[list[int]]:
        """Yield the sequences of ids that follow on one another over the ends of the parts.

        What is left at the end is no sequence. ``where`` is the text's name in errors. Raises
        ``ConfigError`` for no tokens, and for fewer than a sequence has, and
        :class:`TokenizerMisfitError`.
        """
        num_tokens = 0
        ids: list[int] = []
        for part in parts:
            check_ids(part, self._vocab_size, where)
            num_tokens += len(part)
            ids += part
            whole = len(ids) // self._window * self._window
            for begin in range(0, whole, self._window):
                yield [*self._start, *ids[begin : begin + self._window]]
            ids = ids[whole:]
        if not num_tokens:
            raise ConfigError("the text is empty", where)
        if num_tokens < self._window:
            raise ConfigError(
                f"has {num_tokens} tokens, fewer than the {self._window} of a sequence; give more "
                "text or a smaller --sequence-length",
                where,
            )
