"""The adapter of transformers, which this project's own environment has."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.peers import side


class Transformers:
    """A Mixtral in one process; the format is a dtype and the way experts compute."""

    def __init__(self, task: side.Task) -> None:
        """Load the model on the CPU."""
        import torch
        import transformers

        from benchmarks.baseline import transformers_generate

        dtype, experts = task.format.split()
        self.version = f"transformers {transformers.__version__}, torch {torch.__version__}"
        self._generate = transformers_generate(
            Path(task.model),
            experts,
            torch.device("cpu"),
            {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype],
        )
        torch.set_num_threads(task.threads)

    def generate(self, prompts: Sequence[Sequence[int]], tokens: int) -> side.Tokens:
        """Return the greedy tokens of each prompt."""
        return self._generate(prompts, tokens)


if __name__ == "__main__":
    side.main(Transformers)
