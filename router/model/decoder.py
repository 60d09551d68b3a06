"""The dense part of a model, run over packed steps: embedding, layers, last norm, output head.

It takes the place of the forward method of transformers' model, whose modules it calls. A layer has
two halves: attention, then the feed-forward part. :mod:`router.model.parts` finds them. A half that
is written otherwise, such as in native code, has the same signature.

A step with a long prefill part comes in pieces. While the experts compute a piece of a layer, the
router attends the next piece. All keys and values that a piece attends to are stored by then: they
are its own, or those of pieces before it.

Dimension letters: S packed tokens of a step, T tokens of a piece, R rows with logits, K experts per
token, H hidden size, V vocab.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch

from cluster.staging import Staging
from router.model.attention.interface import Attention, PagedBatch
from router.model.attention.paged import PagedContext
from router.model.kv_cache import PagedCache
from router.model.staged_batch import batch_to_device
from router.moe import device_rows
from router.moe.gate import Choice, ChooseAmong, ForcedGate, Gate
from router.moe.layer import StepContext
from router.moe.missing import Tokens

MAX_PIECES = 2
"""The most pieces of a step. While the experts compute one piece, the router attends the other.
Further pieces add nothing but products of fewer rows. Staged rows last for so many copies
(:data:`cluster.staging.RING`)."""
Rotation = torch.Tensor | tuple[torch.Tensor, ...]
"""The angles of tokens' positions, [1, T, ...]: cosines and sines, or one tensor of both."""
AttendWanted = Callable[
    [torch.Tensor, torch.Tensor | None, Rotation, PagedContext, torch.Tensor], torch.Tensor
]
"""See :func:`router.model.cpu.last_half.attend_wanted`."""
Map = Callable[[torch.Tensor], torch.Tensor]
"""Maps hidden states [T, H] to [T, H]."""


@dataclass(frozen=True, slots=True)
class Microbatch:
    """Some tokens of a packed step, which pass the layers together; ``batch`` holds only them.

    ``wanted`` are the indices of those whose last hidden states are read; ``None`` is all of them.
    """

    tokens: slice
    batch: PagedBatch
    wanted: torch.Tensor | None = None


class AttentionHalf(Protocol):
    """The first half of a layer."""

    def __call__(
        self,
        residual: torch.Tensor,
        output: torch.Tensor | None,
        rotation: Rotation,
        paged: PagedContext,
    ) -> torch.Tensor:
        """Add the last layer's output to the residual stream, attend, and add that too.

        ``residual`` [T, H], contiguous, is written: it becomes the residual stream after attention.
        ``output`` [T, H] is ``None`` before the first layer. The tokens' keys and values are
        stored. Returns the input of the feed-forward half, [T, H].
        """
        ...


class ExpertLayers(Protocol):
    """The experts of all layers, whose output is begun and finished in two calls."""

    def may_change(self, context: StepContext, layer_id: int, /) -> bool:
        """Return whether a gate's choice may be changed, as far as is known."""
        ...

    def begin(
        self,
        context: StepContext,
        layer_id: int,
        rows: device_rows.LayerRows,
        choice: Choice,
        reselect: ChooseAmong,
        tokens: Tokens,
        /,
    ) -> Any:
        """Begin a layer's sums for its rows; see :meth:`router.moe.layer.MoELayers.begin`."""
        ...

    def finish(self, begun: Any, /) -> torch.Tensor:
        """Return the sums [T, H], which last until the piece's next layer."""
        ...

    def abandon(self, begun: Any, /) -> None:
        """Drop sums that are not finished."""
        ...


class FeedForwardHalf(Protocol):
    """The second half of a layer, in two calls; between them the caller may compute others."""

    def begin(self, normed: torch.Tensor, context: StepContext, tokens: Tokens) -> Any:
        """Begin the output for ``normed`` [T, H], which stays unchanged until it is finished.

        ``tokens`` are the piece's of the step.
        """
        ...

    def finish(self, begun: Any) -> torch.Tensor:
        """Return the output [T, H], which lasts until the piece's next layer."""
        ...

    def abandon(self, begun: Any) -> None:
        """Drop an output that is not finished, since the step fails."""
        ...


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """One layer; ``output_norm`` maps the output before it is added to the residual stream.

    ``attend_wanted`` does what ``attend`` does for some tokens of a piece, where there is a way
    that takes less time.
    """

    attend: AttentionHalf
    feed_forward: FeedForwardHalf
    output_norm: Map | None = None
    attend_wanted: AttendWanted | None = None

    def finish(self, begun: Any) -> torch.Tensor:
        """Finish the feed-forward half; returns what is to be added to the residual stream."""
        output = self.feed_forward.finish(begun)
        return output if self.output_norm is None else self.output_norm(output)


class MoEFeedForward:
    """The feed-forward half of a layer with experts, and with a shared expert in some families."""

    def __init__(
        self,
        layer_id: int,
        gate: Gate | ForcedGate,
        experts: ExpertLayers,
        shared_expert: Map | None,
        staging: Staging | None,
    ) -> None:
        """``shared_expert`` is computed for every token, beside the experts.

        ``staging`` copies between the host and the device of a model that is on one.
        """
        self._layer_id = layer_id
        self._gate = gate
        self._experts = experts
        self._shared_expert = shared_expert
        self._staging = staging

    def with_gate(self, wrap: Callable[[Any], ForcedGate]) -> MoEFeedForward:
        """Return the same half with another gate, which ``wrap`` makes of its own."""
        parts = self._experts, self._shared_expert, self._staging
        return MoEFeedForward(self._layer_id, wrap(self._gate), *parts)

    def begin(
        self, normed: torch.Tensor, context: StepContext, tokens: Tokens
    ) -> tuple[Any, torch.Tensor | None]:
        """See :class:`FeedForwardHalf`; sends the rows, and computes the shared expert."""
        rows: device_rows.LayerRows = normed
        reselect: ChooseAmong  # where experts are missing or full
        if self._staging is None:  # the model is on the CPU
            choice = self._gate.choice(normed, room=context.room(tokens))
            reselect = partial(self._gate.choose_anew, normed)
        else:
            may_change = self._experts.may_change(context, self._layer_id)
            choice, rows, reselect = device_rows.chosen_rows(
                self._staging, self._gate, normed, may_change
            )
        begun = self._experts.begin(context, self._layer_id, rows, choice, reselect, tokens)
        try:
            shared = None if self._shared_expert is None else self._shared_expert(normed)
        except BaseException:
            self._experts.abandon(begun)
            raise
        return begun, shared

    def finish(self, begun: tuple[Any, torch.Tensor | None]) -> torch.Tensor:
        """See :class:`FeedForwardHalf`; waits for the experts."""
        layer, shared = begun
        combined = self._experts.finish(layer)
        if self._staging is not None:
            [combined] = self._staging.to_device(combined)
        return combined if shared is None else combined + shared

    def abandon(self, begun: tuple[Any, torch.Tensor | None]) -> None:
        """See :class:`FeedForwardHalf`."""
        self._experts.abandon(begun[0])


class _PieceRun:
    """A piece on its way through the layers."""

    def __init__(
        self, residual: torch.Tensor, rotation: Rotation, paged: PagedContext, piece: Microbatch
    ) -> None:
        self._residual = residual
        self._rotation = rotation
        self._paged = paged
        self._tokens = piece.tokens
        self._wanted = piece.wanted
        self._output: torch.Tensor | None = None
        self._begun: tuple[DecoderLayer, Any] | None = None

    def begin(self, layer: DecoderLayer, context: StepContext) -> None:
        """Attend in a layer, and begin its feed-forward half."""
        normed = layer.attend(self._residual, self._output, self._rotation, self._paged)
        self._begun = layer, layer.feed_forward.begin(normed, context, self._tokens)

    def begin_last(self, layer: DecoderLayer, context: StepContext) -> None:
        """Begin the last layer: no later one reads more of it than keys and values.

        So only the tokens that are wanted pass its feed-forward half.
        """
        if (wanted := self._wanted) is None:
            self.begin(layer, context)
            return
        given = self._residual, self._output, self._rotation, self._paged
        if layer.attend_wanted is not None:
            normed = layer.attend_wanted(*given, wanted)
        else:
            normed = layer.attend(*given).index_select(0, wanted)
        self._output = None  # it is in the residual stream
        if wanted.numel():
            tokens = np.arange(self._tokens.start, self._tokens.stop)[wanted.numpy()]
            self._begun = layer, layer.feed_forward.begin(normed, context, tokens)

    def finish(self) -> None:
        """Finish the layer that was begun, if any."""
        if self._begun is not None:
            (layer, begun), self._begun = self._begun, None
            self._output = layer.finish(begun)

    def hidden_states(self) -> torch.Tensor:
        """Return the hidden states [T, H] after the last layer, which was finished.

        Those of tokens that are not wanted are of no use.
        """
        if self._output is None:
            return self._residual
        if self._wanted is None:
            return self._residual + self._output
        self._residual[self._wanted] += self._output
        return self._residual

    def abandon(self) -> None:
        """Abandon the layer that was begun, if any."""
        if self._begun is not None:
            (layer, begun), self._begun = self._begun, None
            layer.feed_forward.abandon(begun)


class Decoder:
    """A model without its experts."""

    def __init__(
        self,
        embedding: Map,
        rotary_embedding: Callable[[torch.Tensor, torch.Tensor], Rotation],
        layers: Sequence[DecoderLayer],
        norm: Map,
        head: Map,
        cache: PagedCache,
        attention: Attention,
        has_window: Sequence[bool],
        staging: Staging | None,
        routed_layers: Sequence[DecoderLayer] = (),
    ) -> None:
        """``embedding`` maps ids [S] to hidden states, ``head`` hidden states to logits.

        ``rotary_embedding`` maps hidden states, of which it takes the dtype, and positions [1, S].
        ``has_window`` is true for each layer with a sliding window. ``staging`` is set where the
        model is on a device. ``routed_layers`` take the place of ``layers`` in steps of which
        requests ask for, or force, the experts of tokens (:mod:`router.model.routed`).
        """
        self._embedding = embedding
        self._rotary_embedding = rotary_embedding
        self._layers = layers
        self._routed_layers = routed_layers
        self._norm = norm
        self._head = head
        self._cache = cache
        self._attention = attention
        self._has_window = has_window
        self._staging = staging
        self.is_on_device = staging is not None

    def forward(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        pieces: tuple[Microbatch, ...],
        context: StepContext,
        *others: torch.Tensor,
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Run one packed step; returns the last layer's hidden states [S, H], and ``others``.

        ``token_ids`` and ``positions`` are [S]. ``pieces`` are all tokens in their order; without
        a device only the hidden states of tokens that they want are of use. All
        inputs are on the host. Every MoE layer gets ``context``. The hidden states stay on the
        model's device. ``others`` are tensors that are needed there afterwards; they come in the
        same copy.
        """
        placed = list(others)
        if self._staging is not None:
            pieces, [token_ids, positions, *placed] = batch_to_device(
                self._staging, pieces, context.routed, token_ids, positions, *others
            )
        hidden_states = self._embedding(token_ids)  # [S, H]
        rotation = self._rotary_embedding(hidden_states, positions.unsqueeze(0))
        return self._through_layers(hidden_states, rotation, pieces, context), placed

    def logits(self, hidden_states: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
        """Return fp32 logits [R, V] of hidden states [S, H] that :meth:`forward` has returned.

        ``rows`` [R] are indices into them, ascending, on the model's device; without them all are
        meant. The logits stay there.
        """
        # Ascending rows that are as many as the hidden states are the hidden states themselves.
        if rows is not None and rows.shape < hidden_states.shape[:1]:
            hidden_states = hidden_states.index_select(0, rows)
        normed = self._norm(hidden_states)  # [R, H]
        return self._head(normed).float()

    def _through_layers(
        self,
        hidden_states: torch.Tensor,
        rotation: Rotation,
        pieces: Sequence[Microbatch],
        context: StepContext,
    ) -> torch.Tensor:
        """Return the hidden states [S, H] after the last layer."""
        runs = self._runs(hidden_states, rotation, pieces)
        layers = self._layers if context.routed is None else self._routed_layers
        try:
            for layer in layers[:-1]:
                for run in runs:
                    run.finish()
                    run.begin(layer, context)
            for run in runs:
                run.finish()
                run.begin_last(layers[-1], context)
            for run in runs:
                run.finish()
        except BaseException:
            for run in runs:
                run.abandon()
            raise
        states = [run.hidden_states() for run in runs]
        return states[0] if len(states) == 1 else torch.cat(states)

    def _runs(
        self, hidden_states: torch.Tensor, rotation: Rotation, pieces: Sequence[Microbatch]
    ) -> list[_PieceRun]:
        """Return the pieces of a step before the first layer."""
        is_cut = len(pieces) > 1
        return [
            _PieceRun(
                hidden_states[piece.tokens] if is_cut else hidden_states,
                _of_tokens(rotation, piece.tokens) if is_cut else rotation,
                PagedContext(self._cache, self._attention, piece.batch, self._has_window),
                piece,
            )
            for piece in pieces
        ]

    def to_device(self, *tensors: torch.Tensor) -> Sequence[torch.Tensor]:
        """Return tensors of the host on the model's device, by one copy."""
        return tensors if self._staging is None else self._staging.to_device(*tensors)

    def to_host(self, *tensors: torch.Tensor) -> Sequence[torch.Tensor]:
        """Return tensors of the model's device on the host, by one copy.

        They last until the next step.
        """
        return tensors if self._staging is None else self._staging.to_host(*tensors)


def _of_tokens(rotation: Rotation, tokens: slice) -> Rotation:
    """Return the angles of some tokens of a step."""
    if isinstance(rotation, torch.Tensor):
        return rotation[:, tokens]
    return tuple(part[:, tokens] for part in rotation)
