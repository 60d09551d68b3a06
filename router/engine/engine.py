"""The engine: one thread that turns queued requests into tokens, step by step.

``run`` schedules and emits; ``step`` computes and samples. Requests join and leave at any step. A
sequence changes only after its tokens are sampled, so a chunk that misses an expert can be
recomputed. A sequence that waits for an expert is parked; the others continue.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import torch

from cluster.errors import (
    CancelledRequestError,
    DeadlineExceededError,
    ExpertMeshError,
    ExpertUnavailableError,
    ModelReplacedError,
    NotFiniteError,
)
from router.engine.batch import StepInput, context_of, keep_deaths, pack
from router.engine.commands import Commands
from router.engine.constrained_rows import barred, begin_rules, forbidden_of
from router.engine.constraints import Grammars
from router.engine.emission import Emission, Emit
from router.engine.isolation import Announce, Isolation
from router.engine.prompt_scores import Scores, read_scores, score, score_events
from router.engine.routed_rows import with_rows
from router.engine.sampling import Drawn, SamplingTensors, read, sample
from router.engine.scheduling.scheduler import Scheduler
from router.engine.sequence import ScheduledChunk, Sequence
from router.engine.stats import EngineTally
from router.messages.request import GenerationRequest, TokenEvent, TokenLogprobs
from router.model.decoder import MAX_PIECES
from router.model.model import MoEModel
from router.moe.layer import MoELayers, StepContext
from router.moe.missing import StepMissing
from router.observability.tracing import RequestTrace, StepTrace, begin_step

IDLE_S = 0.1
"""How long to wait for commands while there are no sequences."""
PARKED_S = 0.02
"""How long to wait for commands while all sequences are parked. The engine may notice a new
placement this late."""
CLOSE_S = 1.0

logger = logging.getLogger("expertmesh.engine")


class Engine:
    """Generates for one model.

    All public methods may be called from any thread, except :meth:`run` and :meth:`step`, which
    belong to the engine's thread.
    """

    def __init__(
        self,
        model: MoEModel,
        layers: MoELayers[torch.Tensor],
        scheduler: Scheduler,
        eos_token_ids: frozenset[int],
        emit: Emit,
        is_exact: bool = True,
        identity: str = "",
        announce: Announce = lambda request_id, is_alone: True,
        grammars: Grammars | None = None,
    ) -> None:
        """``emit`` is called on the engine's thread. ``grammars`` serves requests with a grammar.

        ``announce`` tells a request's gateway when the request is computed in a step of its own.

        The first token of each choice carries the model's ``identity``.
        Without ``is_exact``, experts are emulated and every token is flagged as not exact.

        ``replayed`` counts forced tokens by whether a step sampled an equal token. ``tally``
        holds times and token counts. ``inexact_rows`` counts, by contract, the rows that were
        computed without an expert that the gate chose.
        """
        self._model = model
        self._layers = layers
        self._most_pieces = 1 if layers.has_limit else MAX_PIECES
        # An expert's capacity counts all tokens of a step.
        self._wants_all = layers.has_limit or model.decoder.is_on_device
        self._scheduler = scheduler
        self._eos_token_ids = eos_token_ids
        self._emit = emit
        self._is_exact = is_exact
        self._identity = identity
        self._grammars = grammars
        self._commands = Commands()
        self._outbox: list[Emission] = []
        self.replayed: Counter[str] = Counter()
        self.inexact_rows: Counter[str] = Counter()
        self.tally = EngineTally()
        self._isolation = Isolation(
            self._traced_step,
            self._run_probe_step,
            self._fail_request,
            announce,
            model.decoder.is_on_device,
        )
        self._closing = False
        self._thread = threading.Thread(target=self.run, name="engine", daemon=True)

    def start(self) -> None:
        """Run the engine on its own daemon thread."""
        self._thread.start()

    def is_alive(self) -> bool:
        """Return whether the engine's thread is running."""
        return self._thread.is_alive()

    def close(self) -> None:
        """End the engine's thread after its current step; wait for it at most ``CLOSE_S``.

        An interpreter that exits while a thread is inside torch aborts.
        """
        self._closing = True
        self._commands.put(lambda: None)  # wakes a thread that waits for commands
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(CLOSE_S)

    def submit(self, request: GenerationRequest, trace: RequestTrace | None = None) -> None:
        """Queue a request. ``emit`` receives its tokens or its error, ``trace`` its spans."""
        sampling = request.sampling

        def add() -> None:
            try:
                for sequence in self._scheduler.add(request):
                    sequence.times.queued_at_s = time.monotonic()
                    sequence.trace = trace
                    if sampling.rules is not None or sampling.grammar:
                        begin_rules(sequence, self._eos_token_ids, self._grammars)
            except ExpertMeshError as error:
                self._outbox.append(Emission(request.request_id, error))

        self._commands.put(add)

    def cancel(self, request_id: str) -> None:
        """End a request's choices; only the cancellation is emitted for it afterwards."""
        error = CancelledRequestError("the request was cancelled")
        self._commands.put(lambda: self._fail_request(request_id, error))

    def stop_choice(self, request_id: str, index: int) -> None:
        """End one choice with ``stop``: the gateway found a stop string in its text."""

        def stop() -> None:
            for sequence in self._scheduler.sequences():
                if (sequence.request.request_id, sequence.index) == (request_id, index):
                    self.tally.finished(sequence)
                    self._finish(sequence)
                    event = TokenEvent(
                        index, (), (), "stop", sequence.exact, sequence.num_generated
                    )
                    self._outbox.append(Emission(request_id, event))

        self._commands.put(stop)

    @torch.inference_mode()  # entered once, since entering it costs more than an operation
    def run(self) -> None:
        """Serve until :meth:`close`."""
        chunks: list[ScheduledChunk] = []
        while not self._closing:
            self._take_commands(bool(chunks))
            self._expire()
            if self._layers.placed.is_withdrawn():
                self._fail(lambda _: True, ModelReplacedError())
            self._unpark()
            placed = self._layers.placed
            self._scheduler.look(placed.generations, placed.other_classes)
            chunks = self._scheduler.schedule() if placed.is_placed() else []
            self._flush()  # a step may wait long for an unavailable expert
            if chunks:
                self._isolation.compute(chunks)
                self._flush()

    def _take_commands(self, has_chunks: bool) -> None:
        if self._scheduler.sequences():
            self._commands.run(0.0 if has_chunks else PARKED_S)
        else:
            self._commands.run_burst(IDLE_S, lambda: len(self._scheduler.sequences()))

    def _unpark(self) -> None:
        for sequence in self._scheduler.parked():
            if self._layers.placed.have_all(sequence.awaited):
                sequence.awaited = frozenset()

    def _traced_step(self, chunks: list[ScheduledChunk]) -> None:
        """Compute a step and emit its tokens; trace it if any of its requests is traced."""
        traces = [w.sequence.trace for w in chunks if w.sequence.trace is not None]
        num_tokens = sum(w.end - w.start for w in chunks)
        trace = begin_step(traces, len(chunks), num_tokens)
        began_at_s = time.monotonic()
        self.tally.step(chunks, began_at_s)
        try:
            self.step(chunks, trace)
        finally:
            if trace is not None:
                trace.end()
        self._commands.note_step(len(chunks), time.monotonic() - began_at_s)
        self._flush()

    def step(self, chunks: list[ScheduledChunk], trace: StepTrace | None = None) -> None:
        """Compute the scheduled chunks, sample, and queue the tokens to emit."""
        packed = pack(chunks, self._model.attention, self._most_pieces, self._wants_all)
        context = context_of(packed, trace)
        context.on_wait = None if self._grammars is None else self._grammars.follow
        try:
            drawn, scores = self._compute(packed, context)
        finally:
            keep_deaths(packed, context)
        self.tally.note_layers(context.layer_times_s)
        self._advance(packed, context, drawn, scores)

    def _compute(
        self, packed: StepInput, context: StepContext
    ) -> tuple[Drawn, list[Scores | None]]:
        """Return a step's sampled tokens and the log probabilities of its prompts.

        Changes only the step's tokens in the cache.
        """
        sampling, scored, decoder = packed.sampling, packed.scored, self._model.decoder
        # Sampling's inputs go to the model's device with the ids, in one copy.
        others = packed.sample_rows, *sampling.tensors, *[part.targets for part in scored]
        hidden_states, [sample_rows, *placed] = decoder.forward(
            packed.token_ids, packed.positions, packed.pieces, context, *others
        )
        logits = decoder.logits(hidden_states, sample_rows)
        num = len(sampling.tensors)
        forbidden = None
        if any(sequence.constraint is not None for sequence in packed.sampled):
            forbidden = forbidden_of(packed.sampled, decoder.to_device)
        tensors = sample(logits, SamplingTensors(*placed[:num]), sampling.logprob_sizes, forbidden)
        if not scored:
            return read(decoder.to_host(*tensors), sampling), []
        found = score(hidden_states, scored, placed[num:], decoder.logits, logits.shape[1])
        on_host = decoder.to_host(*tensors, *found)
        num = len(tensors)
        return read(on_host[:num], sampling), read_scores(on_host[num:], scored)

    def _run_probe_step(self, chunks: list[ScheduledChunk]) -> None:
        """Run a probe step and discard its tokens."""
        packed = pack(chunks, self._model.attention, self._most_pieces, self._wants_all)
        self._compute(packed, context_of(packed))

    def _advance(
        self,
        packed: StepInput,
        context: StepContext,
        drawn: Drawn,
        scores: list[Scores | None],
    ) -> None:
        """Note the computed tokens, append the drawn ones, and queue their events."""
        self._note_computed(packed.chunks, context.missing)
        failed: dict[str, ExpertMeshError | None] = {
            packed.chunks[index].sequence.request.request_id: None for index in context.not_finite
        }
        """The requests that end, and their errors; ``None`` means that the output is not finite."""
        if scores:
            events, not_finite = score_events(packed.scored, scores, failed.keys(), self._identity)
            self._outbox.extend(itertools.starmap(Emission, events))
            failed |= dict.fromkeys(not_finite)
        now_s = time.monotonic()
        for row, (sequence, token_id, logprobs) in enumerate(
            zip(packed.sampled, drawn.token_ids, drawn.logprobs, strict=True)
        ):
            if sequence.awaited or sequence.deferred:  # drawn once its chunk is recomputed
                continue
            request_id = sequence.request.request_id
            is_barred = row in drawn.barred and sequence.is_edited
            failure = sequence.failure or (barred() if is_barred else None)
            if failure is not None or token_id is None:
                failed.setdefault(request_id, failure)
            if token_id is None or request_id in failed:
                continue
            forced = sequence.next_forced
            if forced is None:
                self._append(sequence, token_id, logprobs, now_s)
            else:
                self._replay(sequence, forced, token_id)
        for request_id, failure in failed.items():
            self._fail_request(request_id, failure or _not_finite(request_id))
        if context.routed is not None:
            self._outbox = with_rows(self._outbox, packed.chunks, context.routed, self._identity)

    def _note_computed(
        self, chunks: tuple[ScheduledChunk, ...], missing: StepMissing | None
    ) -> None:
        """Count the chunks' tokens as computed; park the sequences that wait for experts."""
        awaited = {} if missing is None else missing.awaited
        inexact = set() if missing is None else missing.inexact
        if missing is not None and inexact:
            self.inexact_rows += missing.rows_by_contract()
        for index, chunk in enumerate(chunks):
            if index in awaited:
                # The chunk is recomputed, and overwrites its keys and values.
                chunk.sequence.awaited = awaited[index]
                continue
            # Only the last token of a deferred choice is recomputed.
            is_again = chunk.sequence.deferred and chunk.end == len(chunk.sequence.token_ids)
            chunk.sequence.num_computed = chunk.end - is_again
            chunk.sequence.deaths = None
            is_exact = self._is_exact and index not in inexact
            chunk.sequence.exact = chunk.sequence.exact and is_exact

    def _append(
        self, sequence: Sequence, token_id: int, logprobs: TokenLogprobs | None, now_s: float
    ) -> None:
        """Append a token and queue its event; end the sequence if it is the last.

        A sequence that only scores its prompt ends too, without the token.
        """
        sequence.append(token_id)
        self.tally.token(sequence, now_s)
        reason = self._finish_reason(sequence, token_id)
        if reason is not None:
            self.tally.finished(sequence)
            self._finish(sequence)
            if sequence.wants_no_tokens:
                end = TokenEvent(
                    sequence.index, (), (), "length", sequence.exact, 0, self._identity
                )
                self._outbox.append(Emission(sequence.request.request_id, end))
                return
        rows = () if logprobs is None else (logprobs,)
        start = sequence.num_generated - 1
        identity = "" if start else self._identity
        event = TokenEvent(
            sequence.index, (token_id,), rows, reason, sequence.exact, start, identity
        )
        if start == len(sequence.forced):
            event = replace(event, cached_tokens=sequence.num_cached)
        self._outbox.append(Emission(sequence.request.request_id, event))

    def _replay(self, sequence: Sequence, forced: int, sampled: int) -> None:
        """Append a token that the client already has; emit only the end of its choice."""
        self.replayed["equal" if forced == sampled else "different"] += 1
        sequence.append(forced)
        reason = self._finish_reason(sequence, forced)
        if reason is not None:
            self._finish(sequence)
            end = TokenEvent(sequence.index, (), (), reason, sequence.exact, sequence.num_generated)
            self._outbox.append(Emission(sequence.request.request_id, end))

    def _finish(self, sequence: Sequence, error: ExpertMeshError | None = None) -> None:
        self._scheduler.finish(sequence, error)
        if sequence.trace is not None:
            sequence.trace.ended(
                sequence.index, sequence.num_generated, sequence.times.phases_at_s(), error
            )

    def _finish_reason(self, sequence: Sequence, token_id: int) -> str | None:
        sampling = sequence.request.sampling
        is_end = token_id in self._eos_token_ids and not sampling.ignore_eos
        if is_end or (sampling.rules is not None and token_id in sampling.rules.stop_token_ids):
            return "stop"
        return "length" if sequence.num_generated >= sampling.max_tokens else None

    def _expire(self) -> None:
        """End the requests past their deadline; only between steps, so that no step is lost."""
        now_s = time.monotonic()
        if all(s.request.deadline_s > now_s for s in self._scheduler.sequences()):
            return
        parked = self._scheduler.parked()
        starved = {s.request.request_id: s for s in parked if s.request.deadline_s <= now_s}
        for request_id, sequence in starved.items():
            self._fail_request(request_id, sequence.unavailable())
        error: ExpertMeshError = DeadlineExceededError("the request's deadline passed")
        if not self._layers.placed.is_placed():
            error = ExpertUnavailableError("no placement of the experts is known yet", "", 1.0)
        self._fail(lambda s: s.request.deadline_s <= now_s, error)

    def _fail_request(self, request_id: str, error: ExpertMeshError) -> None:
        self._fail(lambda s: s.request.request_id == request_id, error)

    def _fail(self, affected: Callable[[Sequence], bool], error: ExpertMeshError) -> None:
        ended = [s for s in self._scheduler.sequences() if affected(s)]
        request_ids = dict.fromkeys(s.request.request_id for s in ended)
        for sequence in ended:
            self._finish(sequence, error)
        self._outbox.extend(Emission(request_id, error) for request_id in request_ids)

    def _flush(self) -> None:
        if self._outbox:
            emissions, self._outbox = self._outbox, []
            self._emit(emissions)


def _not_finite(request_id: str) -> NotFiniteError:
    """Log that a request's output is not finite, and return its error."""
    logger.error("request %s: the model's output is not finite", request_id)
    return NotFiniteError("the model's output for this request is not finite (NaN or infinity)")
