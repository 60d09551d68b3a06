"""Greedy generation over llama.cpp's interface of batches, for it and its relatives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from benchmarks.peers.side import Task, Tokens

GGML_F32, GGML_F16 = 0, 1
"""Numbers of ggml's types."""


@dataclass(frozen=True, slots=True)
class Row:
    """A token in a batch; ``wants_next`` asks for the most likely token after it."""

    token: int
    position: int
    sequence: int
    wants_next: bool


class Context(Protocol):
    """A model and the keys and values of its sequences."""

    def clear(self) -> None:
        """Forget all sequences."""

    def step(self, rows: Sequence[Row]) -> list[int]:
        """Compute a batch; returns the next tokens of the rows that want one, in their order."""


def generate(context: Context, prompts: Sequence[Sequence[int]], tokens: int) -> Tokens:
    """Return ``tokens`` greedy tokens for each prompt, all sequences in one batch a step."""
    context.clear()
    rows = [
        Row(token, position, sequence, position == len(ids) - 1)
        for sequence, ids in enumerate(prompts)
        for position, token in enumerate(ids)
    ]
    generated: Tokens = [[] for _ in prompts]
    for number in range(tokens):
        following = context.step(rows)
        for ids, token in zip(generated, following, strict=True):
            ids.append(token)
        rows = [
            Row(token, len(prompts[sequence]) + number, sequence, True)
            for sequence, token in enumerate(following)
        ]
    return generated


class LlamaPeer:
    """A GGUF file in a program with llama.cpp's functions.

    A subclass sets :attr:`library`, :attr:`version` and what differs between the programs.
    """

    library: Any
    version: str

    def load(self, task: Task, model_parameters: Any) -> None:
        """Load the task's model, with room for all sequences at once."""
        lib = self.library
        lib.llama_backend_init()
        model = lib.llama_model_load_from_file(task.model.encode(), model_parameters)
        if not model:
            raise RuntimeError(f"{self.version} cannot load {task.model}")
        self.num_vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
        parameters = lib.llama_context_default_params()
        parameters.n_ctx = parameters.n_batch = task.context
        parameters.n_seq_max = len(task.prompts)
        parameters.n_threads = parameters.n_threads_batch = task.threads
        self.set_cache(parameters, task)
        self.context = lib.llama_init_from_model(model, parameters)
        if not self.context:
            raise RuntimeError(f"{self.version} cannot make a context")
        self._batch = lib.llama_batch_init(task.context, 0, 1)

    def set_cache(self, parameters: Any, task: Task) -> None:
        """Choose attention and the cache's format in a context's parameters."""
        raise NotImplementedError

    def clear(self) -> None:
        """Forget all sequences."""
        raise NotImplementedError

    def most_likely(self, logits: Any) -> int:
        """Return the token whose logit is the largest."""
        raise NotImplementedError

    def step(self, rows: Sequence[Row]) -> list[int]:
        """Compute a batch; returns the next tokens of the rows that want one."""
        batch = self._batch
        for i, row in enumerate(rows):
            batch.token[i], batch.pos[i] = row.token, row.position
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, row.sequence
            batch.logits[i] = row.wants_next
        batch.n_tokens = len(rows)
        if status := self.library.llama_decode(self.context, batch):
            raise RuntimeError(f"llama_decode returned {status}")
        return [
            self.most_likely(self.library.llama_get_logits_ith(self.context, i))
            for i, row in enumerate(rows)
            if row.wants_next
        ]

    def generate(self, prompts: Sequence[Sequence[int]], tokens: int) -> Tokens:
        """Return the greedy tokens of each prompt."""
        return generate(self, prompts, tokens)
