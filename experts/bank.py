"""The experts that one actor holds, and the products that it runs for waiting messages.

Messages of all routers that wait at the same time are merged: all rows for one (model, layer,
expert) go through one product. Rows are independent of each other, so an answer does not depend
on who shares the product beyond the rounding of a differently sized matrix product.

Dimension letters: N unique rows of a frame, P (row, expert) pairs of a frame, H hidden size.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from cluster.errors import FrameError, WrongPlacementError
from cluster.frames import DispatchFrame, ErrorFrame, RowsFrame
from cluster.placement import ExpertKey
from cluster.tensors import TORCH_DTYPES, from_bytes, to_bytes
from experts.ffn import Activation, gated_ffn
from experts.weights import GatedFfnWeights


class GatedFfnExpert:
    """A loaded expert: weights and activation, and what rows it takes: H, dtype and device."""

    def __init__(self, weights: GatedFfnWeights, act: Activation) -> None:
        self.weights = weights
        self.act = act
        self.hidden_size = weights.down.shape[0]
        self.dtype = weights.down.dtype
        self.device = weights.down.device

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """Map rows [P, H] to rows [P, H]."""
        return gated_ffn(rows, self.weights, self.act)


_Segment = tuple[torch.Tensor, torch.Tensor]
"""Views of one frame: the rows of its pairs for one expert, and where their results belong."""


@dataclass(slots=True)
class ExpertBank:
    """Loaded experts by key, and how many token rows each has computed."""

    experts: dict[ExpertKey, GatedFfnExpert] = field(default_factory=dict)
    tokens: Counter[ExpertKey] = field(default_factory=Counter)

    def compute(self, frames: Sequence[DispatchFrame]) -> list[RowsFrame | ErrorFrame]:
        """Run all frames' pairs, merged per expert; one answer per frame, in order.

        A frame that asks for an expert that is not held is answered by WrongPlacementError, one
        whose rows do not fit the expert by FrameError; other frames are not disturbed.
        """
        answers: list[ErrorFrame | torch.Tensor] = []
        segments: dict[ExpertKey, list[_Segment]] = {}
        for frame in frames:
            try:
                answers.append(self._collect(frame, segments))
            except (WrongPlacementError, FrameError) as error:
                answers.append(ErrorFrame(frame.request_id, type(error).__name__, error))
        for key, parts in segments.items():
            self._run(key, parts)
        return [
            answer if isinstance(answer, ErrorFrame) else _rows_frame(frame, answer)
            for frame, answer in zip(frames, answers, strict=True)
        ]

    def _collect(
        self, frame: DispatchFrame, segments: dict[ExpertKey, list[_Segment]]
    ) -> torch.Tensor:
        """Add a frame's pairs to the segments; returns the (yet empty) results, [P, H]."""
        keys = [ExpertKey(frame.model, frame.layer_id, e) for e in frame.expert_ids]
        device = self._check(frame, keys)
        index = np.frombuffer(frame.row_index, dtype="<i4")  # [P]
        if index.min() < 0 or index.max() >= frame.num_rows:
            raise FrameError(f"must be in 0..{frame.num_rows - 1}", "frame.row_index")
        rows = from_bytes(frame.rows, frame.dtype, frame.num_rows, frame.hidden_size)  # [N, H]
        gathered = rows.index_select(0, torch.from_numpy(index.astype(np.int64))).to(device)
        result = torch.empty_like(gathered)
        counts = list(frame.num_tokens_per_expert)
        for key, *segment in zip(keys, gathered.split(counts), result.split(counts), strict=True):
            segments.setdefault(key, []).append((segment[0], segment[1]))
        return result

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

    def _run(self, key: ExpertKey, parts: list[_Segment]) -> None:
        """Run one expert once over the rows of all its segments."""
        rows = parts[0][0] if len(parts) == 1 else torch.cat([rows for rows, _ in parts])
        output = self.experts[key](rows)
        self.tokens[key] += rows.shape[0]
        start = 0
        for _, result in parts:
            end = start + result.shape[0]
            result.copy_(output[start:end])
            start = end


def _rows_frame(frame: DispatchFrame, result: torch.Tensor) -> RowsFrame:
    return RowsFrame(
        frame.request_id, frame.dtype, result.shape[0], result.shape[1], to_bytes(result)
    )
