"""The perplexity of texts by a folder's model, or by a served one."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from cluster.errors import CheckpointError, ConfigError, OverloadedError
from experts.checkpoint.folder import language_model, open_folder
from router.client import Client, ModelInfo, Reply, Sampling
from router.client.wire import first_model
from router.gateway.input.tokenizer import Tokenizer
from router.observability.progress import OnProgress
from workshop.evaluate.local_model import FolderModel
from workshop.evaluate.perplexity import Ids, Scored, Scorer, TextFigures, TextTally, together
from workshop.texts import Sequences, TokenizerMisfitError, beginning, check_ids, read_blocks

MIN_LEFT_S = 0.001
AT_ONCE = 8
"""The requests under way; a router computes them together."""
_ASKED = Sampling(max_tokens=0, prompt_logprobs=0, temperature=0.0)
_MAX_TOKENS_OF_A_CHARACTER = 8


class ServedModel:
    """A model behind a gateway as a :class:`workshop.evaluate.perplexity.Scorer`.

    Its methods raise what the client raises.
    """

    def __init__(self, client: Client, model: str, timeout_s: float) -> None:
        """``model`` is its id; empty for the first that is served."""
        self._client = client
        self._timeout_s = timeout_s
        self.info: ModelInfo = first_model(client.model_info(model))

    def check_tokenizer(self, tokenizer: Tokenizer, text: str, where: str) -> None:
        """Raise :class:`TokenizerMisfitError` if the server makes other ids of a text's start."""
        sample = text[: self.info.max_model_len // _MAX_TOKENS_OF_A_CHARACTER]
        ids = tokenizer.encode(sample)
        check_ids(ids, self.info.vocab_size, where)
        if tuple(ids) != tuple(self._client.tokenize(sample, model=self.info.id)):
            raise TokenizerMisfitError(
                f"the tokenizer does not fit: {self.info.id} makes other tokens of a text", where
            )

    def score(self, prompts: Iterable[Ids]) -> Iterator[Scored]:
        """See :class:`Scorer`; asks for several prompts at once."""
        under_way: deque[Future[Reply]] = deque()
        with ThreadPoolExecutor(AT_ONCE, "evaluate") as pool:
            try:
                for ids in prompts:
                    under_way.append(pool.submit(self._ask, ids))
                    if len(under_way) > AT_ONCE:
                        yield _scored(under_way.popleft().result())
                while under_way:
                    yield _scored(under_way.popleft().result())
            finally:
                for future in under_way:
                    future.cancel()

    def _ask(self, prompt: Ids) -> Reply:
        """Return the reply; retries an overloaded server until the deadline."""
        until_s = time.monotonic() + self._timeout_s
        while True:
            left_s = max(until_s - time.monotonic(), MIN_LEFT_S)
            try:
                return self._client.generate(prompt, _ASKED, model=self.info.id, timeout_s=left_s)[
                    0
                ]
            except OverloadedError as error:
                retry_after_s = error.retry_after_s
                if retry_after_s is None or time.monotonic() + retry_after_s > until_s:
                    raise
                time.sleep(retry_after_s)


def _scored(reply: Reply) -> Scored:
    rows = [row.logprob for row in reply.prompt_logprobs if row is not None]
    return Scored(np.array(rows), exact=reply.exact)


DEFAULT_LENGTH = 512
BLOCK_CHARS, AS_IT_IS = 1 << 16, ""
"""The characters that are tokenized at once, and how line ends are read."""


@dataclass(frozen=True, slots=True)
class Served:
    """A served model: its gateway's address, its id or nothing, and a request's deadline.

    ``api_key`` is the key to send; by default the client's own.
    """

    address: str
    model: str
    timeout_s: float
    api_key: str | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The figures of texts by file name; ``all_texts`` are the figures of all of them together."""

    model: str
    sequence_length: int
    all_texts: TextFigures
    texts: dict[str, TextFigures]


def evaluate(
    folder: Path, texts: Sequence[Path], length: int | None, served: Served | None, on: OnProgress
) -> Evaluation:
    """Evaluate the model in a folder, or a ``served`` one with the tokenizer of the folder.

    ``length`` is the length of a sequence in tokens; by default it is :data:`DEFAULT_LENGTH`, or
    the model's context if that is less. Everything except the texts is checked before the model is
    loaded. Raises ``ConfigError`` and :class:`CheckpointError` for wrong files and options, and the
    client's errors.
    """
    _check_names(texts)
    if served is None:
        if not folder.is_dir():
            raise CheckpointError("is no folder", str(folder))
        checkpoint = language_model(open_folder(folder))
        tokenizer, context = Tokenizer.load(str(folder)), checkpoint.max_position_embeddings
        length = _length(length, context, tokenizer)
        scorer: Scorer = FolderModel(checkpoint, length)
        sizes = checkpoint.vocab_size, checkpoint.shape.num_experts
        return _evaluate(str(checkpoint.folder), texts, length, tokenizer, scorer, sizes, on)
    tokenizer = Tokenizer.load(str(folder))
    with Client(served.address, api_key=served.api_key) as client:
        model = ServedModel(client, served.model, served.timeout_s)
        info = model.info
        model.check_tokenizer(tokenizer, next(_blocks(texts[0]), ""), str(folder))
        length = _length(length, info.max_model_len, tokenizer)
        sizes = info.vocab_size, info.num_experts
        return _evaluate(info.id, texts, length, tokenizer, model, sizes, on)


def _evaluate(
    name: str,
    texts: Sequence[Path],
    length: int,
    tokenizer: Tokenizer,
    scorer: Scorer,
    sizes: tuple[int, int],
    on: OnProgress,
) -> Evaluation:
    """Score texts with a model of ``sizes``: its token ids, and the experts of a layer."""
    vocab_size, num_experts = sizes
    sequences = Sequences(tokenizer, vocab_size, length)
    tallies = {}
    for path in texts:
        tally = tallies[path.name] = TextTally(num_experts)
        for scored in scorer.score(sequences.cut(_ids(path, tokenizer, on), str(path))):
            tally.add(scored)
    return Evaluation(
        name,
        length,
        together([*tallies.values()]),
        {name: tally.figures() for name, tally in tallies.items()},
    )


def _check_names(paths: Sequence[Path]) -> None:
    if not paths:
        raise ConfigError("give at least one --text")
    for number, path in enumerate(paths):
        if path.name in {other.name for other in paths[:number]}:
            raise ConfigError("figures go by file name, and another file has it too", str(path))


def _length(wanted: int | None, most: int, tokenizer: Tokenizer) -> int:
    least = max(2, len(beginning(tokenizer)) + 1)
    length = min(DEFAULT_LENGTH, most) if wanted is None else wanted
    if not least <= length <= most:
        raise ConfigError(f"must be from {least} to {most}; got {length}", "--sequence-length")
    return length


def _blocks(path: Path) -> Iterator[str]:
    return read_blocks(path, BLOCK_CHARS, AS_IT_IS)


def _ids(path: Path, tokenizer: Tokenizer, on: OnProgress) -> Iterator[list[int]]:
    """Yield the ids of a text, a block at a time, as it is read."""
    done_bytes, size_bytes = 0, path.stat().st_size if path.is_file() else 0
    for block in _blocks(path):
        yield tokenizer.encode(block, add_special_tokens=False)
        done_bytes += len(block.encode())
        on(path.name, done_bytes, size_bytes)
