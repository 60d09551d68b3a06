"""The experts that one actor holds, and the products that it runs for waiting messages.

Messages of all routers that wait at the same time are merged: all rows for one (model, layer,
expert) go through one product. Rows are independent of each other, so an answer does not depend
on who shares the product beyond the rounding of a differently sized matrix product.

Dimension letters: N unique rows of a frame, P (row, expert) pairs of a frame, H hidden size.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from cluster.errors import FrameError, WrongPlacementError
from cluster.frames import DispatchFrame, ErrorFrame, RowsFrame
from cluster.placement import ExpertKey
from cluster.tensors import TORCH_DTYPES, from_bytes, to_bytes
from experts.ffn import Activation, gated_ffn
from experts.weights import GatedFfnWeights


@dataclass(frozen=True, slots=True)
class GatedFfnExpert:
    """A loaded expert: weights and activation."""

    weights: GatedFfnWeights
    act: Activation

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """Map rows [P, H] to rows [P, H]."""
        return gated_ffn(rows, self.weights, self.act)

    @property
    def hidden_size(self) -> int:
        """H, the width of rows that the expert takes."""
        return self.weights.down.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of rows that the expert takes."""
        return self.weights.down.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.weights.down.device


@dataclass(slots=True)
class _Segment:
    """The pairs of one frame that go to one expert, and where their results belong."""

    rows: torch.Tensor
    result: torch.Tensor


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
        answers: list[RowsFrame | ErrorFrame | None] = []
        results: list[torch.Tensor | None] = []
        segments: defaultdict[ExpertKey, list[_Segment]] = defaultdict(list)
        for frame in frames:
            try:
                results.append(self._collect(frame, segments))
                answers.append(None)
            except (WrongPlacementError, FrameError) as error:
                results.append(None)
                answers.append(ErrorFrame(frame.request_id, type(error).__name__, error))
        for key in sorted(segments):
            self._run(key, segments[key])
        return [
            answer if answer is not None else _rows_frame(frame, result)
            for frame, answer, result in zip(frames, answers, results, strict=True)
        ]

    def _collect(
        self, frame: DispatchFrame, segments: defaultdict[ExpertKey, list[_Segment]]
    ) -> torch.Tensor:
        keys = [ExpertKey(frame.model, frame.layer_id, e) for e in frame.expert_ids]
        device = self._check(frame, keys)
        rows = from_bytes(frame.rows, frame.dtype, frame.num_rows, frame.hidden_size)  # [N, H]
        index = torch.frombuffer(frame.row_index, dtype=torch.int32)  # [P]
        if int(index.min()) < 0 or int(index.max()) >= frame.num_rows:
            raise FrameError(f"must be in 0..{frame.num_rows - 1}", "frame.row_index")
        gathered = rows.index_select(0, index).to(device)  # [P, H]
        result = torch.empty_like(gathered)
        start = 0
        for key, count in zip(keys, frame.num_tokens_per_expert, strict=True):
            part = slice(start, start + count)
            segments[key].append(_Segment(gathered[part], result[part]))
            start += count
        return result

    def _check(self, frame: DispatchFrame, keys: Sequence[ExpertKey]) -> torch.device:
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
            if TORCH_DTYPES[frame.dtype] != expert.dtype:
                raise FrameError(f"must be {expert.dtype} (given: {frame.dtype})", "frame.dtype")
        return self.experts[keys[0]].device

    def _run(self, key: ExpertKey, parts: list[_Segment]) -> None:
        expert = self.experts[key]
        rows = parts[0].rows if len(parts) == 1 else torch.cat([part.rows for part in parts])
        output = expert(rows)
        self.tokens[key] += rows.shape[0]
        start = 0
        for part in parts:
            end = start + part.rows.shape[0]
            part.result.copy_(output[start:end])
            start = end


def _rows_frame(frame: DispatchFrame, result: torch.Tensor | None) -> RowsFrame:
    assert result is not None
    return RowsFrame(
        frame.request_id, frame.dtype, result.shape[0], result.shape[1], to_bytes(result)
    )
