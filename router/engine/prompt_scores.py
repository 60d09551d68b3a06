"""Log probabilities of prompts, computed beside a step's sampling, a few rows at a time.

The row of a prompt's token has the logits of the next token. The logits of a few rows are made, the
needed numbers taken and the logits dropped, so memory does not grow with the prompt. A row's
numbers depend only on its hidden state.

Dimension letters: S packed tokens of a step, R rows to score, V vocabulary size, N likeliest tokens
reported, C rows at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass
from math import isnan

import torch

from router.engine.sampling import VALUES_AT_ONCE
from router.engine.sequence import ScheduledChunk
from router.messages.request import PromptLogprobs, TokenEvent

Logits = Callable[[torch.Tensor], torch.Tensor]
"""Maps hidden states [C, H] to logits [C, V]."""
Scores = tuple[PromptLogprobs, ...]


@dataclass(frozen=True, slots=True)
class ScoredRows:
    """The rows of one chunk whose next tokens belong to its prompt and are scored.

    ``rows`` are rows of the step. ``targets`` int64 [R] are the next tokens, ``start`` is the
    number of the prompt's scored tokens before them, ``num_top`` the N of the request.
    """

    chunk: ScheduledChunk
    rows: slice
    targets: torch.Tensor
    start: int
    num_top: int


def scored_rows(chunks: Sequence[ScheduledChunk], ends: Sequence[int]) -> tuple[ScoredRows, ...]:
    """Return a step's rows to score; ``ends`` are where the chunks' tokens end in it.

    Prompt log probabilities that a resumed request has received are not scored again.
    """
    return tuple(_rows_of_chunks(chunks, ends))


def _rows_of_chunks(chunks: Sequence[ScheduledChunk], ends: Sequence[int]) -> Iterator[ScoredRows]:
    for chunk, work_end in zip(chunks, ends, strict=True):
        sequence = chunk.sequence
        request = sequence.request
        num_top = request.sampling.prompt_logprobs
        if num_top is None:
            continue
        start = max(chunk.start, request.prompt_logprobs_of(sequence.index))
        end = min(chunk.end, request.num_prompt_logprobs)
        if start < end:
            first = work_end - chunk.end  # the row of the sequence's token 0, had the step all
            targets = torch.tensor(sequence.token_ids[start + 1 : end + 1], dtype=torch.int64)
            yield ScoredRows(chunk, slice(first + start, first + end), targets, start, num_top)


def score(
    hidden_states: torch.Tensor,
    scored: Sequence[ScoredRows],
    targets: Sequence[torch.Tensor],
    logits_of: Logits,
    vocab_size: int,
) -> list[torch.Tensor]:
    """Score rows of hidden states [S, H]; returns what :func:`read_scores` takes, on their device.

    ``targets`` are those of ``scored``, on that device. The result is, for each C rows: the
    targets' log probabilities fp32 [C, 1] and ranks int64 [C, 1], and the log probabilities and ids
    of the likeliest tokens, [C, N]. Log probabilities come from the unchanged logits.
    """
    found: list[torch.Tensor] = []
    at_once = max(1, VALUES_AT_ONCE // vocab_size)
    for part, its_targets in zip(scored, targets, strict=True):
        rows = hidden_states[part.rows].split(at_once)
        for some, ids in zip(rows, its_targets.split(at_once), strict=True):
            logprobs = logits_of(some).log_softmax(dim=-1)
            own = logprobs.gather(1, ids.unsqueeze(1))
            rank = (logprobs > own).sum(dim=-1, keepdim=True) + 1
            top = logprobs.topk(min(part.num_top, vocab_size))
            found += [own, rank, top.values, top.indices]
    return found


def read_scores(found: Sequence[torch.Tensor], scored: Sequence[ScoredRows]) -> list[Scores | None]:
    """Return the log probabilities of each of ``scored``; the tensors are now on the host.

    ``None`` stands for one with a row of logits that is not finite.
    """
    parts = iter(zip(*[iter([tensor.tolist() for tensor in found])] * 4, strict=True))
    results: list[Scores | None] = []
    for part in scored:
        rows: list[PromptLogprobs] = []
        while len(rows) < len(part.targets):
            for [own], [rank], values, ids in zip(*next(parts), strict=True):
                rows.append(PromptLogprobs(own, tuple(ids), tuple(values), rank))
        results.append(None if any(isnan(row.logprob) for row in rows) else tuple(rows))
    return results


def score_events(
    scored: Sequence[ScoredRows],
    scores: Sequence[Scores | None],
    failed: Set[str],
    identity: str,
) -> tuple[list[tuple[str, TokenEvent]], set[str]]:
    """Return the events of a step's scores with their requests' ids, and the ids without scores.

    The latter are requests whose scores are not finite. ``failed`` requests and parked sequences
    get none: a parked sequence's chunk is recomputed. ``identity`` is the model's.
    """
    events: list[tuple[str, TokenEvent]] = []
    not_finite: set[str] = set()
    for part, rows in zip(scored, scores, strict=True):
        sequence = part.chunk.sequence
        request_id = sequence.request.request_id
        if rows is None and not sequence.awaited:
            not_finite.add(request_id)
        if rows is None or sequence.awaited or request_id in failed:
            continue
        event = TokenEvent(
            sequence.index,
            (),
            exact=sequence.exact,
            identity=identity,
            prompt_logprobs=rows,
            prompt_start=part.start,
        )
        events.append((request_id, event))
    return events, not_finite
