"""The experts that one actor holds, and the products that it runs for waiting messages.

Messages of all routers that wait at the same time are merged: all rows for one (model, layer,
expert) go through one product. Rows are independent of each other, so an answer does not depend
on who shares the product beyond the rounding of a differently sized matrix product.

Dimension letters: P rows of a frame or of one expert, H hidden size.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from cluster.errors import FrameError, WrongPlacementError
from cluster.frames import DispatchFrame, ErrorFrame, RowsFrame
from cluster.placement import ExpertKey
from cluster.tensors import TORCH_DTYPES, from_bytes, to_bytes
from experts.ffn import Activation, PackedFfn, ffn_of
from experts.weights import GatedFfnWeights


class GatedFfnExpert:
    """A loaded expert, its resident bytes, and what rows it takes: H, dtype and device."""

    def __init__(self, weights: GatedFfnWeights, act: Activation) -> None:
        """Take over ``weights``, which may be rearranged."""
        self._ffn = ffn_of(weights, act)
        packed = self._ffn if isinstance(self._ffn, PackedFfn) else None
        self.num_bytes = weights.num_bytes if packed is None else packed.num_bytes
        self.hidden_size = weights.down.shape[0]
        self.dtype = weights.down.dtype
        self.device = weights.down.device

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """Map rows [P, H] to rows [P, H]."""
        return self._ffn(rows)


class Expert(Protocol):
    """A loaded expert as the bank needs it: its resident bytes, and what rows it takes."""

    num_bytes: int
    hidden_size: int
    dtype: torch.dtype
    device: torch.device

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """Map rows [P, H] to rows [P, H]."""
        ...


_Pieces = list[torch.Tensor]
"""One frame's rows, a piece per expert; each piece's results take its place."""


@dataclass(slots=True)
class ExpertBank:
    """Loaded experts by key, and how many token rows each has computed."""

    experts: dict[ExpertKey, Expert] = field(default_factory=dict)
    tokens: Counter[ExpertKey] = field(default_factory=Counter)

    @property
    def num_bytes(self) -> int:
        """Resident bytes of the weights of all experts that are held now."""
        return sum(expert.num_bytes for expert in list(self.experts.values()))

    def compute(self, frames: Sequence[DispatchFrame]) -> list[RowsFrame | ErrorFrame]:
        """Run all frames' pairs, merged per expert; one answer per frame, in order.

        A frame that asks for an expert that is not held is answered by WrongPlacementError, one
        whose rows do not fit the expert by FrameError; other frames are not disturbed.
        """
        answers: list[ErrorFrame | _Pieces] = []
        waiting: dict[ExpertKey, list[tuple[_Pieces, int]]] = {}
        for frame in frames:
            try:
                keys = [ExpertKey(frame.model, frame.layer_id, e) for e in frame.expert_ids]
                pieces = self._pieces(frame, keys)
            except (WrongPlacementError, FrameError) as error:
                answers.append(ErrorFrame(frame.request_id, type(error).__name__, error))
                continue
            answers.append(pieces)
            for place, key in enumerate(keys):
                waiting.setdefault(key, []).append((pieces, place))
        for key, places in waiting.items():
            self._run(key, places)
        return [
            answer if isinstance(answer, ErrorFrame) else _rows_frame(frame, answer)
            for frame, answer in zip(frames, answers, strict=True)
        ]

    def _pieces(self, frame: DispatchFrame, keys: Sequence[ExpertKey]) -> _Pieces:
        """Return the rows of a frame's pairs, [P, H] in all, a piece per expert."""
        device = self._check(frame, keys)
        rows = from_bytes(frame.rows, frame.dtype, frame.num_pairs, frame.hidden_size)
        if device.type != "cpu":
            rows = rows.to(device)
        return list(rows.split(frame.num_tokens_per_expert))

    def _check(self, frame: DispatchFrame, keys: Sequence[ExpertKey]) -> torch.device:
        dtype = TORCH_DTYPES[frame.dtype]
        for key in keys:
            expert = self.experts.get(key)
            if expert is None:
                raise WrongPlacementError(
                    f"expert {key.expert_id} of layer {key.layer_id} is not held here", key.model
                )
            if frame.hidden_size != expert.hidden_size:
                raise FrameError(
                    f"must be {expert.hidden_size} (given: {frame.hidden_size})",
                    "frame.hidden_size",
                )
            if dtype != expert.dtype:
                raise FrameError(f"must be {expert.dtype} (given: {frame.dtype})", "frame.dtype")
        return self.experts[keys[0]].device

    def _run(self, key: ExpertKey, places: list[tuple[_Pieces, int]]) -> None:
        """Run one expert once over all pieces that wait for it, and put the results there."""
        rows = [pieces[place] for pieces, place in places]
        if len(rows) == 1:
            outputs: Sequence[torch.Tensor] = (self.experts[key](rows[0]),)
        else:
            sizes = [piece.shape[0] for piece in rows]
            outputs = self.experts[key](torch.cat(rows)).split(sizes)
        for (pieces, place), output in zip(places, outputs, strict=True):
            pieces[place] = output
            self.tokens[key] += output.shape[0]


def _rows_frame(frame: DispatchFrame, pieces: _Pieces) -> RowsFrame:
    result = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    return RowsFrame(
        frame.request_id, frame.dtype, result.shape[0], result.shape[1], to_bytes(result)
    )
