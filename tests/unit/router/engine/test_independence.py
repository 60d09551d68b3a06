"""A token's logits depend on its sequence and the weights alone, bit for bit, in bf16 too.

They are computed alone, in a crowd, in chunks with any borders, and token by token.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cluster.native import native
from router.engine.batch import pack
from router.engine.sequence import ScheduledChunk, Sequence
from tests.local_cluster import LocalCluster, greedy_request
from tests.unit.router.engine.conftest import ALL, Saves
from tests.unit.router.engine.test_engine import prompt_of

pytestmark = pytest.mark.usefixtures("one_thread")
LENGTH = 37


class Runs:
    """One sequence's logits, whatever else its steps compute; all runs have one model."""

    def __init__(self, folder: Path, dtype: str) -> None:
        self.cluster = LocalCluster(
            folder, threaded=False, dtype=dtype, cache_tokens=512, prefix_cache=False
        )

    def admitted(self, seed: int, length: int) -> Sequence:
        scheduler = self.cluster.scheduler
        [sequence] = scheduler.add(greedy_request(f"r{seed}", prompt_of(length, seed), 4))
        scheduler.schedule()  # takes pages
        return sequence

    def in_chunks(self, ends: list[int], crowd: tuple[tuple[int, int], ...] = ()) -> torch.Tensor:
        """Return the last token's logits, beside a ``crowd`` of (seed, length) each."""
        cache = self.cluster.model.decoder._cache
        for tensor in (*cache.keys, *cache.values):
            tensor.fill_(torch.nan)  # what the run before has left
        own = self.admitted(0, ends[-1])
        others = [self.admitted(*other) for other in crowd]
        logits = torch.empty(0)
        for begin, end in zip([0, *ends], ends, strict=False):
            lengths = [(s, len(s.token_ids)) for s in others]
            chunks = [
                ScheduledChunk(s, length - 1 if begin else 0, length) for s, length in lengths
            ]
            chunks.append(ScheduledChunk(own, begin, end))
            with torch.inference_mode():
                packed = pack(chunks, self.cluster.model.attention)
                logits = self.cluster.forward(packed)
            for work in chunks:
                work.sequence.num_computed = work.end
        for sequence in (own, *others):
            self.cluster.scheduler.finish(sequence)
        return logits[next(i for i, s in enumerate(packed.sampled) if s is own)]


DTYPES = [] if native is None else ["float32", "bfloat16", "float16"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ALL)
def test_neither_company_nor_chunks_change_a_bit(saved: Saves, family: str, dtype: str) -> None:
    runs = Runs(saved(family).folder, dtype)
    alone = runs.in_chunks([LENGTH])
    assert alone.isfinite().all()
    crowd = ((1, 3), (2, 60), (3, 1), (4, 18))
    for ends, company in (
        ([LENGTH], crowd),
        ([5, 16, 17, LENGTH], ()),
        ([5, 16, 17, LENGTH], crowd),
        ([11, *range(30, LENGTH + 1)], crowd[:2]),
        ([*range(1, LENGTH + 1)], ()),
    ):
        assert torch.equal(runs.in_chunks(ends, company), alone)


# Products, experts and attention are worth several threads. Of DeepSeek-V2, so many queries are
# rotated that torch cuts them for three threads, amid a vector.
WIDE: dict[str, dict[str, int]] = {
    "mixtral": {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 16},
    "qwen3_moe": {"hidden_size": 256, "moe_intermediate_size": 512, "num_attention_heads": 16},
    "deepseek_v2": {"num_attention_heads": 16, "num_key_value_heads": 16, "qk_rope_head_dim": 64},
}
THREADED = [
    ("mixtral", "bfloat16", 3),
    ("qwen3_moe", "float32", 3),
    ("deepseek_v2", "float32", 3),
    ("deepseek_v2", "float32", 4),
]


@pytest.mark.parametrize(("family", "dtype", "num_threads"), [] if native is None else THREADED)
def test_threads_change_no_bit(saved: Saves, family: str, dtype: str, num_threads: int) -> None:
    folder = saved(family, **WIDE[family]).folder
    alone = Runs(folder, dtype).in_chunks([160])
    torch.set_num_threads(num_threads)
    try:
        runs = Runs(folder, dtype)  # its experts take as many threads
        for ends in ([160], [80, 160], [5, 150, 160]):
            assert torch.equal(runs.in_chunks(ends), alone)
    finally:
        torch.set_num_threads(1)
