"""The experts that one actor holds, and the products that it runs for waiting messages.

Messages of all routers that wait at the same time are merged: all rows for one (model, layer,
expert) go through one product. Rows are independent of each other, so an answer does not depend
on who shares the product beyond the rounding of a differently sized matrix product.

Dimension letters: P rows of a frame or of one expert, H hidden size.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from cluster.errors import ExpertMeshError, FrameError, WrongPlacementError
from cluster.spec import ExpertKey
from cluster.wire.frames import Buffer, DispatchFrame, ErrorFrame, RowsFrame
from cluster.wire.tensors import TORCH_DTYPES, from_bytes, pieces_of, to_bytes
from experts.checkpoint.expert_weights import GatedFfnWeights
from experts.compute.amx_ffn import TiledFfn, compute_tiled
from experts.compute.ffn import Activation, PackedFfn, ffn_of

MOST_PIECES = 32
"""So many experts' results are sent from where they lie; more are first brought together."""


class GatedFfnExpert:
    """A loaded expert, its resident bytes, and what rows it takes: H, dtype and device."""

    def __init__(self, weights: GatedFfnWeights, act: Activation) -> None:
        """Take over ``weights``, which may be rearranged."""
        self.ffn = ffn_of(weights, act)
        packed = self.ffn if isinstance(self.ffn, PackedFfn) else None
        self.num_bytes = weights.num_bytes if packed is None else packed.num_bytes
        self.together = _tiled_together if isinstance(self.ffn, TiledFfn) else None
        self.hidden_size = weights.down.shape[0]
        self.dtype = weights.down.dtype
        self.device = weights.down.device

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """Map rows [P, H] to rows [P, H]."""
        return self.ffn(rows)


Together = Callable[[Sequence[Any], tuple[int, ...], Buffer], memoryview | None]
"""Computes the rows of several experts of one kind at once, from bytes to bytes.

The first ``counts[0]`` rows are the first expert's, and so on. ``None`` where that cannot be, and
all are to be computed one by one.
"""


def _tiled_together(
    experts: Sequence[GatedFfnExpert], counts: tuple[int, ...], rows: Buffer
) -> memoryview | None:
    return compute_tiled([expert.ffn for expert in experts], counts, rows)


class Expert(Protocol):
    """A loaded expert as the bank needs it: its resident bytes, and what rows it takes."""

    num_bytes: int
    hidden_size: int
    dtype: torch.dtype
    device: torch.device

    @property
    def together(self) -> Together | None:
        """What computes several like this one at once; the same for all of them."""
        ...

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """Map rows [P, H] to rows [P, H]."""
        ...


@dataclass(slots=True)
class _Layer:
    """The experts of one layer that are held, by id, and how many rows each has computed."""

    experts: dict[int, Expert] = field(default_factory=dict)
    tokens: Counter[int] = field(default_factory=Counter)


@dataclass(slots=True)
class _Work:
    """A frame and its experts, and what these make of its rows."""

    frame: DispatchFrame
    layer: _Layer
    experts: list[Expert]
    results: list[torch.Tensor] | memoryview | None = None
    """Of each expert, or of all in one."""


_NO_LAYER = _Layer()


class ExpertBank:
    """Loaded experts by key, and how many token rows each has computed."""

    def __init__(self) -> None:
        """Start empty."""
        self._layers: dict[tuple[str, int], _Layer] = {}

    def hold(self, key: ExpertKey, expert: Expert) -> None:
        """Have an expert from now on; frames may be computed meanwhile."""
        layer = self._layers.setdefault((key.model, key.layer_id), _Layer())
        layer.experts[key.expert_id] = expert

    def let_go(self, key: ExpertKey) -> None:
        """Let an expert and its memory go; one that is not held is not an error."""
        self._layer(key).experts.pop(key.expert_id, None)

    def __contains__(self, key: ExpertKey) -> bool:
        """Tell whether an expert is held."""
        return key.expert_id in self._layer(key).experts

    def _layer(self, key: ExpertKey) -> _Layer:
        return self._layers.get((key.model, key.layer_id), _NO_LAYER)

    @property
    def experts(self) -> dict[ExpertKey, Expert]:
        """The experts that are held now."""
        layers = list(self._layers.items())
        return {
            ExpertKey(*at, expert_id): expert
            for at, layer in layers
            for expert_id, expert in list(layer.experts.items())
        }

    @property
    def tokens(self) -> dict[ExpertKey, int]:
        """How many rows each expert has computed, those that are no longer held too."""
        layers = list(self._layers.items())
        return {ExpertKey(*at, e): n for at, layer in layers for e, n in list(layer.tokens.items())}

    @property
    def num_bytes(self) -> int:
        """Resident bytes of the weights of all experts that are held now."""
        return sum(expert.num_bytes for expert in self.experts.values())

    def compute(self, frames: Sequence[DispatchFrame]) -> list[RowsFrame | ErrorFrame]:
        """Run all frames' pairs, merged per expert; one answer per frame, in order.

        A frame that asks for an expert that is not held is answered by WrongPlacementError, one
        whose rows do not fit the expert by FrameError; other frames are not disturbed.
        """
        opened = [self._open(frame) for frame in frames]
        works = [work for work in opened if isinstance(work, _Work)]
        if len(works) == 1:
            _run_lone(works[0])
        else:
            with _inference():
                _run_merged(works)
        for work in works:
            counts, tokens = work.frame.num_tokens_per_expert, work.layer.tokens
            for expert_id, count in zip(work.frame.expert_ids, counts, strict=True):
                tokens[expert_id] += count
        return [_rows_frame(work) if isinstance(work, _Work) else work for work in opened]

    def _open(self, frame: DispatchFrame) -> _Work | ErrorFrame:
        layer = self._layers.get((frame.model, frame.layer_id), _NO_LAYER)
        held, hidden_size, dtype = layer.experts, frame.hidden_size, TORCH_DTYPES[frame.dtype]
        experts: list[Expert] = []
        for expert_id in frame.expert_ids:
            expert = held.get(expert_id)
            if expert is None or expert.hidden_size != hidden_size or expert.dtype != dtype:
                error = _misfit(frame, expert_id, expert)
                return ErrorFrame(frame.request_id, type(error).__name__, error)
            experts.append(expert)
        return _Work(frame, layer, experts)


def _misfit(frame: DispatchFrame, expert_id: int, expert: Expert | None) -> ExpertMeshError:
    """Return why an expert cannot compute a frame."""
    if expert is None:
        return WrongPlacementError(
            f"expert {expert_id} of layer {frame.layer_id} is not held here", frame.model
        )
    if frame.hidden_size != expert.hidden_size:
        return FrameError(
            f"must be {expert.hidden_size} (given: {frame.hidden_size})", "frame.hidden_size"
        )
    return FrameError(f"must be {expert.dtype} (given: {frame.dtype})", "frame.dtype")


def _inference() -> AbstractContextManager[object]:
    """Return torch's inference mode, for a thread that is not in it.

    An expert's product takes up to 8 µs less in it. To enter it takes 30 from cold caches, so who
    computes without torch does not, and the threads of streams stay in it.
    """
    return nullcontext() if torch.is_inference_mode_enabled() else torch.inference_mode()


def _run_lone(work: _Work) -> None:
    """Run a frame's experts over its rows."""
    experts, together = work.experts, work.experts[0].together
    if together is not None and all(expert.together is together for expert in experts):
        work.results = together(experts, work.frame.num_tokens_per_expert, work.frame.rows)
    if work.results is None:
        with _inference():
            pieces = _pieces_of(work)
            work.results = [run(rows) for run, rows in zip(work.experts, pieces, strict=True)]


def _run_merged(works: Sequence[_Work]) -> None:
    """Run each expert once over all pieces that wait for it."""
    waiting: dict[tuple[int, int], list[tuple[list[torch.Tensor], int, Expert]]] = {}
    for work in works:
        # Each piece's results take its place.
        work.results = pieces = _pieces_of(work)
        asked = zip(work.frame.expert_ids, work.experts, strict=True)
        for place, (expert_id, expert) in enumerate(asked):
            key = id(work.layer), expert_id
            waiting.setdefault(key, []).append((pieces, place, expert))
    for places in waiting.values():
        rows = [pieces[place] for pieces, place, _ in places]
        joined = torch.cat(rows) if len(rows) > 1 else rows[0]
        outputs = places[0][2](joined).split([piece.shape[0] for piece in rows])
        for (pieces, place, _), output in zip(places, outputs, strict=True):
            pieces[place] = output


def _pieces_of(work: _Work) -> list[torch.Tensor]:
    """Return a frame's rows, in a piece for each of its experts."""
    frame, device = work.frame, work.experts[0].device
    counts, hidden_size = frame.num_tokens_per_expert, frame.hidden_size
    if device.type == "cpu":
        return pieces_of(memoryview(frame.rows), frame.dtype, counts, hidden_size)
    # Another device gets all rows at once.
    rows = from_bytes(frame.rows, frame.dtype, frame.num_rows, hidden_size).to(device)
    return list(rows.split_with_sizes(counts))


def _rows_frame(work: _Work) -> RowsFrame:
    frame, results = work.frame, work.results
    assert results is not None
    rows: tuple[Buffer, ...]
    if isinstance(results, memoryview):
        rows = (results,)
    else:
        if len(results) > MOST_PIECES or not results[0].is_cpu:
            results = [torch.cat(results)]
        rows = tuple([to_bytes(piece) for piece in results])
    return RowsFrame(frame.request_id, frame.num_rows, frame.hidden_size, frame.dtype, rows)
