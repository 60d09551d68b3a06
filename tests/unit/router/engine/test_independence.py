"""A token's logits depend on its sequence and the weights alone, bit for bit, in bf16 too.

They are computed alone, in a crowd, in chunks with any borders, and token by token.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.native.built import native
from router.engine.batch import pack
from router.engine.sequence import Sequence, Work
from tests.checkpoints import save_mixtral
from tests.family_checkpoints import SAVERS
from tests.grok_oracle import save_grok
from tests.local_cluster import LocalCluster, greedy_request
from tests.unit.router.engine.test_engine import prompt_of

pytestmark = pytest.mark.usefixtures("one_thread")
ALL: dict[str, Callable[..., Any]] = {"mixtral": save_mixtral, "grok": save_grok, **SAVERS}
LENGTH = 37


class Run:
    """One sequence's logits, whatever else its steps compute."""

    def __init__(self, folder: Path, dtype: str, length: int = LENGTH) -> None:
        self.cluster = LocalCluster(folder, threaded=False, dtype=dtype)
        self.sequence = self.admitted(0, length)

    def admitted(self, seed: int, length: int) -> Sequence:
        scheduler = self.cluster.scheduler
        [sequence] = scheduler.add(greedy_request(f"r{seed}", prompt_of(length, seed), 4))
        scheduler.schedule()  # takes pages
        return sequence

    def step(self, *works: Work) -> torch.Tensor:
        with torch.inference_mode():
            packed = pack([*works], self.cluster.model.attention)
            logits = self.cluster.forward(packed)
        for work in works:
            work.sequence.num_computed = work.end
        return logits[packed.sampled.index(self.sequence)] if self.is_sampled(packed) else logits

    def is_sampled(self, packed: Any) -> bool:
        return any(sequence is self.sequence for sequence in packed.sampled)

    def in_chunks(self, ends: list[int], crowd: tuple[tuple[int, int], ...] = ()) -> torch.Tensor:
        """Return the last token's logits, beside a ``crowd`` of (seed, length) each."""
        others = [self.admitted(*other) for other in crowd]
        logits = torch.empty(0)
        for begin, end in zip([0, *ends], ends, strict=False):
            beside = [Work(s, s.num_computed, len(s.token_ids)) for s in others if not begin]
            more = [Work(s, len(s.token_ids) - 1, len(s.token_ids)) for s in others if begin]
            logits = self.step(*beside, *more, Work(self.sequence, begin, end))
        self.cluster.close()
        return logits


DTYPES = [] if native is None else ["float32", "bfloat16", "float16"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ALL)
def test_neither_company_nor_chunks_change_a_bit(tmp_path: Path, family: str, dtype: str) -> None:
    ALL[family](tmp_path)
    alone = Run(tmp_path, dtype).in_chunks([LENGTH])
    assert alone.isfinite().all()
    crowd = ((1, 3), (2, 60), (3, 1), (4, 18))
    for ends, company in (
        ([LENGTH], crowd),
        ([5, 16, 17, LENGTH], ()),
        ([5, 16, 17, LENGTH], crowd),
        ([11, *range(12, LENGTH + 1)], crowd[:2]),
        ([*range(1, LENGTH + 1)], ()),
    ):
        assert torch.equal(Run(tmp_path, dtype).in_chunks(ends, company), alone)


# Products, experts and attention are worth several threads. Of DeepSeek-V2, so many queries are
# rotated that torch cuts them for three threads, amid a vector.
WIDE: dict[str, dict[str, int]] = {
    "mixtral": {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 16},
    "qwen3_moe": {"hidden_size": 256, "moe_intermediate_size": 512, "num_attention_heads": 16},
    "deepseek_v2": {
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "qk_rope_head_dim": 64,
    },
}
THREADED = [
    ("mixtral", "bfloat16", 3),
    ("qwen3_moe", "float32", 3),
    ("deepseek_v2", "float32", 3),
    ("deepseek_v2", "float32", 4),
]


@pytest.mark.parametrize(("family", "dtype", "num_threads"), [] if native is None else THREADED)
def test_threads_change_no_bit(tmp_path: Path, family: str, dtype: str, num_threads: int) -> None:
    ALL[family](tmp_path, **WIDE[family])
    alone = Run(tmp_path, dtype, 160).in_chunks([160])
    torch.set_num_threads(num_threads)
    try:
        for ends in ([160], [80, 160], [5, 150, 160]):
            assert torch.equal(Run(tmp_path, dtype, 160).in_chunks(ends), alone)
    finally:
        torch.set_num_threads(1)
