"""A served model, asked over the API for the log probabilities of prompts."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from cluster.errors import OverloadedError
from router.client import Client, ModelInfo, Reply, Sampling
from router.client.wire import first_model
from router.gateway.input.tokenizer import Tokenizer
from workshop.evaluate.scores import Ids, Scored
from workshop.texts import TokenizerMisfitError, check_ids

LEAST_LEFT_S = 0.001
AT_ONCE = 8
"""The requests under way; a router computes them together."""
_ASKED = Sampling(max_tokens=0, prompt_logprobs=0, temperature=0.0)
_MOST_TOKENS_OF_A_CHARACTER = 8


class ServedModel:
    """A model behind a gateway as a :class:`workshop.evaluate.scores.Scorer`.

    Its methods raise what the client raises.
    """

    def __init__(self, client: Client, model: str, timeout_s: float) -> None:
        """``model`` is its id; empty for the first that is served."""
        self._client = client
        self._timeout_s = timeout_s
        self.info: ModelInfo = first_model(client.model_info(model))

    def check_tokenizer(self, tokenizer: Tokenizer, text: str, where: str) -> None:
        """Raise :class:`TokenizerMisfitError` if the server makes other ids of a text's start."""
        sample = text[: self.info.max_model_len // _MOST_TOKENS_OF_A_CHARACTER]
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
            left_s = max(until_s - time.monotonic(), LEAST_LEFT_S)
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
