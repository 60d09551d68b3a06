"""Packs a step's chunks into the tensors that model and sampling take: pure functions.

Dimension letters: S packed tokens, R rows to sample.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from operator import attrgetter

import numpy as np
import torch

from router.engine.prompt_scores import ScoredRows, scored_rows
from router.engine.routed_rows import step_routed
from router.engine.sampling import Draw, Sampling, SamplingTensors
from router.engine.sequence import ScheduledChunk, Sequence
from router.model.attention.interface import Attention, PagedBatch, Span
from router.model.decoder import MAX_PIECES, Microbatch
from router.moe.layer import StepContext
from router.observability.tracing import StepTrace

MIN_PIECE_TOKENS = 128
"""The fewest tokens in a microbatch of a step. Smaller products cost more per row."""
_ROUTED, _SCORED = attrgetter("routed"), attrgetter("sampling.prompt_logprobs")
_NO_ROWS = torch.empty(0, dtype=torch.int64)
_NO_PARAMS = torch.empty(5, 0, dtype=torch.float64)
_NO_EDITS = torch.empty(2, 0, dtype=torch.int64), torch.empty(3, 0, dtype=torch.float32)


@dataclass(frozen=True, slots=True)
class StepInput:
    """One packed step, as :meth:`router.model.decoder.Decoder.forward` takes it.

    ``sampled`` are the sequences of ``sample_rows``, and ``sampling`` is how they are sampled.
    ``chunks`` are those of the step, in the order of its tokens. ``scored`` are the rows that give
    prompts their log probabilities.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    pieces: tuple[Microbatch, ...]
    sample_rows: torch.Tensor
    sampled: tuple[Sequence, ...]
    sampling: Sampling
    chunks: tuple[ScheduledChunk, ...]
    scored: tuple[ScoredRows, ...]


def pack(
    due: list[ScheduledChunk],
    attention: Attention,
    most_pieces: int = MAX_PIECES,
    wants_all: bool = True,
) -> StepInput:
    """Pack a step, without padding: decodes (single-token chunks), then prefill chunks.

    A step with a long prefill part is cut into at most ``most_pieces`` microbatches. Without
    ``wants_all`` the last hidden states are computed only for rows that are sampled or scored,
    unless a request asks for its tokens' experts or forces them.
    """
    decodes = [w for w in due if w.end - w.start == 1]
    prefills = [w for w in due if w.end - w.start > 1]
    chunks = (*decodes, *prefills)
    ends = list(itertools.accumulate(w.end - w.start for w in chunks))
    is_sampled = [w.end == len(w.sequence.token_ids) for w in chunks]
    sampled = tuple(w.sequence for w in itertools.compress(chunks, is_sampled))
    positions = [w.start for w in decodes] + [p for w in prefills for p in range(w.start, w.end)]
    sample_rows = _tensor([end - 1 for end in itertools.compress(ends, is_sampled)])
    # A decode is sampled and scores nothing, so a step of only decodes need not look at requests.
    is_of_decodes = len(sampled) == len(chunks) and not prefills
    is_scored = not is_of_decodes and any(_SCORED(w.sequence.request) is not None for w in chunks)
    scored = scored_rows(chunks, ends) if is_scored else ()
    pieces: Iterable[Microbatch] = _pieces_of(chunks, len(decodes), attention, most_pieces)
    if not (wants_all or is_of_decodes or any(_ROUTED(w.sequence.request) for w in chunks)):
        pieces = map(partial(_narrowed, wanted=_wanted(sample_rows, scored)), pieces)
    return StepInput(
        token_ids=_tensor([t for w in chunks for t in w.sequence.token_ids[w.start : w.end]]),
        positions=_tensor(positions),
        pieces=tuple(pieces),
        sample_rows=sample_rows,
        sampled=sampled,
        sampling=sampling_of([_draw_of(sequence) for sequence in sampled]),
        chunks=chunks,
        scored=scored,
    )


def _wanted(sample_rows: torch.Tensor, scored: tuple[ScoredRows, ...]) -> np.ndarray:
    """Return the rows of a step that are sampled or scored, in order."""
    parts = [np.arange(part.rows.start, part.rows.stop) for part in scored]
    return np.unique(np.concatenate([sample_rows.numpy(), *parts]))


def _narrowed(piece: Microbatch, wanted: np.ndarray) -> Microbatch:
    """Return a microbatch that wants only the step's ``wanted`` rows among its tokens."""
    begin, end = piece.tokens.start, piece.tokens.stop
    own = wanted[(wanted >= begin) & (wanted < end)] - begin
    return replace(piece, wanted=torch.from_numpy(own)) if len(own) < end - begin else piece


def context_of(packed: StepInput, trace: StepTrace | None = None) -> StepContext:
    """Return the context of the step's MoE layers; its deadline is the earliest of its requests."""
    requests = [chunk.sequence.request for chunk in packed.chunks]
    known_deaths = [chunk.sequence.deaths for chunk in packed.chunks]
    return StepContext(
        deadline_s=min(request.deadline_s for request in requests),
        sizes=[chunk.end - chunk.start for chunk in packed.chunks],
        contracts=[request.on_expert_loss for request in requests],
        trace=trace,
        known_deaths=known_deaths,
        is_isolated=any(deaths is not None and deaths.is_suspect for deaths in known_deaths),
        routed=step_routed(packed.chunks) if any(map(_ROUTED, requests)) else None,
    )


def keep_deaths(packed: StepInput, context: StepContext) -> None:
    """Store the deaths seen by a step's chunks in their sequences until the chunks are computed."""
    if context.deaths is not None:
        for chunk, deaths in zip(packed.chunks, context.deaths.of_chunks, strict=True):
            chunk.sequence.deaths = deaths


def _tensor(numbers: list[int]) -> torch.Tensor:
    # numpy reads a list several times faster than torch.
    return torch.from_numpy(np.array(numbers, dtype=np.int64))


def piece_ends(num_tokens: int, num_decode: int, most_pieces: int) -> list[int]:
    """Return where the microbatches of a step end.

    The first microbatch has all ``num_decode`` decodes, which come first. The tokens are divided
    evenly among as many microbatches as allowed; if there are several, none is shorter than
    :data:`MIN_PIECE_TOKENS`.
    """
    num_pieces = min(most_pieces, num_tokens // MIN_PIECE_TOKENS)
    if num_pieces < 2:
        return [num_tokens]
    first = max(num_decode, -(-num_tokens // num_pieces))
    left = num_tokens - first
    num_left = min(num_pieces - 1, left // MIN_PIECE_TOKENS)
    if not num_left:
        return [num_tokens]
    return [first + left * i // num_left for i in range(num_left + 1)]


def _pieces_of(
    chunks: tuple[ScheduledChunk, ...], num_decode: int, attention: Attention, most_pieces: int
) -> Iterator[Microbatch]:
    """Yield the microbatches of a step; a prefill chunk may continue in the next one."""
    ends = list(itertools.accumulate(chunk.end - chunk.start for chunk in chunks))
    begin = 0
    for end in piece_ends(ends[-1], num_decode, most_pieces):
        spans = list(_spans_of(chunks, ends, begin, end))
        slots = [span.slots[span.start :] for span in spans]
        new_slots = slots[0] if len(slots) == 1 else np.concatenate(slots)
        view = attention.view(spans, 0 if begin else num_decode)
        yield Microbatch(slice(begin, end), PagedBatch(torch.from_numpy(new_slots), view))
        begin = end


def _spans_of(
    chunks: tuple[ScheduledChunk, ...], ends: list[int], begin: int, end: int
) -> Iterator[Span]:
    """Yield the spans of the tokens from ``begin`` to ``end`` of a step.

    ``ends`` are where the chunks' tokens end in it.
    """
    for chunk, work_end in zip(chunks, ends, strict=True):
        first = work_end - (chunk.end - chunk.start)
        if first < end and work_end > begin:
            start = chunk.start + max(0, begin - first)
            yield Span(chunk.sequence.slots[: chunk.start + min(end, work_end) - first], start)


def _draw_of(sequence: Sequence) -> Draw:
    rules = sequence.rules
    return Draw(
        sequence.request.sampling,
        sequence.index,
        len(sequence.token_ids),
        None if rules is None else rules.edits(sequence.generated),
    )


def sampling_of(draws: list[Draw]) -> Sampling:
    """Return how rows are sampled, as :func:`router.engine.sampling.sample` takes it."""
    warm = [i for i, draw in enumerate(draws) if draw.params.temperature > 0]
    asking = [
        (draw.params.logprobs, i)
        for i, draw in enumerate(draws)
        if draw.params.logprobs is not None
    ]
    asking.sort()
    tensors = SamplingTensors(
        _tensor(warm) if warm else _NO_ROWS,
        _warm_params([draws[i] for i in warm]) if warm else _NO_PARAMS,
        _tensor([row for _, row in asking]) if asking else _NO_ROWS,
        *_edits_of(draws),
    )
    return Sampling(tensors, list(Counter(num for num, _ in asking).items()) if asking else [])


def _edits_of(draws: list[Draw]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the places and edits of all rows, in the form of :class:`SamplingTensors`."""
    edits = [(row, draw.edits) for row, draw in enumerate(draws) if draw.edits is not None]
    if not edits:
        return _NO_EDITS
    rows = np.repeat([row for row, _ in edits], [len(of_row.token_ids) for _, of_row in edits])
    token_ids = np.concatenate([of_row.token_ids for _, of_row in edits])
    params = np.concatenate([of_row.params for _, of_row in edits], axis=1)
    return torch.from_numpy(np.stack([rows, token_ids])), torch.from_numpy(params)


def _warm_params(draws: list[Draw]) -> torch.Tensor:
    params = [draw.params for draw in draws]
    numbers = [
        [p.temperature for p in params],
        [p.top_k or math.inf for p in params],
        [p.top_p for p in params],
        [p.min_p for p in params],
        _uniform(draws),
    ]
    return torch.from_numpy(np.array(numbers, dtype=np.float64))


def _uniform(draws: list[Draw]) -> np.ndarray:
    """Return one number in [0, 1) per row, a function of only (seed, choice, position)."""
    seeds = np.array([d.params.seed & 0xFFFFFFFFFFFFFFFF for d in draws], dtype=np.uint64)
    choices = np.array([d.choice for d in draws], dtype=np.uint64)
    positions = np.array([d.position for d in draws], dtype=np.uint64)
    mixed = _mix(_mix(_mix(seeds) ^ choices) ^ positions)
    numbers: np.ndarray = (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return numbers


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014): a bijection that avalanches."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
