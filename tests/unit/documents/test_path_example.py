"""ARCHITECTURE's path: the functions to open are there, and its example is what they compute."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from cluster.wire.tensors import to_bytes
from router.engine.batch import pack
from router.engine.sequence import ScheduledChunk, Sequence
from router.messages.request import GenerationRequest, SamplingParams
from router.model.cpu.native_attention import NativeAttention
from router.moe.combine import ExpertRows, combine, prepare
from router.moe.permute import gather, lay_out, split, summands_of

ROOT = Path(__file__).parents[3]
DOCUMENT = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
PATH = DOCUMENT.partition("**A decode step**")[2].partition("**An example.**")[0]
EXAMPLE = DOCUMENT.partition("**An example.**")[2].partition("**When no answer comes.**")[0]
ENTRY = re.compile(r"^\d+\. `([\w/]+\.py)`: (.*?)(?=^\d+\. |^\*\*|\Z)", re.MULTILINE | re.DOTALL)
TYPES = "cluster/transport/base.py"
HIDDEN_STATES = torch.tensor([[1.0, 2.0], [-3.0, 5.0]])  # hA, hB
HOLDERS = {0: "x", 1: "x", 2: "y", 3: "y", 4: "z", 5: "z"}


def entries() -> list[tuple[str, str]]:
    found = ENTRY.findall(PATH)
    assert len(found) == 21
    return found


FILES = [TYPES, *(file for file, _ in entries())]


@functools.cache
def defined(file: str) -> set[str]:
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    kinds = ast.FunctionDef, ast.ClassDef
    return {node.name for node in ast.walk(tree) if isinstance(node, kinds)}


@pytest.mark.parametrize(("file", "text"), entries())
def test_the_functions_to_open_and_to_skip_are_in_the_code(file: str, text: str) -> None:
    names = re.findall(r"`(?:\w+\.)?(\w+)`", re.sub(r"`[\w/]+\.py`", "", text))
    assert {*names} - {"allowed"} <= {name for other in FILES for name in defined(other)}
    opened = re.search(r"(?:Open|docstrings of|helper:) (?:\*\*)?`(?:\w+\.)?(\w+)`", text)
    if opened is None:
        assert text.split()[-1] == "Skip."
    else:
        assert opened[1] in defined(file) | defined(TYPES)


def works() -> Iterator[ScheduledChunk]:
    for name, token_ids, page in (("A", (5, 9, 7), 0), ("B", (8, 2, 6, 3, 4), 1)):
        request = GenerationRequest(name, "m", token_ids, SamplingParams(max_tokens=1), 0.0)
        sequence = Sequence(request, 0, list(token_ids), len(token_ids) - 1)
        sequence.occupy([page], 16)
        yield ScheduledChunk(sequence, len(token_ids) - 1, len(token_ids))


def row_of(expert_id: int, hidden_state: torch.Tensor) -> torch.Tensor:
    return torch.sin(hidden_state * (expert_id + 1))


def says(*values: object) -> None:
    for value in values:
        assert f"`{value}`" in EXAMPLE


def test_the_example_is_packed_so() -> None:
    packed = pack([*works()], NativeAttention(None))
    [piece] = packed.pieces
    says(packed.token_ids.tolist(), packed.positions.tolist(), piece.batch.new_slots.tolist())
    view = piece.batch.view
    says(view.spans.tolist(), view.pages.tolist())


def test_the_example_is_sent_and_summed_so() -> None:
    ids, weights = np.array([[4, 1], [1, 2]]), torch.tensor([[0.6, 0.4], [0.7, 0.3]])
    layout = lay_out(HOLDERS, dict.fromkeys(HOLDERS.values(), 1))
    ordered, parts, missing = split(layout, ids.ravel(), 2, None)
    assert not len(missing)
    says(ids.tolist(), [[0.6, 0.4], [0.7, 0.3]], ordered.tolist(), summands_of(ids).tolist())
    assert [part.actor_id for part in parts] == ["x", "y", "z"]
    for part, rows in zip(parts, ("f1(hB), f1(hA)", "f2(hB)", "f4(hA)"), strict=True):
        says(part.pairs.tolist())
        assert f"`{part.pairs.tolist()}` (expert {part.expert_ids[0]})" in EXAMPLE
        assert f"{part.actor_id}: {rows}" in EXAMPLE
    of_a, of_b = HIDDEN_STATES
    moved = torch.frombuffer(bytearray(gather(HIDDEN_STATES, ordered, 2)), dtype=torch.float32)
    assert torch.equal(moved.view(4, 2), torch.stack([of_b, of_a, of_b, of_a]))
    computed = [[row_of(1, of_b), row_of(1, of_a)], [row_of(2, of_b)], [row_of(4, of_a)]]
    received = [
        ExpertRows(part.pairs, to_bytes(torch.stack(rows)))
        for part, rows in zip(parts, computed, strict=True)
    ]
    sums, is_finite = combine(received, prepare(weights, summands_of(ids), HIDDEN_STATES))
    assert is_finite
    assert "A: 0.4 f1(hA) + 0.6 f4(hA); B: 0.7 f1(hB) + 0.3 f2(hB)" in EXAMPLE
    of_pair = weights.ravel()
    expected_a = of_pair[1] * row_of(1, of_a) + of_pair[0] * row_of(4, of_a)
    expected_b = of_pair[2] * row_of(1, of_b) + of_pair[3] * row_of(2, of_b)
    assert torch.equal(sums, torch.stack([expected_a, expected_b]))
